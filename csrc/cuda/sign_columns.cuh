// Activations of sign_planes.cuh in fp16: written as columns of B, and read as fragments.
#pragma once

#include <cstring>

#include "cuda/bit_planes.h"
#include "cuda/planes.cuh"
#include "cuda/ptx.cuh"

namespace lutgemm::cuda {
namespace {

constexpr int kIntegerBits = 13;  // A is integers * 2^-13
constexpr int kColumnWords = 64;  // of a column of B and a chunk

// Word of column c's B fragments, which a lane reads as 16 bytes of p = 2q, 2q + 1: [c][q ^ c % 2][t][p % 2][i = 0, 2 |
// 1, 3]. The lanes of a quarter of a warp have two adjacent columns, whose 64 bytes then lie in different banks.
__device__ __forceinline__ int fragment_word(int c, int q, int t) {
  return c * kColumnWords + (q ^ (c & 1)) * 16 + t * 4;
}

// floats of a pair of columns 2c, 2c + 1: steps [2], then for each step of the chunk sums of x over even p [2] and over
// all [2].
template <int kSteps>
constexpr int kPairFactors = 2 + 4 * kSteps;

// The bits as they are.
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

__device__ __forceinline__ uint32_t half_pair_bits(float low, float high) {
  return pair_bits(__floats2half2_rn(low, high));
}

// One chunk of one token by half a warp, v being columns 8h .. 8h + 7 of lane h of the half. Nothing is stored where
// the chunk is not `there`.
template <int kSteps, bool kMerged>
__device__ __forceinline__ void prepare_columns(const float (&v)[8], int lane, bool there, int token, int tokens,
                                                int terms, uint32_t* fragments, float* factors) {
  constexpr int kLanes = 16, kStepLanes = kLanes / kSteps;
  const int h = lane % kLanes, p = h / 2;
  float most = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) most = fmaxf(most, fabsf(v[i]));
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    most = fmaxf(most, __shfl_xor_sync(kFullMask, most, distance));
  }
  // 2^(exponent of most - 14), at least 2^-126, and what it is divided by.
  const int exponent = (__float_as_int(most) >> 23) & 0xff, biased = exponent > 15 ? exponent - 14 : 1;
  const float step = __int_as_float(biased << 23), inverse = __int_as_float((254 - biased) << 23);

  float left[8], sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) left[i] = v[i] * inverse, sum += left[i];
  // Over the lanes of a step and of p even, or odd: bit 1 of h is p % 2.
#pragma unroll
  for (int distance = 1; distance < kStepLanes; distance *= 2) {
    if (distance != 2) sum += __shfl_xor_sync(kFullMask, sum, distance);
  }
  const float all = sum + __shfl_xor_sync(kFullMask, sum, 2);
  if (!there) return;

  const uint32_t signs = !kMerged && p % 2 != 0 ? 0x80008000u : 0;
  // Lanes of the upper columns start with the other t, in whose banks the lower ones are not.
  const bool upper = h >= 8;
  const int t = h % 2 * 2, columns = tokens * terms;
  for (int term = 0; term < terms; ++term) {
    const int c = token * terms + term;
    uint2 words[2];
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      words[f] =
          make_uint2(half_pair_bits(left[4 * f], left[4 * f + 2]), half_pair_bits(left[4 * f + 1], left[4 * f + 3]));
      if (terms > 1) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t pair = i % 2 == 0 ? words[f].x : words[f].y, half = i < 2 ? pair & 0xffffu : pair >> 16;
          left[4 * f + i] -= __half2float(__ushort_as_half(static_cast<unsigned short>(half)));
        }
      }
      words[f].x ^= signs, words[f].y ^= signs;
    }
    uint32_t* own_p = fragments + fragment_word(c, p / 2, t) + p % 2 * 2;
    store8(own_p + (upper ? 4 : 0), upper ? words[1] : words[0]);
    store8(own_p + (upper ? 0 : 4), upper ? words[0] : words[1]);

    // Sums of the first term are those of the token. The last column may be alone in its pair.
    float* own = factors + c / 2 * kPairFactors<kSteps> + c % 2;
    const bool alone = c == columns - 1 && c % 2 == 0;
    if (h % kStepLanes == 0) {
      float* of_step = own + 2 + h / kStepLanes * 4;
      of_step[0] = term == 0 ? sum * step : 0.0f;  // these lanes have p even
      of_step[2] = term == 0 ? all * step : 0.0f;
      if (alone) of_step[1] = of_step[3] = 0.0f;
    }
    if (h == 0) {
      own[0] = kMerged ? step * (1 << kIntegerBits) : step;
      if (alone) own[1] = 0.0f;
    }
  }
}

// Where a lane finds its B fragments and, of columns 8i + 2t, 8i + 2t + 1, the factors. Lanes without a column have the
// last one's, and results that nobody reads.
template <int kTiles, int kSteps>
struct ColumnsOfLane {
  int lane, word[kTiles], factor[kTiles];
  int scale;  // word of the scales in a unit

  __device__ __forceinline__ ColumnsOfLane(const BitPlanesProblem& p, const BitPlanesPlan& plan, int lane_, int tokens)
      : lane(lane_) {
    const int g = lane / 4, t = lane % 4, columns = tokens * plan.terms;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      word[i] = fragment_word(min(8 * i + g, columns - 1), 0, t);
      factor[i] = plan.fragment_words + min(8 * i + 2 * t, columns - 1) / 2 * kPairFactors<kSteps>;
    }
    scale = 64 * p.bits + slot_row(p.wide, g);
  }
};

// B fragments of a chunk.
template <int kTiles, int kSteps>
struct ColumnsOfX {
  uint32_t b[kTiles][8][2];

  __device__ __forceinline__ ColumnsOfX(const ColumnsOfLane<kTiles, kSteps>& own, const uint32_t* chunk) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const uint4 words = load16(chunk + (own.word[i] ^ q % 2 * 16) + q / 2 * 32);
        b[i][2 * q][0] = words.x, b[i][2 * q][1] = words.y;
        b[i][2 * q + 1][0] = words.z, b[i][2 * q + 1][1] = words.w;
      }
    }
  }
};

// Two floats, of a lane's two columns.
__device__ __forceinline__ float2 column_pair(const uint32_t* from) {
  const uint2 bits = load8(from);
  return make_float2(__uint_as_float(bits.x), __uint_as_float(bits.y));
}

}  // namespace
}  // namespace lutgemm::cuda
