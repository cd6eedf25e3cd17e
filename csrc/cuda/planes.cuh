// What bit_planes.cuh and dequant_gemm.cu share: reading a unit's scales and integers, and loading activations. The
// unit is drawn in bit_planes.cuh.
#pragma once

#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/problem.h"
#include "cuda/ptx.cuh"

namespace lutgemm::cuda {
namespace {

// Words from one slot of the scales part of a unit to the next, and of rows g, g + 8 in a slot.
__device__ __forceinline__ int slot_words(bool wide) { return wide ? 16 : 8; }
__device__ __forceinline__ int slot_row(bool wide, int g) { return wide ? 2 * g : g; }

// The numbers of rows g and g + 8 at slot_row of a slot.
__device__ __forceinline__ float2 pair_at(const uint32_t* at, bool wide) {
  if (wide) {
    const uint2 bits = load8(at);
    return make_float2(__uint_as_float(bits.x), __uint_as_float(bits.y));
  }
  const uint32_t bits = *at;
  return make_float2(__half2float(__ushort_as_half(static_cast<unsigned short>(bits & 0xffffu))),
                     __half2float(__ushort_as_half(static_cast<unsigned short>(bits >> 16))));
}

// Those of `slot`.
__device__ __forceinline__ float2 row_pair(const uint32_t* scales, bool wide, int slot, int g) {
  return pair_at(scales + slot * slot_words(wide) + slot_row(wide, g), wide);
}

// body(the words of rows g, g + 8, b) for the planes b of a unit; codes: the lane's first words. Few planes go without
// a loop, whose counters and addresses are a tenth of the work, if kUnrolled: it takes registers.
template <bool kUnrolled, typename Body>
__device__ __forceinline__ void for_planes(int bits, const uint32_t* codes, const Body& body) {
  const auto some = [&](auto count) {
#pragma unroll
    for (int b = 0; b < decltype(count)::value; ++b) body(load8(codes + b * 64), b);
  };
  if constexpr (kUnrolled) {
    switch (bits) {
      case 1:
        return some(std::integral_constant<int, 1>());
      case 2:
        return some(std::integral_constant<int, 2>());
      case 3:
        return some(std::integral_constant<int, 3>());
      case 4:
        return some(std::integral_constant<int, 4>());
    }
  }
#pragma unroll 1
  for (int b = 0; b < bits; ++b) body(load8(codes + b * 64), b);
}

constexpr int kLoadsOfX = 4;  // of a lane, under way together

// x[m, k .. k + 3] as it is stored, zeros past K; 16-bit types fill x and y. Apart from `as_four`, so that several
// loads are under way together: each waits for L2, some 250 clocks.
__device__ __forceinline__ uint4 load_four(const GpuIo& io, int64_t m, int64_t k) {
  const int64_t at = m * io.x_stride + k;
  const bool wide = io.dtype == DType::kFloat32;
  uint4 bits = make_uint4(0, 0, 0, 0);
  if (k + 4 <= io.K && io.x_stride % 8 == 0) {
    if (wide) {
      bits = load16(static_cast<const float*>(io.x) + at);
    } else {
      const uint2 pairs = load8(static_cast<const uint16_t*>(io.x) + at);
      bits.x = pairs.x, bits.y = pairs.y;
    }
    return bits;
  }
  uint32_t v[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (k + i < io.K) {
      v[i] = wide ? static_cast<const uint32_t*>(io.x)[at + i] : static_cast<const uint16_t*>(io.x)[at + i];
    }
  }
  return wide ? make_uint4(v[0], v[1], v[2], v[3]) : make_uint4(v[0] | v[1] << 16, v[2] | v[3] << 16, 0, 0);
}

__device__ __forceinline__ void as_four(DType dtype, uint4 bits, float (&v)[4]) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t half = (words[i / 2] >> (16 * (i % 2))) & 0xffffu;
    v[i] = dtype == DType::kFloat32    ? __uint_as_float(words[i])
           : dtype == DType::kBFloat16 ? __uint_as_float(half << 16)
                                       : __half2float(__ushort_as_half(static_cast<unsigned short>(half)));
  }
}

// Adds to v the field of kWidth bits that ends at bit kPlace of the integers, for all p.
template <int kWidth, int kPlace>
__device__ __forceinline__ void add_field(const uint32_t* words, int lane, uint32_t (&rows)[2][8]) {
#pragma unroll
  for (int w = 0; w < kWidth; ++w) {
    const uint2 word = load8(words + w * 64 + lane * 2);
#pragma unroll
    for (int u = 0; u < 8 / kWidth; ++u) {
      constexpr uint32_t kMask = 0x01010101u * (((1u << kWidth) - 1) << kPlace);
      const int left = kPlace - kWidth * u, p = w * (8 / kWidth) + u;
      rows[0][p] |= (left >= 0 ? word.x << (left >= 0 ? left : 0) : word.x >> (left < 0 ? -left : 0)) & kMask;
      rows[1][p] |= (left >= 0 ? word.y << (left >= 0 ? left : 0) : word.y >> (left < 0 ? -left : 0)) & kMask;
    }
  }
}

// The integers 0 .. 2^bits - 1 of rows g (0) and g + 8 (1) as A registers. The switch is uniform over the grid.
__device__ __forceinline__ void merged_registers(const uint32_t* words, int bits, int lane, uint32_t (&rows)[2][8]) {
#pragma unroll
  for (int p = 0; p < 8; ++p) rows[0][p] = rows[1][p] = 0;
  switch (bits) {
    case 1:
      return add_field<1, 0>(words, lane, rows);
    case 2:
      return add_field<2, 0>(words, lane, rows);
    case 3:
      add_field<2, 1>(words, lane, rows);
      return add_field<1, 0>(words + 2 * 64, lane, rows);
    case 4:
      return add_field<4, 0>(words, lane, rows);
    case 5:
      add_field<4, 1>(words, lane, rows);
      return add_field<1, 0>(words + 4 * 64, lane, rows);
    case 6:
      add_field<4, 2>(words, lane, rows);
      return add_field<2, 0>(words + 4 * 64, lane, rows);
    case 7:
      add_field<4, 3>(words, lane, rows);
      add_field<2, 1>(words + 4 * 64, lane, rows);
      return add_field<1, 0>(words + 6 * 64, lane, rows);
    default:
      return add_field<8, 0>(words, lane, rows);
  }
}

}  // namespace
}  // namespace lutgemm::cuda
