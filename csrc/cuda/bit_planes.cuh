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
//
// A block owns a tile and all chunks of its split; its warps share the chunks, each streaming its units through a ring
// in shared memory by cp.async, and their sums are added in the order of the warps. Blocks go on to further tiles with
// the activations that they have prepared.
#pragma once

#include "cuda/bit_planes.h"
#include "cuda/epilogue.cuh"
#include "cuda/launch.cuh"
#include "cuda/planes.cuh"
#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"

namespace lutgemm::cuda {
namespace {

// Shared memory of a block, in this order; sizes in bytes.
struct BitPlanesShared {
  int64_t stage, ring, fragments, steps, sums, outputs, total;
};

// Per token and chunk: 64 words of hi and lo, its step, its sums of x.
inline BitPlanesShared bit_planes_shared(const BitPlanesProblem& p, const BitPlanesPlan& plan) {
  const int64_t tokens = p.io.M < 4 * plan.token_tiles ? p.io.M : 4 * plan.token_tiles;
  BitPlanesShared s{};
  s.stage = 4 * p.unit_words() * plan.units_per_stage;
  s.ring = s.stage * kPlanesStages * plan.warps;
  s.fragments = plan.split_chunks * tokens * 256;
  s.steps = round_up(plan.split_chunks * tokens * 4, 16);
  s.sums = round_up(plan.split_chunks * tokens * p.steps * 4, 16);
  s.outputs = int64_t(2) * plan.warps * plan.token_tiles * kWarpSize * 8;
  s.total = s.ring + s.fragments + s.steps + s.sums + s.outputs;
  return s;
}

// What can be divided on the host is: a division takes some 100 clocks, and several would go before the first copy.
struct BitPlanesArguments {
  BitPlanesProblem problem;
  BitPlanesPlan plan;
  float* partial;  // [splits, M, N], or null for one split
  BitPlanesShared sizes;
  int unit_words, warp_bits;  // plan.warps is 2^warp_bits
};

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

// One chunk of one token by a warp, v being columns 4l .. 4l + 3 of lane l: hi and lo as B fragments, the step, the
// sums of x.
//   fragments, words of 4 k: [h 2][term 2][t 4][q 4], where q = 2 (j % 2) + half and h = j / 2 of p = 2j + half: the
//   two 16-byte reads of the lanes of a quarter of a warp are then 128 adjacent bytes.
template <int kSteps>
__device__ __forceinline__ void prepare_chunk(const float (&v)[4], int lane, uint32_t* fragments, float* step,
                                              float* sums) {
  float most = 0.0f, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) most = fmaxf(most, fabsf(v[i])), sum += v[i];
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    most = fmaxf(most, __shfl_xor_sync(kFullMask, most, distance));
    if (distance < kWarpSize / kSteps) sum += __shfl_xor_sync(kFullMask, sum, distance);
  }
  most = fmaxf(most, 1e-30f);  // keeps 127 / most finite
  const float scale = 127.0f / most;
  uint32_t high = 0, low = 0;
  bool finite = true;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    finite = finite && fabsf(v[i]) <= 3.4028235e38f;
    const float scaled = v[i] * scale;
    const int h = __float2int_rn(scaled), l = __float2int_rn((scaled - static_cast<float>(h)) * kHighWeight);
    high |= (static_cast<uint32_t>(h) & 0xffu) << (8 * i);
    low |= (static_cast<uint32_t>(l) & 0xffu) << (8 * i);
  }
  const int at = (lane / 16) * 32 + (lane % 4) * 4 + (lane / 4) % 4;
  fragments[at] = high;
  fragments[at + 16] = low;
  const bool all_finite = __all_sync(kFullMask, finite);
  if (lane == 0) *step = all_finite ? most / kStepsOfMax : __int_as_float(0x7fc00000);
  if (lane % (kWarpSize / kSteps) == 0) sums[lane / (kWarpSize / kSteps)] = sum;
}

// A registers of p for rows g and g + 8: -128 * bit.
__device__ __forceinline__ uint32_t plane_register(uint32_t word, int p) { return (word << (7 - p)) & 0x80808080u; }

// What a lane needs of the activations of a chunk: B fragments, and of token 4i + t the step and the sums.
template <int kTiles, int kSteps>
struct ChunkOfX {
  uint32_t b[kTiles][4][2];
  float step[kTiles], sum[kTiles][kSteps];

  __device__ __forceinline__ void load(const uint32_t* fragments, const float* steps, const float* sums, int tokens,
                                       int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int column_token = 4 * i + g / 2, own_token = 4 * i + t;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint4 words = make_uint4(0, 0, 0, 0);
        if (column_token < tokens) words = load16(fragments + column_token * 64 + h * 32 + (g % 2) * 16 + t * 4);
        b[i][2 * h][0] = words.x, b[i][2 * h][1] = words.y;
        b[i][2 * h + 1][0] = words.z, b[i][2 * h + 1][1] = words.w;
      }
      const bool there = own_token < tokens;
      step[i] = there ? steps[own_token] : 0.0f;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) sum[i][s] = there ? sums[own_token * kSteps + s] : 0.0f;
    }
  }
};

template <int kTiles>
__device__ __forceinline__ void clear(int (&c)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) c[i][0] = c[i][1] = c[i][2] = c[i][3] = kSumZero;
}

// One unit by planes. acc [i][row g, row g + 8] of token 4i + t.
template <int kTiles, int kSteps>
__device__ __forceinline__ void add_planes(const BitPlanesProblem& p, const uint32_t* unit, int lane,
                                           const ChunkOfX<kTiles, kSteps>& x, float (&acc)[kTiles][2]) {
  constexpr int kMmas = 4 / kSteps;
  const uint32_t* scales = unit + 64 * p.bits;
  const int g = lane / 4, slots = p.slots();
  float scaled[kTiles][2] = {}, rest[kSteps][2] = {};
  for (int b = 0; b < p.bits; ++b) {
    const uint2 word = load8(unit + b * 64 + lane * 2);
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
      const float2 scale = row_pair(scales, p.wide, s * slots + b, g);
      rest[s][0] -= scale.x, rest[s][1] -= scale.y;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        scaled[i][0] = fmaf(scale.x, two_terms(c[i][0], c[i][1]), scaled[i][0]);
        scaled[i][1] = fmaf(scale.y, two_terms(c[i][2], c[i][3]), scaled[i][1]);
      }
    }
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    if (p.has_offsets) {
      const float2 offset = row_pair(scales, p.wide, s * slots + p.bits, g);
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
__device__ __forceinline__ void add_merged(const BitPlanesProblem& p, const uint32_t* unit, int lane,
                                           const ChunkOfX<kTiles, kSteps>& x, float (&acc)[kTiles][2]) {
  constexpr int kMmas = 4 / kSteps;
  const uint32_t* scales = unit + 64 * p.bits;
  const int g = lane / 4;
  uint32_t rows[2][8];
  merged_registers(unit, p.bits, lane, rows);
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
    const float2 scale = row_pair(scales, p.wide, 2 * s, g), zero = row_pair(scales, p.wide, 2 * s + 1, g);
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

template <int kTiles, int kSteps, bool kMerged>
__global__ void __launch_bounds__(256, kBlocksPerSm<kTiles>) bit_planes_kernel(const BitPlanesArguments arguments) {
  const BitPlanesProblem& p = arguments.problem;
  const int warps = arguments.plan.warps, batch = arguments.plan.units_per_stage;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;

  const int64_t split_chunks = arguments.plan.split_chunks;
  const int64_t first_chunk = blockIdx.y * split_chunks;
  const int chunks = static_cast<int>(first_chunk + split_chunks < p.chunks ? split_chunks : p.chunks - first_chunk);
  const int own_begin = warp * chunks >> arguments.warp_bits;
  const int own_count = ((warp + 1) * chunks >> arguments.warp_bits) - own_begin;
  const int64_t first_token = static_cast<int64_t>(blockIdx.z) * 4 * kTiles;
  const int tokens = static_cast<int>(p.io.M - first_token < 4 * kTiles ? p.io.M - first_token : 4 * kTiles);

  const BitPlanesShared& sizes = arguments.sizes;
  unsigned char* shared = dynamic_shared();
  unsigned char* ring = shared + warp * kPlanesStages * sizes.stage;
  auto* fragments = reinterpret_cast<uint32_t*>(shared + sizes.ring);
  auto* steps = reinterpret_cast<float*>(shared + sizes.ring + sizes.fragments);
  auto* sums = reinterpret_cast<float*>(shared + sizes.ring + sizes.fragments + sizes.steps);
  auto* outputs = reinterpret_cast<float*>(shared + sizes.ring + sizes.fragments + sizes.steps + sizes.sums);

  // The warp's units of all its tiles, in batches: batch `next` of tile `next_tile` is copied next.
  const int unit_words = arguments.unit_words;
  int64_t next_tile = blockIdx.x;
  int next = 0, next_stage = 0;
  const auto copy_batch = [&] {
    if (next_tile < p.tiles && own_count > 0) {
      const int units = own_count - next < batch ? own_count - next : batch;
      const uint32_t* from = p.packed + (next_tile * p.chunks + first_chunk + own_begin + next) * unit_words;
      unsigned char* to = ring + next_stage * sizes.stage;
      for (int i = lane; i < units * unit_words / 4; i += kWarpSize) cp_async16_stream(to + 16 * i, from + 4 * i);
      next += units;
      if (next >= own_count) next = 0, next_tile += gridDim.x;
      next_stage = (next_stage + 1) % kPlanesStages;
    }
    cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < kPlanesStages - 1; ++i) copy_batch();

  grid_dependency_wait();
  launch_dependents();
  const int prepared = own_count * tokens;
  for (int first = 0; first < prepared; first += kLoadsOfX) {
    uint4 bits[kLoadsOfX];
#pragma unroll
    for (int i = 0; i < kLoadsOfX; ++i) {
      const int one = min(first + i, prepared - 1), chunk = own_begin + one / tokens;
      bits[i] = load_four(p.io, first_token + one % tokens, (first_chunk + chunk) * kPlanesChunk + 4 * lane);
    }
#pragma unroll
    for (int i = 0; i < kLoadsOfX; ++i) {
      if (first + i >= prepared) break;
      const int64_t at = static_cast<int64_t>(own_begin) * tokens + first + i;
      float v[4];
      as_four(p.io.dtype, bits[i], v);
      prepare_chunk<kSteps>(v, lane, fragments + at * 64, steps + at, sums + at * kSteps);
    }
  }
  __syncwarp();

  int stage = 0, buffer = 0;
  for (int64_t tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    float acc[kTiles][2] = {};
    for (int done = 0; done < own_count; done += batch) {
      cp_async_wait<kPlanesStages - 2>();
      __syncwarp();  // every lane's part of this batch is there, and the one before it has been read
      copy_batch();
      const auto* units = reinterpret_cast<const uint32_t*>(ring + stage * sizes.stage);
      stage = (stage + 1) % kPlanesStages;
      for (int u = 0; u < batch && done + u < own_count; ++u) {
        const int64_t at = static_cast<int64_t>(own_begin + done + u) * tokens;
        ChunkOfX<kTiles, kSteps> x;
        x.load(fragments + at * 64, steps + at, sums + at * kSteps, tokens, lane);
        if constexpr (kMerged) {
          add_merged(p, units + u * unit_words, lane, x, acc);
        } else {
          add_planes(p, units + u * unit_words, lane, x, acc);
        }
      }
    }

    // Two buffers: the next tile's sums are written while slow threads still read this one's; one barrier a tile.
    float* out = outputs + buffer * (sizes.outputs / 8);
    buffer ^= 1;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      store8(out + ((warp * kTiles + i) * kWarpSize + lane) * 2,
             make_uint2(__float_as_uint(acc[i][0]), __float_as_uint(acc[i][1])));
    }
    __syncthreads();
    for (int o = threadIdx.x; o < kPlanesTileRows * tokens; o += blockDim.x) {
      const int row = o % kPlanesTileRows, m = o / kPlanesTileRows;
      const int at = (m / 4 * kWarpSize + row % 8 * 4 + m % 4) * 2 + row / 8;
      float sum = out[at];
      for (int w = 1; w < warps; ++w) sum += out[w * kTiles * kWarpSize * 2 + at];
      const int64_t n = tile * kPlanesTileRows + row;
      if (n >= p.io.N) continue;
      if (arguments.partial != nullptr) {
        arguments.partial[(blockIdx.y * p.io.M + first_token + m) * p.io.N + n] = sum;
      } else {
        store_result(p.io.y, p.io.bias, p.io.dtype, p.io.N, first_token + m, n, sum);
      }
    }
  }
}

template <bool kMerged, int kTiles>
void launch_steps(const BitPlanesArguments& arguments, const LaunchShape& shape) {
  switch (arguments.problem.steps) {
    case 1:
      return launch(bit_planes_kernel<kTiles, 1, kMerged>, shape, arguments);
    case 2:
      return launch(bit_planes_kernel<kTiles, 2, kMerged>, shape, arguments);
    default:
      return launch(bit_planes_kernel<kTiles, 4, kMerged>, shape, arguments);
  }
}

template <bool kMerged>
void launch_bit_planes(const BitPlanesProblem& problem, const BitPlanesPlan& plan, float* partial,
                       const LaunchShape& shape) {
  BitPlanesArguments arguments{problem, plan, partial, bit_planes_shared(problem, plan), int(problem.unit_words()), 0};
  while ((1 << arguments.warp_bits) < plan.warps) ++arguments.warp_bits;
  switch (arguments.plan.token_tiles) {
    case 1:
      return launch_steps<kMerged, 1>(arguments, shape);
    case 2:
      return launch_steps<kMerged, 2>(arguments, shape);
    default:
      return launch_steps<kMerged, 4>(arguments, shape);
  }
}

}  // namespace

// Defined in merged_planes.cu, so that the two kinds compile side by side.
void launch_merged_planes(const BitPlanesProblem& problem, const BitPlanesPlan& plan, float* partial,
                          const LaunchShape& shape);

}  // namespace lutgemm::cuda
