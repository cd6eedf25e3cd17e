// One row of a BCQ weight in fp32, AVX2: the bit of each k is moved to the sign position, where a clear bit flips
// +scale.
#include "isa.h"
#if LUTGEMM_X86
#include <immintrin.h>

#include "bcq.h"

LUTGEMM_TARGET_AVX2_BEGIN
namespace lutgemm::avx2 {

void dequantize_row(const DequantizeRow& row, float* out) {
  const int64_t words = (row.K + 31) / 32;
  const __m256i top = _mm256_set1_epi32(int(0x80000000u));
  const __m256i to_top = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
  for (int64_t g = 0; g < row.G; ++g) {
    const __m256 base = _mm256_set1_ps(row.base[g]);
    const __m256 unit = _mm256_set1_ps(row.unit ? row.unit[g] : 1.0f);
    const int64_t stop = g + 1 < row.G ? (g + 1) * row.words_per_group : words;
    for (int64_t w = g * row.words_per_group; w < stop; ++w) {
      __m256 value[4] = {base, base, base, base};
      for (int b = 0; b < row.bits; ++b) {
        const __m256 scale = _mm256_set1_ps(row.scales[b * row.G + g]);
        for (int i = 0; i < 4; ++i) {
          const __m256i code = _mm256_set1_epi32(int(row.codes[b][w] >> (8 * i)));
          const __m256i minus = _mm256_andnot_si256(_mm256_sllv_epi32(code, to_top), top);
          value[i] = _mm256_add_ps(value[i], _mm256_xor_ps(scale, _mm256_castsi256_ps(minus)));
        }
      }
      for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(out + w * 32 + i * 8, row.unit ? _mm256_mul_ps(unit, value[i]) : value[i]);
      }
    }
  }
}

}  // namespace lutgemm::avx2
LUTGEMM_TARGET_END
#endif
