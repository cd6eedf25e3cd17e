// BCQ by look-ups of nibbles with AVX-512 BW (vpshufb), for CPUs without VBMI. Tables are those of AVX2.
#include "isa.h"
#if LUTGEMM_X86
#include <immintrin.h>

#include <cmath>

#include "byte_kernels.h"
#include "lut_avx512.h"

LUTGEMM_TARGET_AVX512_BEGIN
#include "byte_nibble.h"

namespace lutgemm::avx512 {
namespace {

struct Vector64 {
  using Bytes = __m512i;
  using Words = __m512i;
  using Floats = __m512;
  static constexpr int kBytes = 64;
  static constexpr int kPlanes = 2, kBlocks = 2;  // at once

  // Holds additions where they stand: GCC would rather spill sums and copy registers.
  static void keep(__m512i& v) { asm volatile("" : "+v"(v)); }

  struct ByteSum {
    __m512i sum, odd;  // of bytes as words, and of the odd bytes alone

    void clear() { sum = odd = _mm512_setzero_si512(); }
    void add(__m512i bytes) {
      sum = _mm512_add_epi16(sum, bytes);
      odd = _mm512_add_epi16(odd, _mm512_srli_epi16(bytes, 8));
      keep(sum);
      keep(odd);
    }
    void words(__m512i (&out)[2]) const {
      const __m512i even = _mm512_sub_epi16(sum, _mm512_slli_epi16(odd, 8));
      out[0] = _mm512_unpacklo_epi16(even, odd);
      out[1] = _mm512_unpackhi_epi16(even, odd);
    }
  };

  static __m512i load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static __m512i table(const uint8_t* p) {
    return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static __m512i low_nibbles(__m512i v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
  static __m512i high_nibbles(__m512i v) { return low_nibbles(_mm512_srli_epi16(v, 4)); }
  static __m512i look_up(__m512i table, __m512i index) { return _mm512_shuffle_epi8(table, index); }
  static __m512i set_bytes(uint8_t v) { return _mm512_set1_epi8(char(v)); }
  static __m512i add_bytes(__m512i a, __m512i b) { return _mm512_add_epi8(a, b); }
  static __m512i add_words(__m512i a, __m512i b) { return _mm512_add_epi16(a, b); }
  static void shifted(__m512i bytes, __m512i (&out)[2]) {
    out[0] = _mm512_unpacklo_epi8(_mm512_setzero_si512(), bytes);
    out[1] = _mm512_unpackhi_epi8(_mm512_setzero_si512(), bytes);
  }
  // 0x4B00 above a number is 2^23 + number in fp32.
  static void floats(const __m512i (&words)[2], float bias, __m512 (&out)[4]) {
    const __m512i exponent = _mm512_set1_epi16(0x4B00);
    const __m512 base = _mm512_set1_ps(8388608.0f + bias);
    for (int i = 0; i < 2; ++i) {
      out[2 * i] = _mm512_sub_ps(_mm512_castsi512_ps(_mm512_unpacklo_epi16(words[i], exponent)), base);
      out[2 * i + 1] = _mm512_sub_ps(_mm512_castsi512_ps(_mm512_unpackhi_epi16(words[i], exponent)), base);
    }
  }
  static __m512 set(float v) { return _mm512_set1_ps(v); }
  static __m512 load_floats(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, __m512 v) { _mm512_storeu_ps(p, v); }
  static __m512 load_scales(const void* data, DType dtype, int64_t index) { return load16(data, dtype, index); }
  static __m512 load_bytes(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
  static __m512 sub(__m512 a, __m512 b) { return _mm512_sub_ps(a, b); }
  static __m512 mul(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
  static __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
};

}  // namespace

void add_nibble_span(Accuracy accuracy, const ByteTask& task) { add_span_of<Vector64>(accuracy, task); }

}  // namespace lutgemm::avx512
LUTGEMM_TARGET_END
#endif
