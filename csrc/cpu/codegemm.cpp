// CodeGEMM, the part that no instruction set changes: which tokens, rows and entries are done when.
#include <algorithm>

#include "codebook.h"
#include "codegemm_driver.h"
#include "codegemm_fixed.h"
#include "convert.h"
#include "isa.h"
#include "scratch.h"

namespace lutgemm {
namespace {

// fp32 sums of one pass over the weight, y and partial together: with the tables they should stay in L2.
constexpr int64_t kSumFloats = 128 << 10;

// Blocks whose codes stay in a cache while the second part of a tile's tables is looked up in.
constexpr int64_t kChunkBlocks = 8;

// Passes of a one-token kernel that share a tile of codes while it is in cache.
constexpr int kMaxPasses = 16;

// Codes are asked for this many blocks before their turn: far enough for DRAM, near enough to stay in L1.
constexpr int64_t kPrefetchBlocks = 2;

// The kernel for `tokens` more tokens. It may take fewer of them, or have room for more, which are then zeros.
// Thresholds: at 4096 x 4096, 2 bits, on a Zen 4 core, VBMI takes 0.4 ms a token, the 8-token kernel 2.5 ms at any
// number of tokens, the 16-token kernel 3.9 ms.
const CodegemmKernel& choose_kernel([[maybe_unused]] const PackedLayout& p, [[maybe_unused]] Isa isa,
                                    [[maybe_unused]] int64_t tokens) {
#if LUTGEMM_X86
  if (isa >= Isa::kAvx512) {
    if (isa >= Isa::kAvx512Vbmi && p.codebook_bits <= 8 && tokens <= 6) return kCodegemmVbmi;
    if (tokens > 8) return kCodegemmAvx512x16;
  }
  if (isa >= Isa::kAvx2) return tokens == 1 ? kCodegemmAvx2 : tokens <= 4 ? kCodegemmAvx2x4 : kCodegemmAvx2x8;
#endif
  return kCodegemmScalar;
}

// Tokens [m0, m0 + passes * width) -> x [passes][K padded to vectors][width], zero where there is none.
void load_x(const PackedLayout& p, const Io& io, Isa isa, int64_t m0, int width, int passes, float* row, float* x) {
  const int64_t padded = p.J * p.vec_len;
  const char* source = static_cast<const char*>(io.x);
  for (int64_t t = 0; t < int64_t(width) * passes; ++t) {
    float* out = x + t / width * padded * width + t % width;
    if (m0 + t < io.M) {
      load_floats(isa, io.dtype, source + (m0 + t) * p.K * dtype_bytes(io.dtype), p.K, row);
      std::fill(row + p.K, row + padded, 0.0f);
    } else {
      std::fill(row, row + padded, 0.0f);
    }
    for (int64_t k = 0; k < padded; ++k) out[k * width] = row[k];
  }
}

// What one thread works on at a time: a few tokens and a range of blocks, all of K.
struct Pass {
  const PackedLayout& p;
  const uint8_t* packed;
  const CodegemmKernel& kernel;
  int passes;
  int64_t block_begin, block_end;
  const float* x;  // [passes][K padded][width]
  float* tables;   // [kernel.entries][table_entries][width]
  float* partial;  // [passes][rows][width]
  float* y;        // [passes][rows][width]

  int64_t rows() const { return (block_end - block_begin) * kBlockRows; }

  void run() const {
    std::fill(y, y + passes * rows() * kernel.tokens, 0.0f);
    for (int64_t g = 0; g < p.G; ++g) {
      const int64_t entries = p.group_entries(g);
      for (int64_t e = 0; e < entries; e += p.tile_entries) {
        const int64_t in_tile = std::min<int64_t>(p.tile_entries, entries - e);
        for (int64_t s = 0; s < in_tile; s += kernel.entries) {
          const int count = int(std::min<int64_t>(kernel.entries, in_tile - s));
          for (int pass = 0; pass < passes; ++pass) add_entries(g, e, in_tile, s, count, pass);
        }
      }
    }
  }

  // Entries [s, s + count) of the tile that starts at entry e of group g.
  void add_entries(int64_t g, int64_t e, int64_t in_tile, int64_t s, int count, int pass) const {
    const int64_t entries = p.group_entries(g), width = kernel.tokens;
    BuildArgs build{};
    build.codebooks = reinterpret_cast<const float*>(packed + p.codebook_offset());
    build.x = x + pass * p.J * p.vec_len * width;
    build.first_entry = g * p.group_vectors * p.num_codebooks + e + s;
    build.entries = count;
    build.num_codebooks = p.num_codebooks, build.vec_len = p.vec_len;
    build.table_entries = p.table_entries, build.used_entries = 1 << p.codebook_bits;
    build.tables = tables;
    kernel.build(build);

    const bool tile_has_scales = e + in_tile == entries;
    const int64_t codes_bytes = in_tile * kBlockRows * p.code_bytes;
    const int64_t block_bytes = codes_bytes + (tile_has_scales ? kBlockRows * p.scale_bytes : 0);
    const uint8_t* tile = packed + p.group_offset(g) + p.blocks * kBlockRows * e * p.code_bytes;
    GatherArgs gather{};
    gather.table_entries = p.table_entries;
    gather.used_entries = 1 << p.codebook_bits;
    gather.code_bytes = p.code_bytes;
    gather.scale_dtype = p.scale_dtype;
    for (int64_t chunk = block_begin; chunk < block_end; chunk += kChunkBlocks) {
      for (int part = 0; part < count; part += kernel.gather_entries) {
        gather.entries = std::min(kernel.gather_entries, count - part);
        gather.tables = tables + int64_t(part) * p.table_entries * width;
        gather.first = e + s + part == 0;
        gather.last = e + s + part + gather.entries == entries;
        for (int64_t block = chunk; block < std::min(block_end, chunk + kChunkBlocks); ++block) {
          const uint8_t* at = tile + block * block_bytes;
          const int64_t row = pass * rows() + (block - block_begin) * kBlockRows;
          gather.codes = at + (s + part) * kBlockRows * p.code_bytes;
          gather.next_codes = gather.codes + kPrefetchBlocks * block_bytes;
          gather.scales = at + codes_bytes;
          gather.partial = partial + row * width;
          gather.y = y + row * width;
          kernel.gather(gather);
        }
      }
    }
  }
};

}  // namespace

void codegemm(const PackedLayout& p, const void* packed, const Io& io, Isa isa, Accuracy accuracy, int64_t block_begin,
              int64_t block_end) {
  if (const FixedKernel* kernel = fixed_kernel(p, isa, accuracy)) {
    codegemm_fixed(p, packed, io, isa, *kernel, block_begin, block_end);
    return;
  }
  thread_local ThreadScratch kept;
  Scratch<uint8_t> large;
  const int64_t padded = p.J * p.vec_len;
  for (int64_t m0 = 0, step = 0; m0 < io.M; m0 += step) {
    const CodegemmKernel& kernel = choose_kernel(p, isa, io.M - m0);
    const int width = kernel.tokens;
    const int passes = int(width > 1 ? 1 : std::min<int64_t>(io.M - m0, kMaxPasses));
    step = width * passes;

    const int64_t blocks = std::clamp<int64_t>(kSumFloats / (2 * step * kBlockRows), 1, block_end - block_begin);
    const int64_t sums = step * blocks * kBlockRows;
    const int64_t table_floats = int64_t(kernel.entries) * p.table_entries * width;
    const int64_t floats = table_floats + 2 * sums + aligned(padded * step) + padded;
    auto* tables = reinterpret_cast<float*>(kept.get(floats * int64_t(sizeof(float)), large));
    float* partial = tables + table_floats;
    float* y = partial + sums;
    float* x = y + sums;
    load_x(p, io, isa, m0, width, passes, x + aligned(padded * step), x);
    for (int64_t block = block_begin; block < block_end; block += blocks) {
      const int64_t end = std::min(block_end, block + blocks);
      const Pass pass{p, static_cast<const uint8_t*>(packed), kernel, passes, block, end, x, tables, partial, y};
      pass.run();
      const int64_t row0 = block * kBlockRows, row_end = std::min(p.N, end * kBlockRows);
      store_y(p, io, isa, m0, width, passes, row0, row_end - row0, pass.rows(), y);
    }
  }
}

}  // namespace lutgemm
