// The scales of one row block and group in byte_layout.h, as vectors of 16 rows. Included by AVX-512 files only.
#pragma once

#include <immintrin.h>

#include <cmath>

#include "byte_layout.h"
#include "lut_avx512.h"

LUTGEMM_TARGET_AVX512_BEGIN
namespace lutgemm::avx512 {

// 64 values of `dtype` from element `index`, in fp32.
[[gnu::always_inline]] inline void load64(const void* data, DType dtype, int64_t index, __m512 (&out)[kVectors]) {
  switch (dtype) {
    case DType::kFloat16:
#pragma GCC unroll 4
      for (int r = 0; r < kVectors; ++r) out[r] = load16(data, DType::kFloat16, index + r * kLanes);
      break;
    case DType::kBFloat16:
#pragma GCC unroll 4
      for (int r = 0; r < kVectors; ++r) out[r] = load16(data, DType::kBFloat16, index + r * kLanes);
      break;
    default:
#pragma GCC unroll 4
      for (int r = 0; r < kVectors; ++r) out[r] = load16(data, DType::kFloat32, index + r * kLanes);
  }
}

struct ByteScales {
  const uint8_t* data;
  int bits;
  bool uniform, has_offsets;
  DType dtype, zeros_dtype;

  ByteScales(const PackedBytes& weight, const uint8_t* scales)
      : data(scales),
        bits(weight.bits),
        uniform(weight.uniform),
        has_offsets(weight.has_offsets),
        dtype(weight.scale_dtype),
        zeros_dtype(weight.zeros_dtype) {}

  bool has_sum_term() const { return uniform || has_offsets; }

  // What dot[b] is multiplied by; uniform: before s.
  __m512 plane(int b, int r) const {
    if (uniform) return _mm512_set1_ps(std::ldexp(1.0f, bits - 2 - b));
    return load16(data, dtype, b * kByteRows + r * kLanes);
  }

  void plane(int b, __m512 (&out)[kVectors]) const {
    if (!uniform) return load64(data, dtype, b * kByteRows, out);
    for (auto& v : out) v = plane(b, 0);
  }

  // What the sum of x is multiplied by; uniform: before s.
  __m512 sum_term(int r) const {
    if (!uniform) return load16(data, dtype, bits * kByteRows + r * kLanes);
    const uint8_t* zeros = data + kByteRows * (dtype == DType::kFloat32 ? 4 : 2);
    const __m512 middle = _mm512_set1_ps(float((1 << bits) - 1) / 2);
    if (zeros_dtype != DType::kUInt8) return _mm512_sub_ps(middle, load16(zeros, zeros_dtype, r * kLanes));
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros + r * kLanes));
    return _mm512_sub_ps(middle, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(raw)));
  }

  void sum_term(__m512 (&out)[kVectors]) const {
    if (!uniform) return load64(data, dtype, bits * kByteRows, out);
    for (int r = 0; r < kVectors; ++r) out[r] = sum_term(r);
  }

  // y + t (uniform: y + s * t)
  __m512 finish(int r, __m512 t, __m512 y) const {
    return uniform ? _mm512_fmadd_ps(load16(data, dtype, r * kLanes), t, y) : _mm512_add_ps(y, t);
  }
};

// Two vectors of 32 unsigned 16-bit numbers, in the order of two unpacked vectors of bytes -> 64 rows of
// 2^23 + number, in fp32: 0x4B00 above a number is just that float.
inline void widen(__m512i low, __m512i high, __m512 (&rows)[kVectors]) {
  const __m512i exponent = _mm512_set1_epi16(0x4B00);
  rows[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low, exponent));
  rows[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low, exponent));
  rows[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(high, exponent));
  rows[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(high, exponent));
}

}  // namespace lutgemm::avx512
LUTGEMM_TARGET_END
