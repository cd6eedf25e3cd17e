// The kernel of bit_planes.cu (free and ratio kinds) and merged_planes.cu (uniform kind).
//
//   W[n, k] = offset + sum over b of s_b * (2 bit_b - 1)          x[m, k] ~ step * (254 hi + lo), |hi|, |lo| <= 127
//   y[m, n] = sum over groups of   sum over b of 2 s_b * (sum over k of bit_b * x)   + (offset - sum of s_b) * sum of x
//   uniform:                       s * (sum over k of integer * x)                   - s * zero * sum of x
//
// The sums over k in brackets are exact: int8 mma with fp32 only after them. x is rounded once per token and chunk of
// 128 columns, to steps of max |x| / 32258.
//
// One mma, A [16 rows, 32 k] x B [32 k, 8 columns]: column 2m holds hi of token m, column 2m + 1 its lo, so that the
// two halves of one token's sum end up in one lane. A comes from words of codes by a shift and an AND for 4 weights:
//
//   word of lane (g, t), row g           bit 8i + 2j + h  =  column 32j + 16h + 4t + i of the chunk
//   (word << (7 - p)) & 0x80808080       four int8 of -128 * bit: the A register of p = 2j + h of mma j
//
// so mma j sums columns 32j .. 32j + 31: groups of 32 columns and more need no other layout. Merged integers of q bits
// lie in fields of 8, 4, 2, 1 bits, the high bits first (7 = 4 + 2 + 1); a field of f bits takes f words of a lane:
//
//   field word p * f / 8, byte i, bits f * (p % (8 / f)) ..        its part of the integer, p = 2j + h as above
//
// A unit is a tile of 16 rows x a chunk of 128 columns, in the order in which it is read:
//
//   codes   [bits][lane 32][row g, row g + 8]                uint32: lane = 4g + t
//   scales  [step][slot][g 8][row g, row g + 8]              fp16 or fp32; slots: s_0 .. s_q-1, offset; merged: s, zero
#pragma once

#include "cuda/planes_block.cuh"

namespace lutgemm::cuda {
namespace {

// 1.5 * 2^23 as bits: an int32 sum that starts here is, read as fp32, 12582912 + the sum, exactly, below 2^22. The sums
// reach 128 * 128 * 127 < 2^21 (planes) and 128 * 255 * 127 < 2^22 (merged). It saves a conversion, which runs at a
// quarter of the rate of an addition.
constexpr int kSumZero = 0x4B400000;
constexpr float kSumZeroValue = 12582912.0f;
constexpr float kHighWeight = 254.0f, kStepsOfMax = 127.0f * 254.0f;

__device__ __forceinline__ float two_terms(int high, int low) {
  const float h = __int_as_float(high) - kSumZeroValue, l = __int_as_float(low) - kSumZeroValue;
  return fmaf(h, kHighWeight, l);
}

constexpr int kTokenWords = 64;  // of a token and chunk: hi and lo

// One chunk of one token by half a warp, v being columns 8h .. 8h + 7 of lane h of the half: hi and lo as B fragments,
// the step, the sums of x. Nothing is stored where the chunk is not `there`.
//   fragments, words of 4 k: [h 2][term 2][t 4][q 4], where q = 2 (j % 2) + half and h = j / 2 of p = 2j + half: the
//   two 16-byte reads of the lanes of a quarter of a warp are then 128 adjacent bytes.
template <int kSteps>
__device__ __forceinline__ void prepare_chunk(const float (&v)[8], int lane, bool there, uint32_t* fragments,
                                              float* factors) {
  constexpr int kLanes = 16, kStepLanes = kLanes / kSteps;
  const int h = lane % kLanes;
  float most = 0.0f, sums[2] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) most = fmaxf(most, fabsf(v[i])), sums[i / 4] += v[i];
  float sum = sums[0] + sums[1];
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    most = fmaxf(most, __shfl_xor_sync(kFullMask, most, distance));
    if (distance < kStepLanes) sum += __shfl_xor_sync(kFullMask, sum, distance);
  }
  most = fmaxf(most, 1e-30f);  // keeps 127 / most finite
  const float scale = 127.0f / most;
  uint32_t high[2] = {}, low[2] = {};
  bool finite = true;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    finite = finite && fabsf(v[i]) <= 3.4028235e38f;
    const float scaled = v[i] * scale;
    const int first = __float2int_rn(scaled), rest = __float2int_rn((scaled - static_cast<float>(first)) * kHighWeight);
    high[i / 4] |= (static_cast<uint32_t>(first) & 0xffu) << (8 * (i % 4));
    low[i / 4] |= (static_cast<uint32_t>(rest) & 0xffu) << (8 * (i % 4));
  }
  const uint32_t finite_lanes = __ballot_sync(kFullMask, finite) >> (lane & kLanes) & 0xffffu;
  if (!there) return;
  // Lanes of the upper columns start with the other t, in whose banks the lower ones are not.
  const bool upper = h >= 8;
  const int at = h / 8 * 32 + h % 2 * 8 + h / 2 % 4, one = upper ? at + 4 : at, other = upper ? at : at + 4;
  fragments[one] = upper ? high[1] : high[0];
  fragments[one + 16] = upper ? low[1] : low[0];
  fragments[other] = upper ? high[0] : high[1];
  fragments[other + 16] = upper ? low[0] : low[1];
  if (h == 0) factors[0] = finite_lanes == 0xffffu ? most / kStepsOfMax : __int_as_float(0x7fc00000);
  if (h % kStepLanes == 0) factors[1 + h / kStepLanes] = sum;
}

// A registers of p for rows g and g + 8: -128 * bit.
__device__ __forceinline__ uint32_t plane_register(uint32_t word, int p) { return (word << (7 - p)) & 0x80808080u; }

// Where a lane finds its B fragments and, of token 4i + t, the factors. Lanes without a token have the last one's, and
// results that nobody reads.
template <int kTiles, int kSteps>
struct TokensOfLane {
  int lane, word[kTiles], factor[kTiles];
  int scale;  // word of the scales in a unit

  __device__ __forceinline__ TokensOfLane(const BitPlanesProblem& p, const BitPlanesPlan& plan, int lane_, int tokens)
      : lane(lane_) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      word[i] = min(4 * i + g / 2, tokens - 1) * kTokenWords + (g % 2) * 16 + t * 4;
      factor[i] = plan.fragment_words + min(4 * i + t, tokens - 1) * (1 + kSteps);
    }
    scale = 64 * p.bits + slot_row(p.wide, g);
  }
};

// Of one chunk.
template <int kTiles, int kSteps>
struct ChunkOfX {
  uint32_t b[kTiles][4][2];
  float step[kTiles], sum[kTiles][kSteps];

  __device__ __forceinline__ ChunkOfX(const TokensOfLane<kTiles, kSteps>& own, const uint32_t* chunk) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint4 words = load16(chunk + own.word[i] + h * 32);
        b[i][2 * h][0] = words.x, b[i][2 * h][1] = words.y;
        b[i][2 * h + 1][0] = words.z, b[i][2 * h + 1][1] = words.w;
      }
      const uint32_t* from = chunk + own.factor[i];
      step[i] = __uint_as_float(from[0]);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) sum[i][s] = __uint_as_float(from[1 + s]);
    }
  }
};

template <int kTiles>
__device__ __forceinline__ void clear(int (&c)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) c[i][0] = c[i][1] = c[i][2] = c[i][3] = kSumZero;
}

// One plane of a unit.
template <int kTiles, int kSteps>
__device__ __forceinline__ void add_plane(uint2 word, const uint32_t* scales, int step_words, bool wide,
                                          const ChunkOfX<kTiles, kSteps>& x, float (&scaled)[kTiles][2],
                                          float (&rest)[kSteps][2]) {
  constexpr int kMmas = 4 / kSteps;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    int c[kTiles][4];
    clear(c);
#pragma unroll
    for (int j = s * kMmas; j < (s + 1) * kMmas; ++j) {
      const uint32_t a[4] = {plane_register(word.x, 2 * j), plane_register(word.y, 2 * j),
                             plane_register(word.x, 2 * j + 1), plane_register(word.y, 2 * j + 1)};
#pragma unroll
      for (int i = 0; i < kTiles; ++i) mma_s8(c[i], a, x.b[i][j]);
    }
    const float2 scale = pair_at(scales + s * step_words, wide);
    rest[s][0] -= scale.x, rest[s][1] -= scale.y;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      scaled[i][0] = fmaf(scale.x, two_terms(c[i][0], c[i][1]), scaled[i][0]);
      scaled[i][1] = fmaf(scale.y, two_terms(c[i][2], c[i][3]), scaled[i][1]);
    }
  }
}

// One unit by planes. acc [i][row g, row g + 8] of token 4i + t.
template <int kTiles, int kSteps>
__device__ __forceinline__ void add_planes(const BitPlanesProblem& p, const TokensOfLane<kTiles, kSteps>& own,
                                           const uint32_t* unit, const ChunkOfX<kTiles, kSteps>& x,
                                           float (&acc)[kTiles][2]) {
  const bool wide = p.wide;
  const int slot = slot_words(wide), step_words = p.slots() * slot;
  const uint32_t* scales = unit + own.scale;
  float scaled[kTiles][2] = {}, rest[kSteps][2] = {};
  for_planes<kTiles * kSteps <= 2>(p.bits, unit + own.lane * 2, [&](uint2 word, int b) {
    add_plane(word, scales + b * slot, step_words, wide, x, scaled, rest);
  });
  scales += p.bits * slot;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    if (p.has_offsets) {
      const float2 offset = pair_at(scales + s * step_words, wide);
      rest[s][0] += offset.x, rest[s][1] += offset.y;
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      acc[i][0] = fmaf(rest[s][0], x.sum[i][s], acc[i][0]);
      acc[i][1] = fmaf(rest[s][1], x.sum[i][s], acc[i][1]);
    }
  }
  constexpr float kTwoBits = 2.0f / -128.0f;  // A holds -128 * bit
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    acc[i][0] = fmaf(scaled[i][0], kTwoBits * x.step[i], acc[i][0]);
    acc[i][1] = fmaf(scaled[i][1], kTwoBits * x.step[i], acc[i][1]);
  }
}

// One unit of merged integers.
template <int kTiles, int kSteps>
__device__ __forceinline__ void add_merged(const BitPlanesProblem& p, const TokensOfLane<kTiles, kSteps>& own,
                                           const uint32_t* unit, const ChunkOfX<kTiles, kSteps>& x,
                                           float (&acc)[kTiles][2]) {
  constexpr int kMmas = 4 / kSteps;
  const int slot = slot_words(p.wide);
  const uint32_t* scales = unit + own.scale;
  uint32_t rows[2][8];
  merged_registers(unit, p.bits, own.lane, rows);
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    int c[kTiles][4];
    clear(c);
#pragma unroll
    for (int j = s * kMmas; j < (s + 1) * kMmas; ++j) {
      const uint32_t a[4] = {rows[0][2 * j], rows[1][2 * j], rows[0][2 * j + 1], rows[1][2 * j + 1]};
#pragma unroll
      for (int i = 0; i < kTiles; ++i) mma_u8s8(c[i], a, x.b[i][j]);
    }
    const float2 scale = pair_at(scales + 2 * s * slot, p.wide);
    const float2 zero = pair_at(scales + (2 * s + 1) * slot, p.wide);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const float top = fmaf(two_terms(c[i][0], c[i][1]), x.step[i], -zero.x * x.sum[i][s]);
      const float bottom = fmaf(two_terms(c[i][2], c[i][3]), x.step[i], -zero.y * x.sum[i][s]);
      acc[i][0] = fmaf(scale.x, top, acc[i][0]);
      acc[i][1] = fmaf(scale.y, bottom, acc[i][1]);
    }
  }
}

// 4 token tiles take more than the 128 registers of two blocks on a multiprocessor.
template <int kTiles>
constexpr int kBlocksPerSm = kTiles == 4 ? 1 : 2;

template <int kTiles_, int kSteps, bool kMerged>
struct IntegerForm {
  static constexpr int kTiles = kTiles_, kValues = 2;
  static constexpr int kFactors = 1 + kSteps;  // of a token and chunk: its step, its sums of x

  static __device__ __forceinline__ void prepare(const BitPlanesPlan& plan, const float (&v)[8], int lane, bool there,
                                                 int token, int /*tokens*/, uint32_t* chunk) {
    auto* factors = reinterpret_cast<float*>(chunk + plan.fragment_words);
    prepare_chunk<kSteps>(v, lane, there, chunk + token * kTokenWords, factors + token * kFactors);
  }

  using Lane = TokensOfLane<kTiles, kSteps>;

  static __device__ __forceinline__ void add(const BitPlanesProblem& p, const Lane& own, const uint32_t* chunk,
                                             const uint32_t* unit, float (&acc)[kTiles][kValues]) {
    const ChunkOfX<kTiles, kSteps> x(own, chunk);
    if constexpr (kMerged) {
      add_merged(p, own, unit, x, acc);
    } else {
      add_planes(p, own, unit, x, acc);
    }
  }

  // outputs of a warp: [n tile][lane][row g, row g + 8]
  static __device__ __forceinline__ void put(float* out, int lane, const float (&acc)[kTiles][kValues]) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      store8(out + (i * kWarpSize + lane) * 2, make_uint2(__float_as_uint(acc[i][0]), __float_as_uint(acc[i][1])));
    }
  }

  static __device__ __forceinline__ float sum(const float* out, int warps, int /*terms*/, int row, int m) {
    const int at = (m / 4 * kWarpSize + row % 8 * 4 + m % 4) * 2 + row / 8;
    float sum = out[at];
    for (int w = 1; w < warps; ++w) sum += out[w * kTiles * kWarpSize * 2 + at];
    return sum;
  }
};

template <int kTiles, int kSteps, bool kMerged>
__global__ void __launch_bounds__(256, kBlocksPerSm<kTiles>) bit_planes_kernel(const PlanesArguments arguments) {
  planes_block<IntegerForm<kTiles, kSteps, kMerged>>(arguments);
}

template <int kSteps>
__global__ void __launch_bounds__(kPrepareWarps* kWarpSize) prepare_integers_kernel(const PlanesArguments arguments) {
  prepare_block<IntegerForm<1, kSteps, false>>(arguments);
}

template <bool kMerged, int kSteps>
void launch_tiles(const PlanesArguments& arguments, const LaunchShape& shape) {
  if (arguments.plan.separate) {
    launch(prepare_integers_kernel<kSteps>, prepare_shape(arguments, shape.stream), arguments);
  }
  switch (arguments.plan.token_tiles) {
    case 1:
      return launch(bit_planes_kernel<1, kSteps, kMerged>, shape, arguments);
    case 2:
      return launch(bit_planes_kernel<2, kSteps, kMerged>, shape, arguments);
    default:
      return launch(bit_planes_kernel<4, kSteps, kMerged>, shape, arguments);
  }
}

template <bool kMerged>
void launch_bit_planes(const PlanesArguments& arguments, const LaunchShape& shape) {
  switch (arguments.problem.steps) {
    case 1:
      return launch_tiles<kMerged, 1>(arguments, shape);
    case 2:
      return launch_tiles<kMerged, 2>(arguments, shape);
    default:
      return launch_tiles<kMerged, 4>(arguments, shape);
  }
}

}  // namespace

// Defined in merged_planes.cu, so that the two kinds compile side by side.
void launch_merged_planes(const PlanesArguments& arguments, const LaunchShape& shape);

}  // namespace lutgemm::cuda
