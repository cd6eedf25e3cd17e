// The Hopper form of dequant_gemm: A of wgmma in registers, where dequantize_unit makes it, B in shared memory by bulk
// copies.
//
//   block   256 rows x kTokens tokens over the chunks of 128 columns of a split; 2 warpgroups of 4 warps. Warp w has
//           the tiles of 16 rows w and w + 8, so that those of a warpgroup make two times the 64 rows of a wgmma
//   stage   [tokens of a chunk] [warp 8][tile 2][unit], a ring of 2 to 6; each unit and the tokens are one bulk copy.
//           `full`: 8 arrivals, each warp's with the bytes that it asks for. `free`: 8 arrivals, when the products of a
//           warp with the tokens are done. A warp asks for its own units as soon as it has read the old ones, thread 0
//           for the tokens up to two chunks later, so that it seldom waits for the other warps
//
//   tokens  [block of tokens][chunk][p 8][i even, odd][token][t 4][2]     fp16: columns 16p + 4t + i, i = 0, 2; 1, 3
//           8 tokens x 16 bytes are a core matrix: 128 bytes to the next 8 tokens, 16 kTokens to the other half of the
//           16 k. The k of a product are those of the fragments in dequant_planes.cuh
//
//   warp    products of tile 0  |  makes tile 1  |  products of tile 1  |  makes tile 0 of the next chunk  | ...
//           --- run here ------------------->       --- run here ----------------------------------->
//
// so the tensor cores work while registers are made, and the other warpgroup's products fill what gaps are left.
//
// Counts from SASS (sm_90a, kTokens = 64, fp16 scales), instructions of a warp for a unit of 16 x 128 weights: 288 for
// 2 planes and 87 for each further one, of which 64 are the ANDs and fmas; 4 more a plane for groups below 128; uniform
// 4 bits 200. In these are 24 for the 8 products with their descriptors. A multiprocessor issues 4 a clock, so that the
// 16 units of a chunk of a block take, against 16 clocks a token of the tensor cores (2048 multiply-adds a clock),
//
//   planes          2      3      4      8     uniform 4          tokens            32     64    128
//   clocks       1152   1500   1848   3240           800          clocks           512   1024   2048
//
// and an 8192 x 8192 layer, 16 chunks for each of 128 blocks, at 1.7 GHz, by the slower of the two or of the memory's
// 3.35 TB/s (11 us at 4 bits): 17 us for 4 planes up to 64 tokens, 19 for 128, 39 for 256; uniform 4 bits 11, 19, 39.
// All this is counted, and nothing measured.
//
// Why not 256 tokens in a block: it would have 128 rows, since accumulators fill the registers. Tokens come from L2 for
// each block of rows, so that its copies would ask for 32 bytes a clock and multiprocessor at full rate, where those of
// 256 rows ask for 16, and 5 to 9 for units; L2 gives some 25 to 38, by what is published.
#include <algorithm>

#include "cuda/dequant_planes.cuh"
#include "cuda/launch.cuh"
#include "cuda/wgmma_block.cuh"
#include "cuda/wgmma_gemm.h"

namespace lutgemm::cuda {
namespace {

constexpr int kWarps = 8;     // two warpgroups, and 255 registers for a thread
constexpr int kRowTiles = 2;  // of a warp, 16 rows each
constexpr int kBlockRows = kWarps * kRowTiles * kPlanesTileRows;
constexpr int kSumsPitch = kBlockRows + 4;  // the tokens of a quad, 2 apart, in banks 8 apart
constexpr int kMostStages = 6;              // some 100 KB under way, four times what latency asks for
constexpr int kMostTokens = 128;            // of a block

static_assert(kBlockRows == kWarps * kWarpSize, "a thread writes one row of y");

template <int kTokens, bool kMerged>
__global__ void LUTGEMM_WGMMA_BOUNDS(kWarps* kWarpSize) wgmma_gemm_kernel(const GemmArguments arguments) {
#ifdef LUTGEMM_HAS_WGMMA
  constexpr int kTokenBytes = kTokens * kTokenChunkBytes;
  LUTGEMM_SHARED(uint64_t, full, [kMostStages]);
  LUTGEMM_SHARED(uint64_t, free, [kMostStages]);
  const BitPlanesProblem& w = arguments.problem.weight;
  const DequantGemmPlan& plan = arguments.plan;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, g = lane / 4;
  const int stages = plan.stages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) mbarrier_init(full + i, kWarps), mbarrier_init(free + i, kWarps);
    mbarrier_init_fence();
  }
  __syncthreads();

  const unsigned row_block = blockIdx.x / unsigned(plan.token_blocks);
  const unsigned token_block = blockIdx.x % unsigned(plan.token_blocks);
  const int64_t first_chunk = blockIdx.y * plan.split_chunks;
  const int chunks =
      static_cast<int>(first_chunk + plan.split_chunks < w.chunks ? plan.split_chunks : w.chunks - first_chunk);
  const int64_t first_tile = static_cast<int64_t>(row_block) * kWarps * kRowTiles + warp;

  const int unit_bytes = static_cast<int>(w.unit_words()) * 4;
  const int stage_bytes = kTokenBytes + kWarps * kRowTiles * unit_bytes;
  unsigned char* shared = dynamic_shared();
  const auto own_units = [&](int stage) {
    return shared + stage * stage_bytes + kTokenBytes + warp * kRowTiles * unit_bytes;
  };
  const unsigned char* from[kRowTiles];  // the warp's units of the first chunk
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    const int64_t tile = min(first_tile + r * kWarps, w.tiles - 1);
    from[r] = reinterpret_cast<const unsigned char*>(w.packed) + (tile * w.chunks + first_chunk) * unit_bytes;
  }
  const auto copy_units = [&](int stage, int chunk) {
    mbarrier_arrive_expect(full + stage, kRowTiles * unit_bytes + (warp == 0 ? kTokenBytes : 0));
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      unsigned char* to = own_units(stage) + r * unit_bytes;
      const unsigned char* unit = from[r] + static_cast<int64_t>(chunk) * unit_bytes;
      if constexpr (kTokens < kMostTokens) {
        bulk_copy_stream(to, unit, unit_bytes, full + stage);
      } else {
        bulk_copy(to, unit, unit_bytes, full + stage);  // there may be more blocks of tokens
      }
    }
  };
  const auto copy_tokens = [&](int stage, int chunk) {
    const auto* from = reinterpret_cast<const unsigned char*>(arguments.tokens) +
                       (token_block * w.chunks + first_chunk + chunk) * kTokenBytes;
    bulk_copy(shared + stage * stage_bytes, from, kTokenBytes, full + stage);
  };
  const int begun = min(stages, chunks);
  if (lane == 0) {
#pragma unroll 1
    for (int chunk = 0; chunk < begun; ++chunk) copy_units(chunk, chunk);
  }
  grid_dependency_wait();
  launch_dependents();
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int chunk = 0; chunk < begun; ++chunk) copy_tokens(chunk, chunk);
  }
  __syncwarp();

  float2 inverse[kRowTiles];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    const int64_t row = min(first_tile + r * kWarps, w.tiles - 1) * kPlanesTileRows + g;
    inverse[r] = make_float2(kInverseUnit / arguments.problem.row_scales[row],
                             kInverseUnit / arguments.problem.row_scales[row + 8]);
  }

  float acc[kRowTiles][kTokens / 2] = {};
  uint32_t a[kRowTiles][8][4];
  const auto dequantize = [&](int stage, auto tile) {
    constexpr int kTile = decltype(tile)::value;
    const auto* unit = reinterpret_cast<const uint32_t*>(own_units(stage) + kTile * unit_bytes);
    dequantize_unit<kMerged>(w, unit, lane, inverse[kTile], a[kTile]);
  };
  const auto multiply = [&](int stage, auto tile) {
    constexpr int kTile = decltype(tile)::value;
    multiply_steps<kTokens>(acc[kTile], a[kTile], shared + stage * stage_bytes);
  };
  using First = std::integral_constant<int, 0>;
  using Second = std::integral_constant<int, 1>;

  Ring now{stages}, refilled{stages};
  const int lag = stages > 2 ? 2 : 1;  // chunks that warps may be apart before one waits for another
  mbarrier_wait(full, 0);
  dequantize(0, First{});
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int stage = now.stage;
    multiply(stage, First{});
    dequantize(stage, Second{});
    multiply(stage, Second{});
    fence_async_proxy();
    __syncwarp();  // the units of this chunk have been read by all lanes
    if (lane == 0 && chunk + stages < chunks) copy_units(stage, chunk + stages);
    wgmma_wait<1>();
    hold_registers(acc[0]);
    now.advance();
    if (chunk + 1 < chunks) {
      mbarrier_wait(full + now.stage, now.phase);
      dequantize(now.stage, First{});
    }
    wgmma_wait<0>();
    hold_registers(acc[1]);
    if (lane == 0) mbarrier_arrive(free + stage);
    const int next = chunk + 1 - lag + stages;
    if (threadIdx.x == 0 && chunk + 1 >= lag && next < chunks) {
      mbarrier_wait(free + refilled.stage, refilled.phase);
      copy_tokens(refilled.stage, next);
      refilled.advance();
    }
  }

  // Through shared memory to whole rows of y or of the partial sums: [token][row], and both sides without conflicts.
  __syncthreads();
  auto* sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    store_sums<kTokens, kSumsPitch>(acc[r], sums + (r * kWarps + warp) * kPlanesTileRows);
  }
  __syncthreads();
  const int64_t n = static_cast<int64_t>(row_block) * kBlockRows + threadIdx.x;
  if (n >= w.io.N) return;
  const float row_unit = arguments.problem.row_scales[n] * kRegisterUnit;
  const float row_sum = blockIdx.y == 0 ? arguments.problem.row_sums[n] : 0.0f;
  const bool whole = arguments.partial == nullptr;
  const float bias = whole && w.io.bias != nullptr ? load_value(w.io.bias, w.io.dtype, n) : 0.0f;
  const int64_t first_token = static_cast<int64_t>(token_block) * kTokens;
  const int tokens = static_cast<int>(w.io.M - first_token < kTokens ? w.io.M - first_token : kTokens);
  for (int m = 0; m < tokens; ++m) {
    // Row first: what a token of 2^100 gives is then finite, wherever y is.
    const float of_row = sums[m * kSumsPitch + threadIdx.x] * row_unit;
    const float mean = row_sum * arguments.token_means[first_token + m];
    const float sum = of_row * arguments.token_scales[first_token + m] + mean + bias;
    if (whole) {
      store_value(w.io.y, w.io.dtype, (first_token + m) * w.io.N + n, sum);
    } else {
      arguments.partial[(blockIdx.y * w.io.M + first_token + m) * w.io.N + n] = sum;
    }
  }
#endif
}

template <bool kMerged>
void launch_kernel(const GemmArguments& arguments, const LaunchShape& shape) {
  switch (arguments.plan.tokens) {
    case 32:
      return launch(wgmma_gemm_kernel<32, kMerged>, shape, arguments);
    case 64:
      return launch(wgmma_gemm_kernel<64, kMerged>, shape, arguments);
    default:
      return launch(wgmma_gemm_kernel<128, kMerged>, shape, arguments);
  }
}

}  // namespace

bool has_wgmma(const Gpu& gpu) {
  if (gpu.capability != 90) return false;
  static const bool compiled = has_body(wgmma_gemm_kernel<64, false>);
  return compiled;
}

DequantGemmPlan plan_wgmma_gemm(const DequantGemmProblem& problem, const Gpu& gpu) {
  const BitPlanesProblem& w = problem.weight;
  DequantGemmPlan plan{};
  plan.wgmma = true;
  plan.tokens = w.io.M <= 32 ? 32 : w.io.M <= 64 ? 64 : kMostTokens;
  plan.token_blocks = ceil_div(w.io.M, plan.tokens);
  plan.warps = kWarps;
  const int64_t stage = int64_t(plan.tokens) * kTokenChunkBytes + kWarps * kRowTiles * w.unit_words() * 4;
  constexpr int64_t kBarriers = 1024;  // at most, of the static kind
  plan.stages = int(std::min<int64_t>(kMostStages, (gpu.shared_bytes - kBarriers) / stage));
  if (plan.stages < 2) plan.stages = 0;
  plan.shared_bytes = size_t(std::max(std::max(plan.stages, 2) * stage, int64_t(plan.tokens) * kSumsPitch * 4));
  plan.row_blocks = ceil_div(w.tiles, kWarps * kRowTiles);
  // K over as many blocks as fill the device once; each keeps 2 chunks, below which the second kernel costs more.
  const int64_t blocks = plan.row_blocks * plan.token_blocks;
  plan.splits = std::clamp<int64_t>(gpu.sm_count / blocks, 1, std::max<int64_t>(1, w.chunks / 2));
  plan.split_chunks = ceil_div(w.chunks, plan.splits);
  plan.splits = ceil_div(w.chunks, plan.split_chunks);
  return plan;
}

void launch_wgmma_gemm(const GemmArguments& arguments, const Gpu& gpu) {
  const DequantGemmPlan& plan = arguments.plan;
  const LaunchShape shape{dim3(unsigned(plan.row_blocks * plan.token_blocks), unsigned(plan.splits)),
                          dim3(kWarps * kWarpSize), plan.shared_bytes, gpu.stream, true};
  if (arguments.problem.weight.merged) {
    launch_kernel<true>(arguments, shape);
  } else {
    launch_kernel<false>(arguments, shape);
  }
}

}  // namespace lutgemm::cuda
