// BiQGEMM on any CPU: one row block, the groups of one tile, several tokens.
#include "lut_scalar.h"

namespace lutgemm::scalar {

void biqgemm_block(const PackedBcq& weight, int64_t row_block, int64_t begin, int64_t end, int64_t tokens,
                   const float* tables, int64_t table_stride, const float* sums, int64_t sum_stride, float* y) {
  const int64_t rows = rows_in_block(weight, row_block);
  for (int64_t g = begin; g < end; ++g) {
    const uint8_t* group = weight.group(row_block, g);
    const int64_t words = weight.words_in_group(g);
    const int64_t first = (g - begin) * weight.words_per_group * kTableFloats;
    for (int64_t m = 0; m < tokens; ++m) {
      const float* group_tables = tables + m * table_stride + first;
      const float sum = sums[m * sum_stride + g - begin];
      for (int64_t r = 0; r < rows; ++r) {
        float& out = y[m * kRowBlock + r];
        out = add_group(weight, group, words, r, group_tables, sum, out);
      }
    }
  }
}

}  // namespace lutgemm::scalar
