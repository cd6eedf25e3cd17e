// BiQGEMM by 6 signs at a time from plain codes, and the tables that AVX-512 VBMI reads as well.
#include "isa.h"
#if LUTGEMM_X86
#include "byte_kernels.h"
#include "byte_scales_avx512.h"

LUTGEMM_TARGET_AVX512_BEGIN
namespace lutgemm {
namespace {

inline __m512i load_codes(const uint8_t* codes) { return _mm512_loadu_si512(codes); }

}  // namespace
}  // namespace lutgemm

#include "byte_words.h"

namespace lutgemm::avx512 {

void build_word_tables(const float* x, int64_t slices, const SpanSums& sums, int16_t* tables, float* step) {
  const int64_t look_ups = word_look_ups(slices);
  const float inverse = inverse_step(32767.0f - float(look_ups), sums.total, step);

  // Entry h * 16 + l = +-x0 +-x1 +-x2 +-x3 by the bits of l, +-x4 +-x5 by those of h.
  const __m512 sign[4] = {sign_of_bit(0), sign_of_bit(1), sign_of_bit(2), sign_of_bit(3)};
  for (int64_t j = 0; j < look_ups; ++j, x += 6, tables += kWordEntries) {
    __m512 term[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) term[i] = _mm512_xor_ps(_mm512_set1_ps(x[i] * inverse), sign[i]);
    const __m512 low = _mm512_add_ps(_mm512_add_ps(term[0], term[1]), _mm512_add_ps(term[2], term[3]));
    const __m512 high = _mm512_add_ps(_mm512_xor_ps(_mm512_set1_ps(x[4] * inverse), sign[0]),
                                      _mm512_xor_ps(_mm512_set1_ps(x[5] * inverse), sign[1]));
#pragma GCC unroll 4
    for (int h = 0; h < 4; ++h) {
      const __m512 sum = _mm512_add_ps(low, _mm512_permutexvar_ps(_mm512_set1_epi32(h), high));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(tables + h * kLanes),
                          _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(sum)));
    }
  }
}

void add_word_span(const WordTask& task) { add_words(task); }

}  // namespace lutgemm::avx512
LUTGEMM_TARGET_END
#endif
