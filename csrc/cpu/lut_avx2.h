// AVX2 pieces of lut_gemm and biqgemm. Included by *_avx2.cpp only.
//
// A table of 16 sums of 4 activations is antisymmetric: entry 15 - e is minus entry e. The 8 entries whose bit 3 is set
// are one register, read by vpermps with the low 3 bits of an index, complemented where bit 3 is clear; then the sign
// is flipped. Entries are added in the same order as on AVX-512, so both give the same bits.
#pragma once

#include <immintrin.h>

#include <cmath>

#include "bcq.h"
#include "isa.h"

LUTGEMM_TARGET_AVX2_BEGIN
namespace lutgemm::avx2 {

constexpr int kLanes = 8;
constexpr int kSlices = 8;  // tables of one code word
constexpr int kTableFloats = kSlices * kLanes;

// 8 values of `dtype` from element `index`, in fp32.
inline __m256 load8(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::kFloat32) return _mm256_loadu_ps(static_cast<const float*>(data) + index);
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(data) + index));
  if (dtype == DType::kFloat16) return _mm256_cvtph_ps(raw);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}

// The scales of one group of a row block, in the order of bcq.h. `row` counts from the start of the block.
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
  __m256 start(int row, float sum) const {
    if (uniform) {
      const uint8_t* centers = data + kRowBlock * (dtype == DType::kFloat32 ? 4 : 2);
      return _mm256_mul_ps(load8(centers, DType::kFloat32, row), _mm256_set1_ps(sum));
    }
    if (!has_offsets) return _mm256_setzero_ps();
    return _mm256_mul_ps(load8(data, dtype, bits * kRowBlock + row), _mm256_set1_ps(sum));
  }

  // t + scale of plane b * dot
  __m256 add_plane(int b, int row, __m256 dot, __m256 t) const {
    const __m256 scale =
        uniform ? _mm256_set1_ps(std::ldexp(1.0f, bits - 2 - b)) : load8(data, dtype, b * kRowBlock + row);
    return _mm256_fmadd_ps(scale, dot, t);
  }

  // y + t (uniform: y + s * t)
  __m256 finish(int row, __m256 t, __m256 y) const {
    return uniform ? _mm256_fmadd_ps(load8(data, dtype, row), t, y) : _mm256_add_ps(y, t);
  }
};

// The code words of 8 rows, made ready for the half tables.
struct Indices {
  __m256i low;    // nibbles whose low 3 bits index the half table
  __m256i minus;  // nibbles whose bit 3 means minus

  explicit Indices(const uint32_t* words) {
    const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
    minus = _mm256_andnot_si256(word, _mm256_set1_epi32(int(0x88888888u)));
    low = _mm256_xor_si256(word, _mm256_sub_epi32(minus, _mm256_srli_epi32(minus, 3)));
  }

  // Sign bits of slice s.
  __m256 signs(int s) const {
    const __m256i top = _mm256_slli_epi32(minus, 28 - 4 * s);
    return _mm256_castsi256_ps(_mm256_and_si256(top, _mm256_set1_epi32(int(0x80000000u))));
  }
  __m256i entries(int s) const { return _mm256_srli_epi32(low, 4 * s); }
};

// dot[m][v] += sums of one code word of one plane, for kTokens tokens and kVectors vectors of rows. tables point at the
// 8 half tables of the word, `table_stride` floats from token to token.
template <int kTokens, int kVectors>
inline void add_word(const uint32_t* words, const float* tables, int64_t table_stride,
                     __m256 (&dot)[kTokens][kVectors]) {
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const Indices index(words + v * kLanes);
#pragma GCC unroll 8
    for (int s = 0; s < kSlices; ++s) {
      const __m256i entries = index.entries(s);
      const __m256 signs = index.signs(s);
#pragma GCC unroll 4
      for (int m = 0; m < kTokens; ++m) {
        const __m256 table = _mm256_load_ps(tables + m * table_stride + s * kLanes);
        dot[m][v] = _mm256_add_ps(dot[m][v], _mm256_xor_ps(_mm256_permutevar8x32_ps(table, entries), signs));
        asm volatile("" : "+x"(dot[m][v]));
      }
    }
  }
}

}  // namespace lutgemm::avx2
LUTGEMM_TARGET_END
