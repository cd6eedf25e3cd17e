// y = x @ W.T with W made in registers from the units of bit_planes.cuh, and fp16 products with fp32 sums.
//
//   y[m, n] = token_scale[m] * row_scale[n] *
//             sum over k of half((x[m, k] - mean[m]) / token_scale[m]) * half(W[n, k] / row_scale[n])
//           + mean[m] * row_sum[n]
//
// The elements of a row and group have few values, so that what rounding W takes from them does not cancel: it is as if
// all were off by some 2^-13 of the largest, which activations of one sign would add up, K of them. So the mean of a
// token that is not of both signs alike is multiplied by the exact sums of rows; it is 0 for all others.
//
// Both scales are powers of two that bring the largest |x| of a token and |W| of a row to the upper range of fp16, so
// that its 11 bits hold whatever dtype and magnitude come in: errors are 2^-12 of an element of W, or 2^-17 of the
// largest of its row. dequant_planes.cuh says how, and which powers of two change sides.
//
// A first kernel writes the activations in the order of the form that reads them, p and i as in dequant_planes.cuh:
//
//   mma.sync   [chunk][token tile of 8][p 8][lane 4 * token + t][i = 0, 2, 1, 3]     fp16; a B fragment is 8 bytes
//   wgmma      [block of tokens][chunk][p 8][i even, odd][token][t 4][2]             drawn in wgmma_gemm.cu
//
// The mma.sync form, for GPUs without wgmma and up to 16 tokens:
//
//   block   [warps x 2 tiles of 16 rows] x [8 * kTokenTiles tokens], over the chunks of a split; a stage holds the
//           tokens of one chunk for all warps, and each warp's 2 units
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/dequant_gemm.h"
#include "cuda/dequant_planes.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.h"
#include "cuda/wgmma_gemm.h"

namespace lutgemm::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kRowTiles = 2;  // tiles of 16 rows that a warp has
constexpr int kStages = 3;
constexpr int kTokenTileWords = 8 * kWarpSize * 2;  // of one token tile and chunk
// Tokens from which wgmma is taken. Up to 16 an mma.sync block has little to do besides making W, as either form.
constexpr int64_t kWgmmaTokens = 17;

int64_t all_tokens(const DequantGemmPlan& plan) { return plan.token_blocks * plan.tokens; }

int64_t tokens_bytes(const DequantGemmProblem& p, const DequantGemmPlan& plan) {
  return p.weight.chunks * all_tokens(plan) * kTokenChunkBytes;
}

// Scales, and behind them means.
int64_t token_facts_bytes(const DequantGemmPlan& plan) { return round_up(2 * all_tokens(plan) * 4, 16); }

struct TokenOrder {
  bool wgmma;
  unsigned block_tokens;  // of a block of tokens: all of them for mma.sync
  int field_width;        // of the weight
};

constexpr int kPrepareThreads = 256;
constexpr int kPreparedTokens = 2;                                 // of a block; more would leave multiprocessors idle
constexpr int kPreparedFours = kPrepareThreads / kPreparedTokens;  // groups of 4 columns at a time

constexpr float kOneSided = 8.0f;  // of the square of a token's sum over its sum of squares: 1 for random signs

// Two tokens by a block: their scales and means, and their columns in the order of the products. Tokens past M are
// zeros. A warp has 64 columns of both, so that it fills sectors of 32 bytes on both sides.
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_tokens_kernel(const GpuIo io, int64_t chunks, TokenOrder order, uint32_t* tokens, float* token_scales,
                          float* token_means) {
  LUTGEMM_SHARED(float4, warp_facts, [kPreparedTokens][kPrepareThreads / kWarpSize + 1]);  // tokens in banks apart
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, t = lane % 4, own = lane / 4 % 2;
  const unsigned m = blockIdx.x * kPreparedTokens + own;
  const int64_t first_four = warp * 16 + lane / 8 * 4 + t;
  grid_dependency_wait();
  launch_dependents();
  const int64_t columns = m < io.M ? io.K : 0, fours = ceil_div(columns, 4);
  const auto load_some = [&](int64_t first, uint4(&bits)[kLoadsOfX]) {
#pragma unroll
    for (int i = 0; i < kLoadsOfX; ++i) {
      const int64_t four = first + i * kPreparedFours;
      bits[i] = four < fours ? load_four(io, m, 4 * four) : make_uint4(0, 0, 0, 0);
    }
  };
  float high = -INFINITY, low = INFINITY, sum = 0.0f, squares = 0.0f;
  for (int64_t first = first_four; first < fours; first += kLoadsOfX * kPreparedFours) {
    uint4 bits[kLoadsOfX];
    load_some(first, bits);
#pragma unroll
    for (int i = 0; i < kLoadsOfX; ++i) {
      float v[4];
      as_four(io.dtype, bits[i], v);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        high = fmaxf(high, v[e]), low = fminf(low, v[e]);
        sum += v[e], squares = fmaf(v[e], v[e], squares);
      }
    }
  }
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    if (distance == 4) continue;  // lane ^ 4 has the other token
    high = fmaxf(high, __shfl_xor_sync(kFullMask, high, distance));
    low = fminf(low, __shfl_xor_sync(kFullMask, low, distance));
    sum += __shfl_xor_sync(kFullMask, sum, distance);
    squares += __shfl_xor_sync(kFullMask, squares, distance);
  }
  if (lane < 8 && t == 0) warp_facts[own][warp] = make_float4(high, low, sum, squares);
  __syncthreads();
  sum = squares = 0.0f;
#pragma unroll
  for (int w = 0; w < kPrepareThreads / kWarpSize; ++w) {
    const float4 facts = warp_facts[own][w];
    high = fmaxf(high, facts.x), low = fminf(low, facts.y);
    sum += facts.z, squares += facts.w;
  }
  // Not where the squares overflow: infinity is not larger than infinity.
  const float mean = sum * sum > kOneSided * squares ? sum / static_cast<float>(io.K) : 0.0f;
  const float most = fmaxf(0.0f, fmaxf(high - mean, mean - low));
  // 2^(exponent of most - 14): the largest becomes 2^14 .. 2^15. 1 for zeros, subnormals, and infinities.
  const int exponent = (__float_as_int(most) >> 23) & 0xff;
  const int biased = exponent <= 15 || exponent == 255 ? 127 : exponent - 14;
  const float scale = __int_as_float(biased << 23);
  const float inverse = 1.0f / scale;
  if (warp == 0 && lane < 8 && t == 0) token_scales[m] = scale, token_means[m] = mean;

  const int64_t all_fours = chunks * (kPlanesChunk / 4);
  const unsigned block = m / order.block_tokens, in_block = m % order.block_tokens;
  for (int64_t first = first_four; first < all_fours; first += kLoadsOfX * kPreparedFours) {
    uint4 bits[kLoadsOfX];
    load_some(first, bits);
#pragma unroll
    for (int i = 0; i < kLoadsOfX; ++i) {
      const int64_t four = first + i * kPreparedFours, chunk = four / 32;
      if (four >= all_fours) break;
      float v[4];
      as_four(io.dtype, bits[i], v);
#pragma unroll
      for (int e = 0; e < 4; ++e) v[e] = 4 * four + e < columns ? v[e] - mean : 0.0f;
      const int p = static_cast<int>(four % 32) / 4;
      const float factor = inverse * __int_as_float((127 - order.field_width * p % 8) << 23);
      const uint32_t even = pair_bits(__floats2half2_rn(v[0] * factor, v[2] * factor));
      const uint32_t odd = pair_bits(__floats2half2_rn(v[1] * factor, v[3] * factor));
      if (order.wgmma) {
        uint32_t* to = tokens + (((block * chunks + chunk) * 16 + 2 * p) * order.block_tokens + in_block) * 4 + t;
        to[0] = even, to[4 * order.block_tokens] = odd;
      } else {
        const int64_t at = ((chunk * (order.block_tokens / 8) + m / 8) * 8 + p) * kWarpSize + (m % 8) * 4 + t;
        store8(tokens + 2 * at, make_uint2(even, odd));
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
  const int64_t first_tile = (static_cast<int64_t>(blockIdx.x) * warps + warp) * kRowTiles;
  const int64_t all_tiles = arguments.plan.token_blocks * kTokenTiles;
  const int64_t first_token_tile = static_cast<int64_t>(blockIdx.z) * kTokenTiles;

  const int unit_words = static_cast<int>(w.unit_words());
  constexpr int kTokenBytes = kTokenTiles * kTokenTileWords * 4;
  const int stage_bytes = kTokenBytes + warps * kRowTiles * unit_words * 4;
  unsigned char* shared = dynamic_shared();
  const auto copy_units = [&](int chunk) {
    unsigned char* to = shared + chunk % kStages * stage_bytes + kTokenBytes + warp * kRowTiles * unit_words * 4;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      if (first_tile + r >= w.tiles) break;
      const uint32_t* from = w.packed + ((first_tile + r) * w.chunks + first_chunk + chunk) * unit_words;
      for (int i = lane; i < unit_words / 4; i += kWarpSize) {
        cp_async16_stream(to + r * unit_words * 4 + 16 * i, from + 4 * i);
      }
    }
  };
  const auto copy_tokens = [&](int chunk) {
    unsigned char* to = shared + chunk % kStages * stage_bytes;
    const uint32_t* from = arguments.tokens + ((first_chunk + chunk) * all_tiles + first_token_tile) * kTokenTileWords;
    for (int i = threadIdx.x; i < kTokenBytes / 16; i += blockDim.x) cp_async16(to + 16 * i, from + 4 * i);
  };
#pragma unroll
  for (int chunk = 0; chunk < kStages - 1; ++chunk) {
    if (chunk < chunks) copy_units(chunk);
  }
  grid_dependency_wait();
  launch_dependents();
#pragma unroll
  for (int chunk = 0; chunk < kStages - 1; ++chunk) {
    if (chunk < chunks) copy_tokens(chunk);
    cp_async_commit();
  }

  float2 inverse[kRowTiles];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    const int64_t row = (first_tile + r) * kPlanesTileRows + g;
    const bool there = first_tile + r < w.tiles;
    inverse[r] = there ? make_float2(kInverseUnit / arguments.problem.row_scales[row],
                                     kInverseUnit / arguments.problem.row_scales[row + 8])
                       : make_float2(0.0f, 0.0f);
  }
  float acc[kRowTiles][kTokenTiles][4] = {};
  for (int chunk = 0; chunk < chunks; ++chunk) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this chunk is there for all, and the one before it has been read by all
    if (chunk + kStages - 1 < chunks) copy_units(chunk + kStages - 1), copy_tokens(chunk + kStages - 1);
    cp_async_commit();
    const unsigned char* stage = shared + chunk % kStages * stage_bytes;
    const auto* tokens = reinterpret_cast<const uint32_t*>(stage);
    const auto* units = reinterpret_cast<const uint32_t*>(stage + kTokenBytes) + warp * kRowTiles * unit_words;
    if (first_tile >= w.tiles) continue;
    uint32_t a[kRowTiles][8][4];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const bool there = first_tile + r < w.tiles;
      const uint32_t* unit = units + (there ? r : 0) * unit_words;
      dequantize_unit<kMerged>(w, unit, lane, inverse[r], a[r]);
    }
#pragma unroll
    for (int p = 0; p < 8; ++p) {
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i) {
        const uint2 words = load8(tokens + ((i * 8 + p) * kWarpSize + lane) * 2);
        const uint32_t b[2] = {words.x, words.y};
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) mma_f16(acc[r][i], a[r][p], b);
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t m = (first_token_tile + i) * 8 + 2 * t + e % 2;
        const int64_t n = (first_tile + r) * kPlanesTileRows + g + 8 * (e / 2);
        if (m >= w.io.M || n >= w.io.N) continue;
        const float of_row = acc[r][i][e] * (arguments.problem.row_scales[n] * kRegisterUnit);
        float sum = of_row * arguments.token_scales[m];  // in this order as in wgmma_gemm.cu
        if (blockIdx.y == 0) sum += arguments.problem.row_sums[n] * arguments.token_means[m];
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
  switch (arguments.plan.tokens) {
    case 16:
      return launch(dequant_gemm_kernel<2, kMerged>, shape, arguments);
    case 32:
      return launch(dequant_gemm_kernel<4, kMerged>, shape, arguments);
    default:
      return launch(dequant_gemm_kernel<8, kMerged>, shape, arguments);
  }
}

[[noreturn]] void refuse_shared(size_t bytes, const Gpu& gpu) {
  throw std::runtime_error("dequant_gemm: a block needs " + std::to_string(bytes) +
                           " bytes of shared memory, and the device has " + std::to_string(gpu.shared_bytes));
}

DequantGemmPlan plan_mma_sync(const DequantGemmProblem& problem, const Gpu& gpu) {
  const BitPlanesProblem& w = problem.weight;
  DequantGemmPlan plan{};
  plan.tokens = w.io.M <= 16 ? 16 : w.io.M <= 32 ? 32 : 64;
  plan.token_blocks = ceil_div(w.io.M, plan.tokens);
  plan.stages = kStages;
  for (plan.warps = kWarps;; plan.warps /= 2) {
    const int64_t stage = int64_t(plan.tokens) * kTokenChunkBytes + plan.warps * kRowTiles * w.unit_words() * 4;
    plan.shared_bytes = size_t(kStages * stage);
    if (kStages * stage <= gpu.shared_bytes) break;
    if (plan.warps == 1) refuse_shared(plan.shared_bytes, gpu);
  }
  plan.row_blocks = ceil_div(w.tiles, plan.warps * kRowTiles);
  // K over as many blocks as fill the device once; each keeps 4 chunks, below which the second kernel costs more.
  const int64_t blocks = plan.row_blocks * plan.token_blocks;
  plan.splits = std::clamp<int64_t>(gpu.sm_count / blocks, 1, std::max<int64_t>(1, w.chunks / 4));
  plan.split_chunks = ceil_div(w.chunks, plan.splits);
  plan.splits = ceil_div(w.chunks, plan.split_chunks);
  return plan;
}

}  // namespace

DequantGemmPlan plan_dequant_gemm(const DequantGemmProblem& problem, const Gpu& gpu) {
  const bool asked = problem.form == GemmForm::kWgmma;
  const bool best = problem.form == GemmForm::kBest && problem.weight.io.M >= kWgmmaTokens;
  if ((asked || best) && has_wgmma(gpu)) {
    const DequantGemmPlan plan = plan_wgmma_gemm(problem, gpu);
    if (plan.stages > 0) return plan;
    if (asked) refuse_shared(plan.shared_bytes, gpu);
  }
  if (asked) throw std::runtime_error("dequant_gemm: this device, or this build of the library, has no wgmma");
  return plan_mma_sync(problem, gpu);
}

int64_t dequant_gemm_workspace(const DequantGemmProblem& problem, const Gpu& gpu) {
  const DequantGemmPlan plan = plan_dequant_gemm(problem, gpu);
  return tokens_bytes(problem, plan) + token_facts_bytes(plan) + split_workspace(problem.weight.io, plan.splits);
}

void dequant_gemm(const DequantGemmProblem& problem, const Gpu& gpu) {
  const BitPlanesProblem& w = problem.weight;
  const DequantGemmPlan plan = plan_dequant_gemm(problem, gpu);
  auto* workspace = static_cast<unsigned char*>(w.workspace);
  auto* tokens = reinterpret_cast<uint32_t*>(workspace);
  auto* token_scales = reinterpret_cast<float*>(workspace + tokens_bytes(problem, plan));
  float* token_means = token_scales + all_tokens(plan);
  float* partial = reinterpret_cast<float*>(workspace + tokens_bytes(problem, plan) + token_facts_bytes(plan));
  if (plan.splits == 1) partial = nullptr;

  const TokenOrder order{plan.wgmma, unsigned(plan.wgmma ? plan.tokens : all_tokens(plan)), field_width(w)};
  const LaunchShape prepare{dim3(unsigned(all_tokens(plan) / kPreparedTokens)), dim3(kPrepareThreads), 0, gpu.stream,
                            true};
  launch(prepare_tokens_kernel, prepare, w.io, w.chunks, order, tokens, token_scales, token_means);
  const GemmArguments arguments{problem, plan, tokens, token_scales, token_means, partial};
  if (plan.wgmma) {
    launch_wgmma_gemm(arguments, gpu);
  } else {
    const LaunchShape shape{dim3(unsigned(plan.row_blocks), unsigned(plan.splits), unsigned(plan.token_blocks)),
                            dim3(unsigned(plan.warps * kWarpSize)), plan.shared_bytes, gpu.stream, true};
    w.merged ? launch_gemm<true>(arguments, shape) : launch_gemm<false>(arguments, shape);
  }
  if (partial != nullptr) reduce_splits(w.io, partial, plan.splits, gpu);
}

}  // namespace lutgemm::cuda
