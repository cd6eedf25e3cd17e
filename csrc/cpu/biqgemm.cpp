// BiQGEMM (SC 2020): the tables of a tile of K are built for several tokens and stay in L1 while all row blocks and
// planes read them. y is kept in fp32 from tile to tile.
#include <algorithm>
#include <cstring>

#include "bcq.h"
#include "convert.h"

namespace lutgemm {
namespace {

// Row blocks whose y [8 tokens][64] fp32 stay in L2 (128 KiB) from tile to tile.
constexpr int64_t kRowBlocksAtOnce = 64;

struct Tile {
  Scratch<float> x, tables, sums, y;
  int64_t groups;        // of a tile
  int64_t words;         // of a full tile
  int64_t table_stride;  // floats from token to token
};

Tile make_tile(const PackedBcq& weight, const LutKernels& kernels, int64_t tokens, int64_t row_blocks) {
  const int64_t group_bytes = weight.words_per_group * kernels.table_floats * int64_t(sizeof(float)) * tokens;
  Tile tile;
  tile.groups = std::min(weight.G, std::max<int64_t>(1, kernels.tile_bytes / group_bytes));
  tile.words = std::min(weight.words, tile.groups * weight.words_per_group);
  tile.table_stride = tile.words * kernels.table_floats;
  tile.x = make_scratch<float>(tile.words * 32);
  tile.tables = make_scratch<float>(tokens * tile.table_stride);
  tile.sums = make_scratch<float>(tokens * tile.groups);
  tile.y = make_scratch<float>(row_blocks * tokens * kRowBlock);
  return tile;
}

// Tables and sums of groups [begin, end) for tokens m0 .. m0 + tokens - 1.
void build_tile(const PackedBcq& weight, Isa isa, const LutKernels& kernels, const Io& io, int64_t m0, int64_t tokens,
                int64_t begin, int64_t end, Tile& tile) {
  const int64_t first = begin * weight.words_per_group * 32;
  const int64_t words = std::min(weight.words, end * weight.words_per_group) - begin * weight.words_per_group;
  const int64_t count = std::min(weight.K - first, words * 32);
  for (int64_t m = 0; m < tokens; ++m) {
    const auto* source = static_cast<const uint8_t*>(io.x) + ((m0 + m) * weight.K + first) * dtype_bytes(io.dtype);
    float* x = tile.x.get();
    load_floats(isa, io.dtype, source, count, x);
    std::memset(x + count, 0, size_t(words * 32 - count) * sizeof(float));
    kernels.build_tables(x, words, tile.tables.get() + m * tile.table_stride);
    for (int64_t g = begin; g < end; ++g) {
      const float* group_x = x + (g - begin) * weight.words_per_group * 32;
      tile.sums[size_t(m * tile.groups + g - begin)] = group_sum(group_x, weight.words_in_group(g));
    }
  }
}

}  // namespace

void biqgemm_rows(const PackedBcq& weight, Isa isa, const Io& io, int64_t begin, int64_t end) {
  const LutKernels& kernels = lut_kernels(isa);
  const int64_t most = std::min(io.M, kernels.tile_tokens);
  if (most == 0 || begin >= end) return;
  Tile tile = make_tile(weight, kernels, most, std::min(end - begin, kRowBlocksAtOnce));
  for (int64_t block0 = begin; block0 < end; block0 += kRowBlocksAtOnce) {
    const int64_t blocks = std::min(end - block0, kRowBlocksAtOnce);
    for (int64_t m0 = 0; m0 < io.M; m0 += most) {
      const int64_t tokens = std::min(io.M - m0, most);
      std::memset(tile.y.get(), 0, size_t(blocks * tokens * kRowBlock) * sizeof(float));
      for (int64_t g = 0; g < weight.G; g += tile.groups) {
        const int64_t stop = std::min(weight.G, g + tile.groups);
        build_tile(weight, isa, kernels, io, m0, tokens, g, stop, tile);
        for (int64_t i = 0; i < blocks; ++i) {
          kernels.biqgemm_block(weight, block0 + i, g, stop, tokens, tile.tables.get(), tile.table_stride,
                                tile.sums.get(), tile.groups, tile.y.get() + i * tokens * kRowBlock);
        }
      }
      for (int64_t i = 0; i < blocks; ++i) {
        for (int64_t m = 0; m < tokens; ++m) {
          write_row_block(weight.N, isa, io, m0 + m, block0 + i, tile.y.get() + (i * tokens + m) * kRowBlock);
        }
      }
    }
  }
}

}  // namespace lutgemm
