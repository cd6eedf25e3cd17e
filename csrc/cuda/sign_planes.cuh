// The kernel of sign_planes.cu (free and ratio kinds) and sign_integers.cu (uniform kind).
//
//   y[m, n] = sum over groups of   sum over b of s_b * (sum over k of (2 bit_b - 1) * x)   + offset * sum of x
//   uniform:                       s * (sum over k of integer * x                            - zero * sum of x)
//
// The sums over k are fp16 mma with fp32 sums of exact products. The unit is that of bit_planes.cuh.
//
//   x[m, k] = step * u, u fp16, or step * (u + v), u and v fp16          step a power of two
//
// One step for each token and chunk of 128 columns brings the largest |u| to 2^14 .. 2^15: fp16 and bf16 numbers are u
// itself (down to 2^-29 of the largest one), those of fp32 are u + v, two n columns of an mma, to a unit in their last
// place. Below accuracy "near-exact" u alone stands for them as well.
//
// One mma of p = 0 .. 7, A [16 rows, 16 k] x B [16 k, 8 columns]: k is column 16p + 4t + i of the chunk, which has bit
// 8i + p of a word of lane (g, t). i = 0 and 2 lie 16 bits apart, so that a shift moves two of them to the same place
// of two fp16. It serves two p at once:
//
//   p odd    sign bit       (word & 0x80008000) | 0x3c003c00     1 - 2 bit, and B has -x
//   p even   bit 14         word & 0x40004000                    2 bit, less the sum of x over even p, in the end
//
//   a[0] = row g [i = 0, 2]   a[1] = row g + 8 [i = 0, 2]   a[2] = row g [i = 1, 3]   a[3] = row g + 8 [i = 1, 3]
//
// Of merged integers, a field of some bits is a subnormal fp16 where it lies, its value times a power of two. An AND
// and an HMUL2 (HFMA2 for a further field) make integers * 2^-13 of two of them; only bytes 1 and 3 of a word take a
// shift.
#pragma once

#include "cuda/planes_block.cuh"
#include "cuda/sign_columns.cuh"
#include "cuda/sign_planes.h"

namespace lutgemm::cuda {
namespace {

// acc += rows x columns, acc being [row g: column 2t, 2t + 1; row g + 8: the same].
__device__ __forceinline__ void add_outer(float2 rows, float2 columns, float (&acc)[4]) {
  acc[0] = fmaf(rows.x, columns.x, acc[0]);
  acc[1] = fmaf(rows.x, columns.y, acc[1]);
  acc[2] = fmaf(rows.y, columns.x, acc[2]);
  acc[3] = fmaf(rows.y, columns.y, acc[3]);
}

// One plane of a unit. scaled: its sums times its scales; total: of the scales.
template <int kTiles, int kSteps>
__device__ __forceinline__ void add_sign_plane(uint2 word, const uint32_t* scales, int step_words, bool wide,
                                               const ColumnsOfX<kTiles, kSteps>& x, float (&scaled)[kTiles][4],
                                               float2 (&total)[kSteps]) {
  constexpr int kMmas = 4 / kSteps;  // of p even, and of p odd
  constexpr int kAndOr = (0xF0 & 0xCC) | 0xAA;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    float c[kTiles][4] = {};
#pragma unroll
    for (int j = s * kMmas; j < (s + 1) * kMmas; ++j) {
      const uint32_t moved[4] = {word.x << (14 - 2 * j), word.y << (14 - 2 * j), word.x << (6 - 2 * j),
                                 word.y << (6 - 2 * j)};
      uint32_t even[4], odd[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        even[e] = moved[e] & 0x40004000u;
        odd[e] = lop3<kAndOr>(moved[e], 0x80008000u, 0x3c003c00u);
      }
#pragma unroll
      for (int i = 0; i < kTiles; ++i) mma_f16(c[i], even, x.b[i][2 * j]);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) mma_f16(c[i], odd, x.b[i][2 * j + 1]);
    }
    const float2 scale = pair_at(scales + s * step_words, wide);
    total[s].x += scale.x, total[s].y += scale.y;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scaled[i][e] = fmaf(e < 2 ? scale.x : scale.y, c[i][e], scaled[i][e]);
    }
  }
}

// One unit by planes.
template <int kTiles, int kSteps>
__device__ __forceinline__ void add_signs(const BitPlanesProblem& p, const ColumnsOfLane<kTiles, kSteps>& own,
                                          const uint32_t* chunk, const uint32_t* unit, float (&acc)[kTiles][4]) {
  const ColumnsOfX<kTiles, kSteps> x(own, chunk);
  const bool wide = p.wide;
  const int slot = slot_words(wide), step_words = p.slots() * slot;
  const uint32_t* scales = unit + own.scale;
  float scaled[kTiles][4] = {};
  float2 total[kSteps] = {};
  for_planes<kTiles * kSteps <= 2>(p.bits, unit + own.lane * 2, [&](uint2 word, int b) {
    add_sign_plane(word, scales + b * slot, step_words, wide, x, scaled, total);
  });
  scales += p.bits * slot;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const float2 step = column_pair(chunk + own.factor[i]);
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[i][e] = fmaf(scaled[i][e], e % 2 == 0 ? step.x : step.y, acc[i][e]);
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    float2 offset = make_float2(0.0f, 0.0f);
    if (p.has_offsets) offset = pair_at(scales + s * step_words, wide);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const uint32_t* of_step = chunk + own.factor[i] + 2 + 4 * s;
      add_outer(make_float2(-total[s].x, -total[s].y), column_pair(of_step), acc[i]);
      if (p.has_offsets) add_outer(offset, column_pair(of_step + 2), acc[i]);
    }
  }
}

// Adds to the A registers of all p the field of kWidth bits that ends at bit kPlace of the integers, or sets them.
template <int kWidth, int kPlace, bool kFirst>
__device__ __forceinline__ void add_half_field(const uint32_t* words, int lane, uint32_t (&a)[8][4]) {
#pragma unroll
  for (int w = 0; w < kWidth; ++w) {
    const uint2 word = load8(words + w * 64 + lane * 2);
    const uint32_t moved[4] = {word.x, word.y, word.x >> 8, word.y >> 8};
#pragma unroll
    for (int u = 0; u < 8 / kWidth; ++u) {
      constexpr uint32_t kField = 0x00010001u * ((1u << kWidth) - 1);
      const int p = w * (8 / kWidth) + u, place = kWidth * u;
      // A field at bit `place` of an fp16 is a subnormal number, field * 2^(place - 24).
      const __half2 power = __float2half2_rn(static_cast<float>(1 << (24 - kIntegerBits + kPlace - place)));
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const __half2 field = half_pair(moved[e] & (kField << place));
        a[p][e] = pair_bits(kFirst ? __hmul2(field, power) : __hfma2(field, power, half_pair(a[p][e])));
      }
    }
  }
}

// A registers of all p: integers of 0 .. 2^bits - 1, times 2^-kIntegerBits. The switch is uniform over the grid.
__device__ __forceinline__ void integer_registers(const uint32_t* words, int bits, int lane, uint32_t (&a)[8][4]) {
  switch (bits) {
    case 1:
      return add_half_field<1, 0, true>(words, lane, a);
    case 2:
      return add_half_field<2, 0, true>(words, lane, a);
    case 3:
      add_half_field<2, 1, true>(words, lane, a);
      return add_half_field<1, 0, false>(words + 2 * 64, lane, a);
    case 4:
      return add_half_field<4, 0, true>(words, lane, a);
    case 5:
      add_half_field<4, 1, true>(words, lane, a);
      return add_half_field<1, 0, false>(words + 4 * 64, lane, a);
    case 6:
      add_half_field<4, 2, true>(words, lane, a);
      return add_half_field<2, 0, false>(words + 4 * 64, lane, a);
    case 7:
      add_half_field<4, 3, true>(words, lane, a);
      add_half_field<2, 1, false>(words + 4 * 64, lane, a);
      return add_half_field<1, 0, false>(words + 6 * 64, lane, a);
    default:
      return add_half_field<8, 0, true>(words, lane, a);
  }
}

// One unit of merged integers.
template <int kTiles, int kSteps>
__device__ __forceinline__ void add_integers(const BitPlanesProblem& p, const ColumnsOfLane<kTiles, kSteps>& own,
                                             const uint32_t* chunk, const uint32_t* unit, float (&acc)[kTiles][4]) {
  constexpr int kMmas = 8 / kSteps;
  const bool wide = p.wide;
  const int slot = slot_words(wide);
  const uint32_t* scales = unit + own.scale;
  uint32_t a[8][4];
  integer_registers(unit, p.bits, own.lane, a);
  const ColumnsOfX<kTiles, kSteps> x(own, chunk);
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    float c[kTiles][4] = {};
#pragma unroll
    for (int q = s * kMmas; q < (s + 1) * kMmas; ++q) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) mma_f16(c[i], a[q], x.b[i][q]);
    }
    const float2 scale = pair_at(scales + 2 * s * slot, wide), zero = pair_at(scales + (2 * s + 1) * slot, wide);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const float2 step = column_pair(chunk + own.factor[i]), sum = column_pair(chunk + own.factor[i] + 4 + 4 * s);
#pragma unroll
      for (int e = 0; e < 4; ++e) c[i][e] *= e % 2 == 0 ? step.x : step.y;
      add_outer(make_float2(-zero.x, -zero.y), sum, c[i]);
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[i][e] = fmaf(e < 2 ? scale.x : scale.y, c[i][e], acc[i][e]);
    }
  }
}

template <int kTiles_, int kSteps, bool kMerged>
struct SignForm {
  static constexpr int kTiles = kTiles_, kValues = 4;

  static __device__ __forceinline__ void prepare(const BitPlanesPlan& plan, const float (&v)[8], int lane, bool there,
                                                 int token, int tokens, uint32_t* chunk) {
    auto* factors = reinterpret_cast<float*>(chunk + plan.fragment_words);
    prepare_columns<kSteps, kMerged>(v, lane, there, token, tokens, plan.terms, chunk, factors);
  }

  using Lane = ColumnsOfLane<kTiles, kSteps>;

  static __device__ __forceinline__ void add(const BitPlanesProblem& p, const Lane& own, const uint32_t* chunk,
                                             const uint32_t* unit, float (&acc)[kTiles][kValues]) {
    if constexpr (kMerged) {
      add_integers(p, own, chunk, unit, acc);
    } else {
      add_signs(p, own, chunk, unit, acc);
    }
  }

  // outputs of a warp: [n tile][g][t ^ g / 2][row g: column 2t, 2t + 1; row g + 8], without conflicts either way.
  static __device__ __forceinline__ void put(float* out, int lane, const float (&acc)[kTiles][kValues]) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      store16(out + i * kWarpSize * 4 + g * 16 + (t ^ g / 2) * 4,
              make_uint4(__float_as_uint(acc[i][0]), __float_as_uint(acc[i][1]), __float_as_uint(acc[i][2]),
                         __float_as_uint(acc[i][3])));
    }
  }

  static __device__ __forceinline__ float sum(const float* out, int warps, int terms, int row, int m) {
    const int g = row % 8;
    float sum = 0.0f;
    for (int c = m * terms; c < (m + 1) * terms; ++c) {
      const int at = c / 8 * kWarpSize * 4 + g * 16 + (c % 8 / 2 ^ g / 2) * 4 + row / 8 * 2 + c % 2;
      for (int w = 0; w < warps; ++w) sum += out[w * kTiles * kWarpSize * 4 + at];
    }
    return sum;
  }
};

template <int kTiles, int kSteps, bool kMerged>
__global__ void __launch_bounds__(256, 2) sign_planes_kernel(const PlanesArguments arguments) {
  planes_block<SignForm<kTiles, kSteps, kMerged>>(arguments);
}

template <int kSteps, bool kMerged>
__global__ void __launch_bounds__(kPrepareWarps* kWarpSize) prepare_signs_kernel(const PlanesArguments arguments) {
  prepare_block<SignForm<1, kSteps, kMerged>>(arguments);
}

template <bool kMerged, int kSteps>
void launch_sign_tiles(const PlanesArguments& arguments, const LaunchShape& shape) {
  if (arguments.plan.separate) {
    launch(prepare_signs_kernel<kSteps, kMerged>, prepare_shape(arguments, shape.stream), arguments);
  }
  arguments.plan.token_tiles == 1 ? launch(sign_planes_kernel<1, kSteps, kMerged>, shape, arguments)
                                  : launch(sign_planes_kernel<2, kSteps, kMerged>, shape, arguments);
}

template <bool kMerged>
void launch_sign_planes(const PlanesArguments& arguments, const LaunchShape& shape) {
  switch (arguments.problem.steps) {
    case 1:
      return launch_sign_tiles<kMerged, 1>(arguments, shape);
    case 2:
      return launch_sign_tiles<kMerged, 2>(arguments, shape);
    default:
      return launch_sign_tiles<kMerged, 4>(arguments, shape);
  }
}

}  // namespace

// Defined in sign_integers.cu, so that the two kinds compile side by side.
void launch_sign_integers(const PlanesArguments& arguments, const LaunchShape& shape);

}  // namespace lutgemm::cuda
