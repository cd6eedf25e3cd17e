// AVX-512 pieces of lut_gemm and biqgemm. Included by *_avx512.cpp only.
//
// A table of 16 fp32 sums of 4 activations is one register. Code words are indices as they lie: vpermps reads the low 4
// bits of each of 16 rows' words, a shift by 4 brings up the next 4 k.
#pragma once

#include <immintrin.h>

#include <cmath>

#include "bcq.h"
#include "isa.h"

LUTGEMM_TARGET_AVX512_BEGIN
namespace lutgemm::avx512 {

constexpr int kLanes = 16;
constexpr int kVectors = int(kRowBlock) / kLanes;  // of a row block
constexpr int kSlices = 8;                         // tables of one code word
constexpr int kTableFloats = kSlices * kLanes;

// 16 values of `dtype` from element `index`, in fp32.
inline __m512 load16(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::kFloat16) {
    return _mm512_cvtph_ps(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(data) + index)));
  }
  if (dtype == DType::kBFloat16) {
    const __m256i raw =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(data) + index));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  }
  return _mm512_loadu_ps(static_cast<const float*>(data) + index);
}

// Sign bits that turn x0 .. x3 into +-x0 .. +-x3 of entry e: bit i of e set means +.
inline __m512 sign_of_bit(int bit) {
  const __m512i entry = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __mmask16 minus = _mm512_testn_epi32_mask(entry, _mm512_set1_epi32(1 << bit));
  return _mm512_castsi512_ps(_mm512_maskz_set1_epi32(minus, int(0x80000000u)));
}

// The scales of one group of a row block, in the order of bcq.h.
struct GroupScales {
  const uint8_t* data;
  int bits;
  bool uniform, has_offsets;
  DType dtype;

  GroupScales(const PackedBcq& weight, const uint8_t* group)
      : data(group),
        bits(weight.bits),
        uniform(weight.uniform),
        has_offsets(weight.has_offsets),
        dtype(weight.scale_dtype) {}

  // The term of the sum of x: offset (uniform: c) times sum.
  __m512 start(int r, float sum) const {
    if (uniform) {
      const uint8_t* centers = data + kRowBlock * (dtype == DType::kFloat32 ? 4 : 2);
      return _mm512_mul_ps(load16(centers, DType::kFloat32, r * kLanes), _mm512_set1_ps(sum));
    }
    if (!has_offsets) return _mm512_setzero_ps();
    return _mm512_mul_ps(load16(data, dtype, bits * kRowBlock + r * kLanes), _mm512_set1_ps(sum));
  }

  // t + scale of plane b * dot
  __m512 add_plane(int b, int r, __m512 dot, __m512 t) const {
    const __m512 scale =
        uniform ? _mm512_set1_ps(std::ldexp(1.0f, bits - 2 - b)) : load16(data, dtype, b * kRowBlock + r * kLanes);
    return _mm512_fmadd_ps(scale, dot, t);
  }

  // y + t (uniform: y + s * t)
  __m512 finish(int r, __m512 t, __m512 y) const {
    return uniform ? _mm512_fmadd_ps(load16(data, dtype, r * kLanes), t, y) : _mm512_add_ps(y, t);
  }
};

// sum + the entries of `table` that `index` picks, for vector r of rows. Odd vectors add by a multiplication with 1,
// which is exact and runs on execution ports that look-ups and additions leave idle. The empty asm keeps the addition
// where it stands: without it GCC does all look-ups of a code word first and spills them (1.5 times slower).
inline __m512 look_up_add(int r, __m512 table, __m512i index, __m512 sum) {
  const __m512 entries = _mm512_permutexvar_ps(index, table);
  sum = r % 2 ? _mm512_fmadd_ps(entries, _mm512_set1_ps(1.0f), sum) : _mm512_add_ps(sum, entries);
  asm volatile("" : "+v"(sum));
  return sum;
}

inline __m512i load_indices(const uint32_t* words, int r) { return _mm512_loadu_si512(words + r * kLanes); }

// The same words shifted right by `octet` bytes (what comes in from the next word lies above the bits that are read).
inline __m512i load_indices(const uint32_t* words, int r, int octet) {
  return _mm512_loadu_si512(reinterpret_cast<const uint8_t*>(words + r * kLanes) + octet);
}

}  // namespace lutgemm::avx512
LUTGEMM_TARGET_END
