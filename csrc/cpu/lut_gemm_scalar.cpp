// LUT-GEMM on any CPU, one token.
#include "lut_scalar.h"

namespace lutgemm::scalar {
namespace {

void nibble_sums(const float* x, float (&sums)[16]) {
  for (int e = 0; e < 16; ++e) {
    float term[4];
    for (int i = 0; i < 4; ++i) term[i] = (e >> i) & 1 ? x[i] : -x[i];
    sums[e] = (term[0] + term[1]) + (term[2] + term[3]);
  }
}

}  // namespace

// Table entry e of slice j: sum over i < 8 of (2 * bit i of e - 1) * x[8 * j + i], as the sum of its two nibbles' sums.
// So an entry costs one addition, as it does by doubling, and its error stays that of a tree of three additions.
void build_tables(const float* x, int64_t words, float* tables) {
  for (int64_t slice = 0; slice < words * kSlices; ++slice, x += 8, tables += kEntries) {
    float low[16], high[16];
    nibble_sums(x, low);
    nibble_sums(x + 4, high);
    for (int h = 0; h < 16; ++h) {
      for (int l = 0; l < 16; ++l) tables[h * 16 + l] = low[l] + high[h];
    }
  }
}

void lut_gemm_block(const PackedBcq& weight, int64_t row_block, const float* tables, const float* sums, float* y) {
  const int64_t rows = rows_in_block(weight, row_block);
  for (int64_t g = 0; g < weight.G; ++g) {
    const float* group_tables = tables + g * weight.words_per_group * kTableFloats;
    for (int64_t r = 0; r < rows; ++r) {
      y[r] = add_group(weight, weight.group(row_block, g), weight.words_in_group(g), r, group_tables, sums[g], y[r]);
    }
  }
}

}  // namespace lutgemm::scalar
