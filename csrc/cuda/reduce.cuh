// Sums over the lanes of a warp, and over the warps of a block, in a fixed order. All lanes (threads) take part.
#pragma once

#include "cuda/device.cuh"

namespace lutgemm::cuda {

// The sum over kLanes neighbouring lanes (a power of two), in every one of them: a butterfly.
template <int kLanes = kWarpSize>
__device__ __forceinline__ float lane_sum(float value) {
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) value += __shfl_xor_sync(kFullMask, value, distance);
  return value;
}

// Sums of many values over kLanes neighbouring lanes at about one shuffle each, where `lane_sum` takes log2(kLanes).
// At each distance a lane hands half of its values to its partner and keeps the others, until one is left; what then
// remains to be added is added as in `lane_sum`.
//
// With kept = min(kLanes, kValues), lane l is left with the sums of values l % kept + i * kept in values[i],
// i < kValues / kept.
//
//   4 values, 4 lanes            distance 1                    distance 2
//   lane 0   a0 b0 c0 d0         a01 c01      (kept a, c)      a0123
//   lane 1   a1 b1 c1 d1         b01 d01      (kept b, d)      b0123
//   lane 2   a2 b2 c2 d2         a23 c23                       c0123
//   lane 3   a3 b3 c3 d3         b23 d23                       d0123
template <int kLanes, int kValues, int kDistance = 1, int kSize>
__device__ __forceinline__ void spread_sums(float (&values)[kSize]) {
  if constexpr (kDistance < kLanes) {
    if constexpr (kValues > 1) {
      const bool odd = threadIdx.x & kDistance;
#pragma unroll
      for (int i = 0; i < kValues / 2; ++i) {
        const float kept = odd ? values[2 * i + 1] : values[2 * i];
        const float given = odd ? values[2 * i] : values[2 * i + 1];
        values[i] = kept + __shfl_xor_sync(kFullMask, given, kDistance);
      }
    } else {
      values[0] += __shfl_xor_sync(kFullMask, values[0], kDistance);
    }
    spread_sums<kLanes, (kValues > 1 ? kValues / 2 : 1), 2 * kDistance>(values);
  }
}

// The sum over kWarps warps of value, for each lane, in every warp: warp 0 first. `scratch` is shared memory that
// nobody else uses between the barriers inside; a barrier is needed before it is used again.
template <int kWarps>
__device__ __forceinline__ float warps_sum(float value, float (&scratch)[kWarps][kWarpSize]) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  scratch[warp][lane] = value;
  __syncthreads();
  float sum = scratch[0][lane];
#pragma unroll
  for (int other = 1; other < kWarps; ++other) sum += scratch[other][lane];
  return sum;
}

}  // namespace lutgemm::cuda
