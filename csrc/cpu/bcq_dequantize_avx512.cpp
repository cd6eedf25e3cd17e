// One row of a BCQ weight in fp32, AVX-512: 16 bits of a plane's code word are the mask that picks +scale over -scale.
#include "isa.h"
#if LUTGEMM_X86
#include <immintrin.h>

#include "bcq.h"

LUTGEMM_TARGET_AVX512_BEGIN
namespace lutgemm::avx512 {

void dequantize_row(const DequantizeRow& row, float* out) {
  const int64_t words = (row.K + 31) / 32;
  for (int64_t g = 0; g < row.G; ++g) {
    const __m512 base = _mm512_set1_ps(row.base[g]);
    const __m512 unit = _mm512_set1_ps(row.unit ? row.unit[g] : 1.0f);
    __m512 plus[kMaxBits], minus[kMaxBits];
    for (int b = 0; b < row.bits; ++b) {
      plus[b] = _mm512_set1_ps(row.scales[b * row.G + g]);
      minus[b] = _mm512_sub_ps(_mm512_setzero_ps(), plus[b]);
    }
    const int64_t stop = g + 1 < row.G ? (g + 1) * row.words_per_group : words;
    for (int64_t w = g * row.words_per_group; w < stop; ++w) {
      __m512 low = base, high = base;
      for (int b = 0; b < row.bits; ++b) {
        const uint32_t code = row.codes[b][w];
        low = _mm512_add_ps(low, _mm512_mask_mov_ps(minus[b], __mmask16(code), plus[b]));
        high = _mm512_add_ps(high, _mm512_mask_mov_ps(minus[b], __mmask16(code >> 16), plus[b]));
      }
      if (row.unit) {
        low = _mm512_mul_ps(unit, low);
        high = _mm512_mul_ps(unit, high);
      }
      _mm512_storeu_ps(out + w * 32, low);
      _mm512_storeu_ps(out + w * 32 + 16, high);
    }
  }
}

}  // namespace lutgemm::avx512
LUTGEMM_TARGET_END
#endif
