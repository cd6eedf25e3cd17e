// A unit of bit_planes.cuh, 16 rows x 128 columns, as fp16 A registers of 8 products of 16 columns each: shared by the
// mma.sync kernel of dequant_gemm.cu and the wgmma kernel of wgmma_gemm.cu.
//
// Lane (g, t) has columns 16p + 4t + i, i = 0 .. 3, of rows g and g + 8, p = 0 .. 7. In a word of codes, byte i holds
// them, so that i = 0 and 2, or 1 and 3, lie 16 bits apart and are masked together where they are:
//
//   a[p][0] = W[g][i = 0, 2]   a[p][1] = W[g + 8][i = 0, 2]   a[p][2] = W[g][i = 1, 3]   a[p][3] = W[g + 8][i = 1, 3]
//
// fp16 whose bits 11 .. 15 are 0 is its bits as an integer * 2^-24. So a field whose lowest bit is bit q of its byte
// is, without a conversion, moved to bit q + 3 and masked,
//
//   half((word << 3 or word >> 5) & mask) = field * 2^(q - 21)
//
// and a plane takes two instructions for two weights, an AND and an fma. What depends on p by powers of two stays in
// the register, and its inverse is put into the activations:
//
//   register = W / row_scale * 2^(exponent(p) - 15)      activation = x / token_scale * 2^-exponent(p)
//
// A plane's exponent is p, that of integers in fields of 2 and 4 bits 2p % 8 and 4p % 8. Integers of 3, 5, 6, 7, 8 bits
// are put together in bytes first (planes.cuh), and their exponent is 0. row_scale brings the largest |W| of a row to
// 2^7 .. 2^8 (gpu_layouts/bit_planes.py): scales are then below 2^16, and what is lost below fp16's range is 2^-17 of
// the largest W of a row.
//
// Instructions are counted in wgmma_gemm.cu.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/bit_planes.h"
#include "cuda/planes.cuh"

namespace lutgemm::cuda {

// Bits of the fields that are masked where they lie; 8: bytes.
LUTGEMM_ANYWHERE inline int field_width(const BitPlanesProblem& w) {
  return !w.merged ? 1 : w.bits == 1 || w.bits == 2 || w.bits == 4 ? w.bits : 8;
}

// Of a row: what dequantize_unit takes.
constexpr float kInverseUnit = 128.0f;

// What a sum of registers * activations lacks besides row_scale and token_scale.
constexpr float kRegisterUnit = 32768.0f;

namespace {

// The bits as they are. (Put together from two halves they would cost two more instructions.)
__device__ __forceinline__ __half2 half_pair(uint32_t bits) {
  __half2 pair;
  memcpy(&pair, &bits, sizeof(pair));
  return pair;
}

__device__ __forceinline__ uint32_t pair_bits(__half2 pair) {
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

__device__ __forceinline__ float2 times(float2 a, float2 b) { return make_float2(a.x * b.x, a.y * b.y); }

// For rows g (low half) and g + 8 (high half). HFMA2 broadcasts either half by itself.
__device__ __forceinline__ __half2 both_rows(float2 values, float factor) {
  return __floats2half2_rn(values.x * factor, values.y * factor);
}

template <int kRow>
__device__ __forceinline__ __half2 of_row(__half2 rows) {
  return kRow == 0 ? __low2half2(rows) : __high2half2(rows);
}

__device__ __forceinline__ __half2 power_pair(int exponent) {
  return __float2half2_rn(__int_as_float((127 + exponent) << 23));
}

// The scales part of a unit for a lane: rows g and g + 8, in the step that has columns 32t .. 32t + 31 of the chunk. So
// the lanes of a quad share the work for several steps, and pass each other the results.
struct UnitScales {
  const uint32_t* own;
  int slot_words, steps;
  bool wide;

  __device__ __forceinline__ UnitScales(const BitPlanesProblem& w, const uint32_t* unit, int lane)
      : steps(w.steps), wide(w.wide) {
    slot_words = w.wide ? 16 : 8;
    const int step = lane % 4 * steps / 4;
    own = unit + 64 * w.bits + step * w.slots() * slot_words + lane / 4 * (w.wide ? 2 : 1);
  }

  __device__ __forceinline__ float2 read(int slot) const { return row_pair(own + slot * slot_words, wide, 0, 0); }

  // all[s]: of columns 32s .. 32s + 31. The branch is uniform over the grid.
  __device__ __forceinline__ void spread(__half2 mine, __half2 (&all)[4]) const {
    if (steps == 1) {
      all[0] = all[1] = all[2] = all[3] = mine;
      return;
    }
#pragma unroll
    for (int s = 0; s < 4; ++s) all[s] = half_pair(__shfl_sync(kFullMask, pair_bits(mine), s, 4));
  }
};

// The two registers of a word for fields of kWidth bits at bit kAt of its bytes.
template <int kWidth, int kAt>
__device__ __forceinline__ void masked(uint32_t up3, uint32_t down5, __half2 (&fields)[2]) {
  constexpr uint32_t kMask = 0x00010001u * (((1u << kWidth) - 1) << (kAt + 3));
  fields[0] = half_pair(up3 & kMask);
  fields[1] = half_pair(down5 & kMask);
}

// A word of each of the two rows, moved to where its fields are masked.
struct MovedWords {
  uint32_t up3[2], down5[2];

  __device__ __forceinline__ explicit MovedWords(uint2 words)
      : up3{words.x << 3, words.y << 3}, down5{words.x >> 5, words.y >> 5} {}
};

// registers of p and kRow (+)= bit p * factor
template <int kP, int kRow, bool kFirst>
__device__ __forceinline__ void add_bits(const MovedWords& words, __half2 factor, uint32_t (&a)[8][4]) {
  __half2 bits[2];
  masked<1, kP>(words.up3[kRow], words.down5[kRow], bits);
#pragma unroll
  for (int odd = 0; odd < 2; ++odd) {
    uint32_t& sum = a[kP][kRow + 2 * odd];
    sum = pair_bits(kFirst ? __hmul2(bits[odd], of_row<kRow>(factor))
                           : __hfma2(bits[odd], of_row<kRow>(factor), half_pair(sum)));
  }
}

template <int kP, bool kFirst>
__device__ __forceinline__ void add_bits(const MovedWords& words, const __half2 (&factors)[4], uint32_t (&a)[8][4]) {
  add_bits<kP, 0, kFirst>(words, factors[kP / 2], a), add_bits<kP, 1, kFirst>(words, factors[kP / 2], a);
}

// shift is of p = 7: the smallest power keeps all its bits.
template <int kP>
__device__ __forceinline__ void add_shift(const __half2 (&shifts)[4], uint32_t (&a)[8][4]) {
  const __half2 shift = shifts[kP / 2];
#pragma unroll
  for (int odd = 0; odd < 2; ++odd) {
    a[kP][2 * odd] = pair_bits(__hfma2(of_row<0>(shift), power_pair(kP - 7), half_pair(a[kP][2 * odd])));
    a[kP][2 * odd + 1] = pair_bits(__hfma2(of_row<1>(shift), power_pair(kP - 7), half_pair(a[kP][2 * odd + 1])));
  }
}

// register of p = sum over b of bit_b * 2^(p - 21) * (2^7 s_b / row_scale)
//                 + 2^(p - 7) * 2^-8 (offset - sum of s_b) / row_scale               inverse: 2^7 / row_scale, both
//                 rows
//
// The last plane, which has the smallest scale, comes first, and the first one after the second term: sums rounded on
// the way stay small.
__device__ __forceinline__ void dequantize_planes(const BitPlanesProblem& w, const uint32_t* unit, int lane,
                                                  float2 inverse, uint32_t (&a)[8][4]) {
  const UnitScales scales(w, unit, lane);
  const uint32_t* codes = unit + lane * 2;
  float2 rest = make_float2(0.0f, 0.0f);
  const auto add_rest = [&](int slot, float sign) {
    const float2 term = scales.read(slot);
    rest.x += sign * term.x, rest.y += sign * term.y;
    return term;
  };
  const auto plane = [&](int b, auto first) {
    constexpr bool kFirst = decltype(first)::value;
    const MovedWords words(load8(codes + 64 * b));
    __half2 factors[4];
    scales.spread(both_rows(times(add_rest(b, -1.0f), inverse), 1.0f), factors);
    add_bits<0, kFirst>(words, factors, a), add_bits<1, kFirst>(words, factors, a);
    add_bits<2, kFirst>(words, factors, a), add_bits<3, kFirst>(words, factors, a);
    add_bits<4, kFirst>(words, factors, a), add_bits<5, kFirst>(words, factors, a);
    add_bits<6, kFirst>(words, factors, a), add_bits<7, kFirst>(words, factors, a);
  };
  plane(w.bits - 1, std::true_type{});
#pragma unroll 1
  for (int b = w.bits - 2; b > 0; --b) plane(b, std::false_type{});

  if (w.bits > 1) add_rest(0, -1.0f);
  if (w.has_offsets) add_rest(w.bits, 1.0f);
  __half2 shifts[4];
  scales.spread(both_rows(times(rest, inverse), 0x1p-15f), shifts);
  add_shift<0>(shifts, a), add_shift<1>(shifts, a), add_shift<2>(shifts, a), add_shift<3>(shifts, a);
  add_shift<4>(shifts, a), add_shift<5>(shifts, a), add_shift<6>(shifts, a), add_shift<7>(shifts, a);
  if (w.bits > 1) plane(0, std::false_type{});
}

// W = s * integer - s * zero: s times 2^kFactor and -s * zero times 2^kShift, over row_scale. inverse as above.
template <int kFactor, int kShift>
__device__ __forceinline__ void read_uniform(const UnitScales& scales, float2 inverse, __half2 (&factors)[4],
                                             __half2 (&shifts)[4]) {
  const float2 scale = times(scales.read(0), inverse), zero = scales.read(1);
  scales.spread(both_rows(scale, __int_as_float((120 + kFactor) << 23)), factors);
  scales.spread(both_rows(times(scale, zero), -__int_as_float((120 + kShift) << 23)), shifts);
}

// Integers of kWidth = 1, 2 or 4 bits in one field: p of them.
template <int kWidth, int kP>
__device__ __forceinline__ void set_fields(const uint32_t* words, const __half2 (&factors)[4],
                                           const __half2 (&shifts)[4], uint32_t (&a)[8][4]) {
  constexpr int kAt = kWidth * kP % 8;
  const MovedWords moved(load8(words + kWidth * kP / 8 * 64));
  const __half2 factor = factors[kP / 2], shift = __hmul2(shifts[kP / 2], power_pair(kAt - 7));
  __half2 top[2], bottom[2];
  masked<kWidth, kAt>(moved.up3[0], moved.down5[0], top);
  masked<kWidth, kAt>(moved.up3[1], moved.down5[1], bottom);
#pragma unroll
  for (int odd = 0; odd < 2; ++odd) {
    a[kP][2 * odd] = pair_bits(__hfma2(top[odd], of_row<0>(factor), of_row<0>(shift)));
    a[kP][2 * odd + 1] = pair_bits(__hfma2(bottom[odd], of_row<1>(factor), of_row<1>(shift)));
  }
}

template <int kWidth>
__device__ __forceinline__ void dequantize_fields(const BitPlanesProblem& w, const uint32_t* unit, int lane,
                                                  float2 inverse, uint32_t (&a)[8][4]) {
  __half2 factors[4], shifts[4];
  read_uniform<6, -8>(UnitScales(w, unit, lane), inverse, factors, shifts);
  const uint32_t* words = unit + lane * 2;
  set_fields<kWidth, 0>(words, factors, shifts, a), set_fields<kWidth, 1>(words, factors, shifts, a);
  set_fields<kWidth, 2>(words, factors, shifts, a), set_fields<kWidth, 3>(words, factors, shifts, a);
  set_fields<kWidth, 4>(words, factors, shifts, a), set_fields<kWidth, 5>(words, factors, shifts, a);
  set_fields<kWidth, 6>(words, factors, shifts, a), set_fields<kWidth, 7>(words, factors, shifts, a);
}

// Integers of any number of bits, put together in bytes.
__device__ __forceinline__ void dequantize_bytes(const BitPlanesProblem& w, const uint32_t* unit, int lane,
                                                 float2 inverse, uint32_t (&a)[8][4]) {
  uint32_t rows[2][8];
  merged_registers(unit, w.bits, lane, rows);
  __half2 factors[4], shifts[4];
  read_uniform<9, -15>(UnitScales(w, unit, lane), inverse, factors, shifts);
#pragma unroll
  for (int p = 0; p < 8; ++p) {
    const __half2 factor = factors[p / 2], shift = shifts[p / 2];
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const __half2 top = half_pair((rows[0][p] >> 8 * odd) & 0x00ff00ffu);
      const __half2 bottom = half_pair((rows[1][p] >> 8 * odd) & 0x00ff00ffu);
      a[p][2 * odd] = pair_bits(__hfma2(top, of_row<0>(factor), of_row<0>(shift)));
      a[p][2 * odd + 1] = pair_bits(__hfma2(bottom, of_row<1>(factor), of_row<1>(shift)));
    }
  }
}

__device__ __forceinline__ void dequantize_merged(const BitPlanesProblem& w, const uint32_t* unit, int lane,
                                                  float2 inverse, uint32_t (&a)[8][4]) {
  switch (w.bits) {
    case 1:
      return dequantize_fields<1>(w, unit, lane, inverse, a);
    case 2:
      return dequantize_fields<2>(w, unit, lane, inverse, a);
    case 4:
      return dequantize_fields<4>(w, unit, lane, inverse, a);
    default:
      return dequantize_bytes(w, unit, lane, inverse, a);
  }
}

template <bool kMerged>
__device__ __forceinline__ void dequantize_unit(const BitPlanesProblem& w, const uint32_t* unit, int lane,
                                                float2 inverse, uint32_t (&a)[8][4]) {
  if constexpr (kMerged) {
    dequantize_merged(w, unit, lane, inverse, a);
  } else {
    dequantize_planes(w, unit, lane, inverse, a);
  }
}

}  // namespace
}  // namespace lutgemm::cuda
