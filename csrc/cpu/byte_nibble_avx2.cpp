// BCQ by look-ups of nibbles with AVX2 (vpshufb), and the tables that AVX-512 reads as well.
#include "isa.h"
#if LUTGEMM_X86
#include <immintrin.h>

#include <cmath>

#include "byte_kernels.h"
#include "lut_avx2.h"

LUTGEMM_TARGET_AVX2_BEGIN
#include "byte_nibble.h"

namespace lutgemm::avx2 {
namespace {

struct Vector32 {
  using Bytes = __m256i;
  using Words = __m256i;
  using Floats = __m256;
  static constexpr int kBytes = 32;
  // At once. Sums and tables of two planes do not fit 16 registers, but sharing a table's loads saves more than
  // spilling a few sums costs (6 % on Zen 4).
  static constexpr int kPlanes = 2, kBlocks = 1;

  // Holds additions where they stand: GCC would rather spill sums and copy registers.
  static void keep(__m256i& v) { asm volatile("" : "+x"(v)); }

  struct ByteSum {
    __m256i sum, odd;  // of bytes as words, and of the odd bytes alone

    void clear() { sum = odd = _mm256_setzero_si256(); }
    void add(__m256i bytes) {
      sum = _mm256_add_epi16(sum, bytes);
      odd = _mm256_add_epi16(odd, _mm256_srli_epi16(bytes, 8));
      keep(sum);
      keep(odd);
    }
    void words(__m256i (&out)[2]) const {
      const __m256i even = _mm256_sub_epi16(sum, _mm256_slli_epi16(odd, 8));
      out[0] = _mm256_unpacklo_epi16(even, odd);
      out[1] = _mm256_unpackhi_epi16(even, odd);
    }
  };

  static __m256i load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static __m256i table(const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static __m256i low_nibbles(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
  static __m256i high_nibbles(__m256i v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }
  static __m256i look_up(__m256i table, __m256i index) { return _mm256_shuffle_epi8(table, index); }
  static __m256i set_bytes(uint8_t v) { return _mm256_set1_epi8(char(v)); }
  static __m256i add_bytes(__m256i a, __m256i b) { return _mm256_add_epi8(a, b); }
  static __m256i add_words(__m256i a, __m256i b) { return _mm256_add_epi16(a, b); }
  static void shifted(__m256i bytes, __m256i (&out)[2]) {
    out[0] = _mm256_unpacklo_epi8(_mm256_setzero_si256(), bytes);
    out[1] = _mm256_unpackhi_epi8(_mm256_setzero_si256(), bytes);
  }
  // 0x4B00 above a number is 2^23 + number in fp32.
  static void floats(const __m256i (&words)[2], float bias, __m256 (&out)[4]) {
    const __m256i exponent = _mm256_set1_epi16(0x4B00);
    const __m256 base = _mm256_set1_ps(8388608.0f + bias);
    for (int i = 0; i < 2; ++i) {
      out[2 * i] = _mm256_sub_ps(_mm256_castsi256_ps(_mm256_unpacklo_epi16(words[i], exponent)), base);
      out[2 * i + 1] = _mm256_sub_ps(_mm256_castsi256_ps(_mm256_unpackhi_epi16(words[i], exponent)), base);
    }
  }
  static __m256 set(float v) { return _mm256_set1_ps(v); }
  static __m256 load_floats(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, __m256 v) { _mm256_storeu_ps(p, v); }
  static __m256 load_scales(const void* data, DType dtype, int64_t index) { return load8(data, dtype, index); }
  static __m256 load_bytes(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static __m256 add(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
  static __m256 sub(__m256 a, __m256 b) { return _mm256_sub_ps(a, b); }
  static __m256 mul(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
  static __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
};

// The sum of 8 lanes, in one fixed order.
inline float lane_sum(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// -0.0 where bit `bit` of the lane's number is clear.
inline __m256 minus_unless(int bit) {
  const __m256i clear = _mm256_andnot_si256(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(1 << bit));
  return _mm256_castsi256_ps(_mm256_slli_epi32(clear, 31 - bit));
}

}  // namespace

SpanSums nibble_span_sums(const float* x, int64_t slices) {
  __m256 sum = _mm256_setzero_ps(), total = sum, largest = sum;
  for (int64_t j = 0; j < slices; ++j, x += 8) {
    const __m256 v = _mm256_loadu_ps(x), size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v);
    sum = _mm256_add_ps(sum, v);
    total = _mm256_add_ps(total, size);
    __m256 nibble = _mm256_add_ps(size, _mm256_permute_ps(size, 0x4E));
    nibble = _mm256_add_ps(nibble, _mm256_permute_ps(nibble, 0xB1));
    largest = _mm256_max_ps(largest, nibble);
  }
  const float all = lane_sum(total);
  const __m128 most = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps(largest, 1));
  return {lane_sum(sum), all, _mm_cvtss_f32(most) + all * 0.0f};
}

// Entry e = +-x0 +-x1 +-x2 +-x3 by the bits of e: 8 entries with x3 subtracted, 8 with it added.
void build_nibble_tables(Accuracy accuracy, const float* x, int64_t slices, const SpanSums& sums, uint8_t* tables,
                         float* step) {
  const float inverse = nibble_step(accuracy, slices, sums, step);
  const __m256 sign[3] = {minus_unless(0), minus_unless(1), minus_unless(2)};
  const __m256i bias = _mm256_set1_epi16(accuracy == Accuracy::kFast       ? 0x80
                                         : accuracy == Accuracy::kAccurate ? 0
                                                                           : -32768);
  // Words of entries 0-3 8-11, 4-7 12-15 -> their low bytes, then their high bytes; then both in order.
  const __m256i bytes = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,  //
                                         0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t nibble = 0; nibble < 2 * slices; ++nibble, x += 4) {
    __m256 t[3];
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) t[i] = _mm256_xor_ps(_mm256_set1_ps(x[i] * inverse), sign[i]);
    const __m256 three = _mm256_add_ps(_mm256_add_ps(t[0], t[1]), t[2]), fourth = _mm256_set1_ps(x[3] * inverse);
    const __m256i below = _mm256_cvtps_epi32(_mm256_sub_ps(three, fourth));
    const __m256i above = _mm256_cvtps_epi32(_mm256_add_ps(three, fourth));
    const __m256i words = _mm256_xor_si256(_mm256_packs_epi32(below, above), bias);
    const __m256i planes = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(words, bytes), in_order);
    if (accuracy == Accuracy::kFast) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(tables + 16 * nibble), _mm256_castsi256_si128(planes));
    } else {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(tables + 32 * nibble), planes);
    }
  }
}

void add_nibble_span(Accuracy accuracy, const ByteTask& task) { add_span_of<Vector32>(accuracy, task); }

}  // namespace lutgemm::avx2
LUTGEMM_TARGET_END
#endif
