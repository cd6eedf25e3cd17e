// y = x @ W.T with W made in registers from the units of bit_planes.cuh, and fp16 mma with fp32 sums.
//
//   y[m, n] = token_scale[m] * row_scale[n] * sum over k of half(x[m, k] / token_scale[m]) * half(W[n, k] /
//   row_scale[n])
//
// Both scales are powers of two that bring the largest |x| of a token and |W| of a row to the upper range of fp16, so
// that its 11 bits hold whatever dtype and magnitude come in: errors are 2^-12 of an element, or 2^-25 of the largest.
//
// One mma (j, h) of a chunk of 128 columns, p = 2j + h: A [16 rows, 16 k] from the words of a unit, B [16 k, 8 tokens].
// Lane (g, t) has columns 16p + 4t + i, i = 0 .. 3, of rows g and g + 8. Of a word, bits 8i + p; i = 0 and 2 lie 16
// bits apart, so one shift and one lop3 give the signs of two fp16:
//
//   a[0] = W[g][i = 0, 2]   a[1] = W[g + 8][i = 0, 2]   a[2] = W[g][i = 1, 3]   a[3] = W[g + 8][i = 1, 3]
//   W pair = offset + sum over b of (-s_b) ^ ((word_b << (15 - p or 7 - p)) & 0x80008000)
//   merged: fp16 of 1024 + integer is 0x6400 | integer: one prmt for two; W pair = s * integer - s * zero
//
// The activations are written in that order by a first kernel, so that a B fragment is 8 bytes of a lane:
//
//   tokens  [chunk][token tile of 8][p 8][lane 4 * token + t][i = 0, 2, 1, 3]   fp16
//
//   block   [warps x 2 tiles of 16 rows] x [8 * kTokenTiles tokens], over the chunks of a split; a stage holds one
//   chunk
//           of the tokens for all warps, and each warp's 2 units
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/dequant_gemm.h"
#include "cuda/launch.cuh"
#include "cuda/planes.cuh"
#include "cuda/reduce.h"

namespace lutgemm::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kTokenTileWords = 8 * kWarpSize * 2;  // of one token tile and chunk

struct GemmArguments {
  DequantGemmProblem problem;
  DequantGemmPlan plan;
  const uint32_t* tokens;     // the prepared activations
  const float* token_scales;  // [8 * token tiles]
  float* partial;             // [splits, M, N], or null for one split
};

int64_t all_token_tiles(const DequantGemmPlan& plan) { return plan.token_blocks * plan.token_tiles; }

int64_t tokens_bytes(const DequantGemmProblem& p, const DequantGemmPlan& plan) {
  return p.weight.chunks * all_token_tiles(plan) * kTokenTileWords * 4;
}

int64_t token_scales_bytes(const DequantGemmPlan& plan) { return round_up(all_token_tiles(plan) * 8 * 4, 16); }

__device__ __forceinline__ __half2 half_pair(uint32_t bits) {
  return __halves2half2(__ushort_as_half(static_cast<unsigned short>(bits & 0xffffu)),
                        __ushort_as_half(static_cast<unsigned short>(bits >> 16)));
}

__device__ __forceinline__ uint32_t pair_bits(__half2 pair) {
  return static_cast<uint32_t>(__half_as_ushort(__low2half(pair))) |
         static_cast<uint32_t>(__half_as_ushort(__high2half(pair))) << 16;
}

// value twice, in fp16.
__device__ __forceinline__ uint32_t twice(float value) { return pair_bits(__float2half2_rn(value)); }

// One token by a block of 256 threads: its scale, and its columns in the order of B fragments. Tokens past M are zeros.
__global__ void __launch_bounds__(256)
    prepare_tokens_kernel(const GpuIo io, int64_t chunks, int64_t token_tiles, uint32_t* tokens, float* token_scales) {
  LUTGEMM_SHARED(float, warp_max, [8]);
  const int64_t m = blockIdx.x;
  const bool there = m < io.M;
  const int lane = threadIdx.x % kWarpSize;
  grid_dependency_wait();
  launch_dependents();
  const int64_t fours = there ? ceil_div(io.K, 4) : 0;
  const auto load_some = [&](int64_t first, uint4(&bits)[kLoadsOfX]) {
#pragma unroll
    for (int i = 0; i < kLoadsOfX; ++i) {
      const int64_t four = first + i * blockDim.x;
      bits[i] = four < fours ? load_four(io, m, 4 * four) : make_uint4(0, 0, 0, 0);
    }
  };
  float most = 0.0f;
  for (int64_t first = threadIdx.x; first < fours; first += kLoadsOfX * blockDim.x) {
    uint4 bits[kLoadsOfX];
    load_some(first, bits);
#pragma unroll
    for (int i = 0; i < kLoadsOfX; ++i) {
      float v[4];
      as_four(io.dtype, bits[i], v);
#pragma unroll
      for (int e = 0; e < 4; ++e) most = fmaxf(most, fabsf(v[e]));
    }
  }
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    most = fmaxf(most, __shfl_xor_sync(kFullMask, most, distance));
  }
  if (lane == 0) warp_max[threadIdx.x / kWarpSize] = most;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < 8; ++warp) most = fmaxf(most, warp_max[warp]);
  // 2^(exponent of most - 14): the largest becomes 2^14 .. 2^15. 1 for zeros, subnormals, and infinities.
  const int exponent = (__float_as_int(most) >> 23) & 0xff;
  const int biased = exponent <= 15 || exponent == 255 ? 127 : exponent - 14;
  const float scale = __int_as_float(biased << 23);
  const float inverse = 1.0f / scale;
  if (threadIdx.x == 0) token_scales[m] = scale;

  const int64_t all_fours = chunks * (kPlanesChunk / 4);
  for (int64_t first = threadIdx.x; first < all_fours; first += kLoadsOfX * blockDim.x) {
    uint4 bits[kLoadsOfX];
    load_some(first, bits);
#pragma unroll
    for (int i = 0; i < kLoadsOfX; ++i) {
      const int64_t four = first + i * blockDim.x, chunk = four / 32;
      if (four >= all_fours) break;
      float v[4];
      as_four(io.dtype, bits[i], v);
      const int p = static_cast<int>(four % 32) / 4, t = static_cast<int>(four % 4);
      const uint32_t even = pair_bits(__floats2half2_rn(v[0] * inverse, v[2] * inverse));
      const uint32_t odd = pair_bits(__floats2half2_rn(v[1] * inverse, v[3] * inverse));
      const int64_t at = ((chunk * token_tiles + m / 8) * 8 + p) * kWarpSize + (m % 8) * 4 + t;
      store8(tokens + 2 * at, make_uint2(even, odd));
    }
  }
}

// A unit's 16 rows x 128 columns as A registers of its 8 mma. Scales are read for each 32 columns, whatever the number
// of steps: one kernel for all, at the price of a few reads from shared memory.
__device__ __forceinline__ void dequantize_planes(const BitPlanesProblem& w, const uint32_t* unit, int lane,
                                                  float2 inverse, uint32_t (&a)[8][4]) {
  const uint32_t* scales = unit + 64 * w.bits;
  const int g = lane / 4;
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    const int first_slot = s * w.steps / 4 * w.slots();
    float2 offset = make_float2(0.0f, 0.0f);
    if (w.has_offsets) offset = row_pair(scales, w.wide, first_slot + w.bits, g);
    const uint32_t top = twice(offset.x * inverse.x), bottom = twice(offset.y * inverse.y);
#pragma unroll
    for (int p = 2 * s; p < 2 * s + 2; ++p) a[p][0] = a[p][2] = top, a[p][1] = a[p][3] = bottom;
  }
  for (int b = 0; b < w.bits; ++b) {
    const uint2 word = load8(unit + b * 64 + lane * 2);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const int first_slot = s * w.steps / 4 * w.slots();
      const float2 scale = row_pair(scales, w.wide, first_slot + b, g);
      const uint32_t top = twice(-scale.x * inverse.x), bottom = twice(-scale.y * inverse.y);
#pragma unroll
      for (int p = 2 * s; p < 2 * s + 2; ++p) {
        constexpr int kSignOf = (0xF0 & 0xCC) ^ 0xAA;  // (a & b) ^ c
        const uint32_t even[2] = {lop3<kSignOf>(word.x << (15 - p), 0x80008000u, top),
                                  lop3<kSignOf>(word.y << (15 - p), 0x80008000u, bottom)};
        const uint32_t odd[2] = {lop3<kSignOf>(word.x << (7 - p), 0x80008000u, top),
                                 lop3<kSignOf>(word.y << (7 - p), 0x80008000u, bottom)};
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          a[p][row] = pair_bits(__hadd2(half_pair(a[p][row]), half_pair(even[row])));
          a[p][row + 2] = pair_bits(__hadd2(half_pair(a[p][row + 2]), half_pair(odd[row])));
        }
      }
    }
  }
}

__device__ __forceinline__ void dequantize_merged(const BitPlanesProblem& w, const uint32_t* unit, int lane,
                                                  float2 inverse, uint32_t (&a)[8][4]) {
  const uint32_t* scales = unit + 64 * w.bits;
  uint32_t rows[2][8];
  merged_registers(unit, w.bits, lane, rows);
  const __half2 base = __float2half2_rn(-1024.0f);
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    const int first_slot = s * w.steps / 4 * 2;
    const float2 scale = row_pair(scales, w.wide, first_slot, lane / 4),
                 zero = row_pair(scales, w.wide, first_slot + 1, lane / 4);
    const float scale_of[2] = {scale.x * inverse.x, scale.y * inverse.y};
    const float zero_of[2] = {zero.x, zero.y};
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const __half2 factor = __float2half2_rn(scale_of[row]);
      const __half2 shift = __float2half2_rn(-scale_of[row] * zero_of[row]);
#pragma unroll
      for (int p = 2 * s; p < 2 * s + 2; ++p) {
        // bytes 0 and 2, then 1 and 3, each below a byte 0x64
        const __half2 even = __hadd2(half_pair(prmt(rows[row][p], 0x64646464u, 0x4240)), base);
        const __half2 odd = __hadd2(half_pair(prmt(rows[row][p], 0x64646464u, 0x4341)), base);
        a[p][row] = pair_bits(__hfma2(even, factor, shift));
        a[p][row + 2] = pair_bits(__hfma2(odd, factor, shift));
      }
    }
  }
}

template <int kTokenTiles, bool kMerged>
__global__ void __launch_bounds__(kWarps* kWarpSize, 2) dequant_gemm_kernel(const GemmArguments arguments) {
  const BitPlanesProblem& w = arguments.problem.weight;
  const int warps = arguments.plan.warps;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;

  const int64_t split_chunks = arguments.plan.split_chunks;
  const int64_t first_chunk = blockIdx.y * split_chunks;
  const int chunks = static_cast<int>(first_chunk + split_chunks < w.chunks ? split_chunks : w.chunks - first_chunk);
  const int64_t first_tile = (static_cast<int64_t>(blockIdx.x) * warps + warp) * kGemmRowTiles;
  const int64_t all_tiles = arguments.plan.token_blocks * kTokenTiles;
  const int64_t first_token_tile = static_cast<int64_t>(blockIdx.z) * kTokenTiles;

  const int unit_words = static_cast<int>(w.unit_words());
  constexpr int kTokenBytes = kTokenTiles * kTokenTileWords * 4;
  const int stage_bytes = kTokenBytes + warps * kGemmRowTiles * unit_words * 4;
  unsigned char* shared = dynamic_shared();
  const auto copy_units = [&](int chunk) {
    unsigned char* to =
        shared + chunk % kGemmStages * stage_bytes + kTokenBytes + warp * kGemmRowTiles * unit_words * 4;
#pragma unroll
    for (int r = 0; r < kGemmRowTiles; ++r) {
      if (first_tile + r >= w.tiles) break;
      const uint32_t* from = w.packed + ((first_tile + r) * w.chunks + first_chunk + chunk) * unit_words;
      for (int i = lane; i < unit_words / 4; i += kWarpSize) {
        cp_async16_stream(to + r * unit_words * 4 + 16 * i, from + 4 * i);
      }
    }
  };
  const auto copy_tokens = [&](int chunk) {
    unsigned char* to = shared + chunk % kGemmStages * stage_bytes;
    const uint32_t* from = arguments.tokens + ((first_chunk + chunk) * all_tiles + first_token_tile) * kTokenTileWords;
    for (int i = threadIdx.x; i < kTokenBytes / 16; i += blockDim.x) cp_async16(to + 16 * i, from + 4 * i);
  };
#pragma unroll
  for (int chunk = 0; chunk < kGemmStages - 1; ++chunk) {
    if (chunk < chunks) copy_units(chunk);
  }
  grid_dependency_wait();
  launch_dependents();
#pragma unroll
  for (int chunk = 0; chunk < kGemmStages - 1; ++chunk) {
    if (chunk < chunks) copy_tokens(chunk);
    cp_async_commit();
  }

  float2 inverse[kGemmRowTiles];
#pragma unroll
  for (int r = 0; r < kGemmRowTiles; ++r) {
    const int64_t row = (first_tile + r) * kPlanesTileRows + g;
    const bool there = first_tile + r < w.tiles;
    inverse[r] =
        there ? make_float2(1.0f / arguments.problem.row_scales[row], 1.0f / arguments.problem.row_scales[row + 8])
              : make_float2(0.0f, 0.0f);
  }
  float acc[kGemmRowTiles][kTokenTiles][4] = {};
  for (int chunk = 0; chunk < chunks; ++chunk) {
    cp_async_wait<kGemmStages - 2>();
    __syncthreads();  // this chunk is there for all, and the one before it has been read by all
    if (chunk + kGemmStages - 1 < chunks) copy_units(chunk + kGemmStages - 1), copy_tokens(chunk + kGemmStages - 1);
    cp_async_commit();
    const unsigned char* stage = shared + chunk % kGemmStages * stage_bytes;
    const auto* tokens = reinterpret_cast<const uint32_t*>(stage);
    const auto* units = reinterpret_cast<const uint32_t*>(stage + kTokenBytes) + warp * kGemmRowTiles * unit_words;
    if (first_tile >= w.tiles) continue;
    uint32_t a[kGemmRowTiles][8][4];
#pragma unroll
    for (int r = 0; r < kGemmRowTiles; ++r) {
      const bool there = first_tile + r < w.tiles;
      const uint32_t* unit = units + (there ? r : 0) * unit_words;
      if constexpr (kMerged) {
        dequantize_merged(w, unit, lane, inverse[r], a[r]);
      } else {
        dequantize_planes(w, unit, lane, inverse[r], a[r]);
      }
    }
#pragma unroll
    for (int p = 0; p < 8; ++p) {
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i) {
        const uint2 words = load8(tokens + ((i * 8 + p) * kWarpSize + lane) * 2);
        const uint32_t b[2] = {words.x, words.y};
#pragma unroll
        for (int r = 0; r < kGemmRowTiles; ++r) mma_f16(acc[r][i], a[r][p], b);
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kGemmRowTiles; ++r) {
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t m = (first_token_tile + i) * 8 + 2 * t + e % 2;
        const int64_t n = (first_tile + r) * kPlanesTileRows + g + 8 * (e / 2);
        if (m >= w.io.M || n >= w.io.N) continue;
        const float sum = acc[r][i][e] * arguments.token_scales[m] * arguments.problem.row_scales[n];
        if (arguments.partial != nullptr) {
          arguments.partial[(blockIdx.y * w.io.M + m) * w.io.N + n] = sum;
        } else {
          store_result(w.io.y, w.io.bias, w.io.dtype, w.io.N, m, n, sum);
        }
      }
    }
  }
}

template <bool kMerged>
void launch_gemm(const GemmArguments& arguments, const LaunchShape& shape) {
  switch (arguments.plan.token_tiles) {
    case 2:
      return launch(dequant_gemm_kernel<2, kMerged>, shape, arguments);
    case 4:
      return launch(dequant_gemm_kernel<4, kMerged>, shape, arguments);
    default:
      return launch(dequant_gemm_kernel<8, kMerged>, shape, arguments);
  }
}

}  // namespace

DequantGemmPlan plan_dequant_gemm(const DequantGemmProblem& problem, const Gpu& gpu) {
  const BitPlanesProblem& w = problem.weight;
  DequantGemmPlan plan{};
  plan.token_tiles = w.io.M <= 16 ? 2 : w.io.M <= 32 ? 4 : 8;
  plan.token_blocks = ceil_div(w.io.M, 8 * plan.token_tiles);
  for (plan.warps = kWarps;; plan.warps /= 2) {
    const int64_t stage =
        int64_t(plan.token_tiles) * kTokenTileWords * 4 + plan.warps * kGemmRowTiles * w.unit_words() * 4;
    plan.shared_bytes = size_t(kGemmStages * stage);
    if (kGemmStages * stage <= gpu.shared_bytes) break;
    if (plan.warps == 1) {
      throw std::runtime_error("dequant_gemm: a block needs " + std::to_string(plan.shared_bytes) +
                               " bytes of shared memory, and the device has " + std::to_string(gpu.shared_bytes));
    }
  }
  plan.row_blocks = ceil_div(w.tiles, plan.warps * kGemmRowTiles);
  // K over as many blocks as fill the device once; each keeps 4 chunks, below which the second kernel costs more.
  const int64_t blocks = plan.row_blocks * plan.token_blocks;
  plan.splits = std::clamp<int64_t>(gpu.sm_count / blocks, 1, std::max<int64_t>(1, w.chunks / 4));
  plan.split_chunks = ceil_div(w.chunks, plan.splits);
  plan.splits = ceil_div(w.chunks, plan.split_chunks);
  return plan;
}

int64_t dequant_gemm_workspace(const DequantGemmProblem& problem, const Gpu& gpu) {
  const DequantGemmPlan plan = plan_dequant_gemm(problem, gpu);
  return tokens_bytes(problem, plan) + token_scales_bytes(plan) + split_workspace(problem.weight.io, plan.splits);
}

void dequant_gemm(const DequantGemmProblem& problem, const Gpu& gpu) {
  const BitPlanesProblem& w = problem.weight;
  const DequantGemmPlan plan = plan_dequant_gemm(problem, gpu);
  auto* workspace = static_cast<unsigned char*>(w.workspace);
  auto* tokens = reinterpret_cast<uint32_t*>(workspace);
  auto* token_scales = reinterpret_cast<float*>(workspace + tokens_bytes(problem, plan));
  float* partial = reinterpret_cast<float*>(workspace + tokens_bytes(problem, plan) + token_scales_bytes(plan));
  if (plan.splits == 1) partial = nullptr;

  launch(prepare_tokens_kernel, LaunchShape{dim3(unsigned(all_token_tiles(plan) * 8)), dim3(256), 0, gpu.stream, true},
         w.io, w.chunks, all_token_tiles(plan), tokens, token_scales);
  const LaunchShape shape{dim3(unsigned(plan.row_blocks), unsigned(plan.splits), unsigned(plan.token_blocks)),
                          dim3(unsigned(plan.warps * kWarpSize)), plan.shared_bytes, gpu.stream, true};
  const GemmArguments arguments{problem, plan, tokens, token_scales, partial};
  w.merged ? launch_gemm<true>(arguments, shape) : launch_gemm<false>(arguments, shape);
  if (partial != nullptr) reduce_splits(w.io, partial, plan.splits, gpu);
}

}  // namespace lutgemm::cuda
