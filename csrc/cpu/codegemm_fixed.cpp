// CodeGEMM with fixed-point tables, the part that no instruction set changes: the order of tiles, tokens and blocks.
#include "codegemm_fixed.h"

#include <algorithm>

#include "codegemm_driver.h"
#include "convert.h"
#include "isa.h"
#include "scratch.h"

namespace lutgemm {
namespace {

// Tokens that share the reading of codes; their tables, 16 KiB each, stay in L2.
constexpr int64_t kTokens = 16;

// Blocks whose codes are in L2 while one token after the other looks them up.
constexpr int64_t kChunkBlocks = 8;

// fp32 sums of one pass over the weight, y and partial together: with the tables they should stay in L2.
constexpr int64_t kSumFloats = 128 << 10;

// How far ahead of the codes in use their stream is prefetched, into L2, in whole blocks: past the last block of the
// range with those of the next tile. On a Zen 4 core, 4096 x 4096, beside a busy
// neighbour: 172 us, as with warm caches; 8 KiB ahead 178, 4 KiB 217, into L1 290 to 350, not at all 260.
constexpr int64_t kPrefetchBytes = 16 << 10;

struct FixedPass {
  const PackedLayout& p;
  const uint8_t* packed;
  const FixedKernel& kernel;
  int64_t tokens;
  int64_t block_begin, block_end;
  const float* x;  // [tokens][x_stride]
  int64_t x_stride;
  uint8_t* tables;  // [tokens][tile]
  float* partial;   // [tokens][rows]
  float* y;         // [tokens][rows]

  int64_t rows() const { return (block_end - block_begin) * kBlockRows; }

  void run() const {
    std::fill(y, y + tokens * rows(), 0.0f);
    for (int64_t g = 0; g < p.G; ++g) {
      for (int64_t e = 0; e < p.group_entries(g); e += p.tile_entries) add_tile(g, e);
    }
  }

  // Where the blocks of a tile lie: that which starts at entry e of group g.
  struct Tile {
    int count;  // entries
    bool last;  // of its group
    int64_t codes_bytes, block_bytes;
    const uint8_t* blocks;

    Tile(const FixedPass& pass, int64_t g, int64_t e) {
      const PackedLayout& p = pass.p;
      const int64_t entries = p.group_entries(g);
      count = int(std::min<int64_t>(p.tile_entries, entries - e));
      last = e + count == entries;
      codes_bytes = int64_t(count) * kBlockRows;
      block_bytes = codes_bytes + (last ? kBlockRows * p.scale_bytes : 0);
      blocks = pass.packed + p.group_offset(g) + p.blocks * kBlockRows * e;
    }
  };

  // The tile that starts at entry e of group g.
  void add_tile(int64_t g, int64_t e) const {
    const Tile tile(*this, g, e);
    const Tile next = !tile.last ? Tile(*this, g, e + tile.count) : g + 1 < p.G ? Tile(*this, g + 1, 0) : tile;
    const int count = tile.count;
    const int64_t ahead = (kPrefetchBytes + tile.block_bytes - 1) / tile.block_bytes;
    const int64_t table_bytes = int64_t(p.tile_entries) * kernel.table_bytes;

    FixedBuildArgs build{};
    build.rounded = reinterpret_cast<const RoundedCodebooks*>(packed + p.rounded_offset());
    build.codebooks = reinterpret_cast<const float*>(packed + p.codebook_offset());
    build.entries = count;
    build.first_codebook = int(e % p.num_codebooks);
    build.num_codebooks = p.num_codebooks, build.vec_len = p.vec_len;
    build.used_entries = 1 << p.codebook_bits;
    FixedTables made[kTokens];
    for (int64_t t = 0; t < tokens; ++t) {
      build.x = x + t * x_stride + (g * p.group_vectors + e / p.num_codebooks) * p.vec_len;
      build.tables = tables + t * table_bytes;
      kernel.build(build, made[t]);
    }

    FixedGatherArgs gather{};
    gather.used_entries = build.used_entries;
    gather.scale_dtype = p.scale_dtype;
    const int64_t chunk_blocks = tokens == 1 ? block_end - block_begin : kChunkBlocks;
    for (int64_t chunk = block_begin; chunk < block_end; chunk += chunk_blocks) {
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t block = chunk; block < std::min(block_end, chunk + chunk_blocks); ++block) {
          const int64_t row = t * rows() + (block - block_begin) * kBlockRows;
          gather.codes = tile.blocks + block * tile.block_bytes;
          gather.next = t > 0 ? gather.codes
                        : block + ahead < block_end
                            ? gather.codes + ahead * tile.block_bytes
                            : next.blocks + (block + ahead - (block_end - block_begin)) * next.block_bytes;
          gather.scales = gather.codes + tile.codes_bytes;
          gather.partial = partial + row;
          gather.y = y + row;
          gather.tables = tables + t * table_bytes;
          gather.order = made[t].order;
          for (int i = 0; i < made[t].classes; ++i) {
            gather.entries = made[t].count[i];
            gather.step = made[t].step[i];
            gather.first = e == 0 && i == 0;
            gather.last = tile.last && i + 1 == made[t].classes;
            kernel.gather(gather);
            gather.tables += gather.entries * kernel.table_bytes;
            gather.order += gather.entries;
            gather.next += gather.entries * kBlockRows;
          }
        }
      }
    }
  }
};

}  // namespace

const FixedKernel* fixed_kernel([[maybe_unused]] const PackedLayout& p, [[maybe_unused]] Isa isa,
                                [[maybe_unused]] Accuracy accuracy) {
#if LUTGEMM_X86
  if (isa >= Isa::kAvx512Vbmi && p.code_bytes == 1) {
    // Errors grow with the number of codebooks, and with the norms of long centroids against typical products. With
    // trained codebooks relative errors passed 2e-2 at 8 bits and 1e-4 at 16 for the shapes that get more here.
    const int components = p.num_codebooks > 1 ? p.num_codebooks * p.vec_len : 0;
    if (accuracy == Accuracy::kFast) return components > 8 ? &kFixedVbmi14 : &kFixedVbmi8;
    if (accuracy == Accuracy::kAccurate) return &kFixedVbmi14;
    if (accuracy == Accuracy::kNearExact) return components > 16 ? nullptr : &kFixedVbmi16;
  }
#endif
  return nullptr;
}

void codegemm_fixed(const PackedLayout& p, const void* packed, const Io& io, Isa isa, const FixedKernel& kernel,
                    int64_t block_begin, int64_t block_end) {
  thread_local ThreadScratch kept;
  Scratch<uint8_t> large;
  const int64_t padded = p.J * p.vec_len, x_stride = aligned(padded);
  const int64_t table_floats = aligned(int64_t(p.tile_entries) * kernel.table_bytes / 4);
  for (int64_t m0 = 0; m0 < io.M; m0 += kTokens) {
    const int64_t tokens = std::min(kTokens, io.M - m0);
    const int64_t blocks = std::clamp<int64_t>(kSumFloats / (2 * tokens * kBlockRows), 1, block_end - block_begin);
    const int64_t sums = tokens * blocks * kBlockRows;
    const int64_t floats = tokens * (table_floats + x_stride) + 2 * sums;
    auto* tables = reinterpret_cast<float*>(kept.get(floats * int64_t(sizeof(float)), large));
    float* partial = tables + tokens * table_floats;
    float* y = partial + sums;
    float* x = y + sums;
    for (int64_t t = 0; t < tokens; ++t) {
      float* row = x + t * x_stride;
      load_floats(isa, io.dtype, static_cast<const char*>(io.x) + (m0 + t) * p.K * dtype_bytes(io.dtype), p.K, row);
      std::fill(row + p.K, row + padded, 0.0f);
    }
    for (int64_t block = block_begin; block < block_end; block += blocks) {
      const int64_t end = std::min(block_end, block + blocks);
      const FixedPass pass{p,        static_cast<const uint8_t*>(packed), kernel,  tokens, block, end, x,
                           x_stride, reinterpret_cast<uint8_t*>(tables),  partial, y};
      pass.run();
      const int64_t row0 = block * kBlockRows, row_end = std::min(p.N, end * kBlockRows);
      store_y(p, io, isa, m0, 1, int(tokens), row0, row_end - row0, pass.rows(), y);
    }
  }
}

}  // namespace lutgemm
