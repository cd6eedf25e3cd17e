// codebook_mma for more than 16 tokens: the centroids that a warp looks up serve 32 of them.
//
//   fragments, table    as in codebook_mma.cu: A tokens x inputs, B inputs x rows of W
//   block   8 warps, each with 32 rows of its own, and 32 tokens; a part of K
//   stage   x of some steps for all warps, by cp.async, while the stage before it is multiplied:
//           [step][mma][tile of 16 tokens][lane][a[0] .. a[3]]: a fragment of A is one 16-byte load
//
// Counts for 32 rows and 16 inputs of one codebook of v = 4, 1024 bits of codes: 8 wavefronts for look-ups and 8 for x,
// 8 mma, at 0.63 a clock 13 clocks: 64 bits a clock. Two codebooks of v = 8 are added in x's dtype where accuracy
// allows it, as `dequantize` does, and take 24 wavefronts for as many mma. An 8192 x 8192 layer takes 9 us for 32
// tokens at 1.7 GHz, and two codebooks of v = 8 take 14. Derived, not measured.
#include <algorithm>
#include <cstdint>

#include "cuda/codebook_mma.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/reduce.h"

namespace lutgemm::cuda {
namespace {

using namespace mma_parts;

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kMostStageBytes = 32 << 10;

constexpr int kOctets = 4;  // of tokens
constexpr int kTiles = kOctets / 2, kTokens = 8 * kOctets;

// Other vec_len take codes item by item: they are rare, and kernels take time to compile.
LUTGEMM_ANYWHERE constexpr bool is_usual(int vec_len) { return vec_len == 4 || vec_len == 8; }

// One of the two stages, for the lane that reads it.
template <int kVec>
struct StageX {
  using S = Shape<kVec>;
  static constexpr int kTileBytes = kWarpSize * 16;
  static constexpr int kMmaBytes = kTiles * kTileBytes, kStepBytes = S::kMmas * kMmaBytes;
  const unsigned char* at;
  int first_step;  // of the block

  __device__ __forceinline__ void load(int step, int tile, uint32_t (&x)[S::kMmas][4]) const {
#pragma unroll
    for (int m = 0; m < S::kMmas; ++m) {
      const uint4 v = load16(at + (step - first_step) * kStepBytes + m * kMmaBytes + tile * kTileBytes);
      x[m][0] = v.x, x[m][1] = v.y, x[m][2] = v.z, x[m][3] = v.w;
    }
  }
};

// A thread's share of the copies of x: one word, two inputs, of each step and mma. A warp's words lie side by side in
// the stage, and are 4 tokens' whole sectors (v <= 4).
template <int kVec>
struct CopyX {
  using S = Shape<kVec>;
  using Stage = StageX<kVec>;
  static_assert(kWarps * kWarpSize == kTokens * 8, "a thread for each word");
  const MmaArguments& a;
  const uint16_t* row;
  bool there;
  int offset;  // of the inputs, from the beginning of a step
  int to;      // from the beginning of a stage

  __device__ __forceinline__ CopyX(const MmaArguments& arguments, int first_token) : a(arguments) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int quad = warp % 4 * 8 + lane / 4, word = lane % 4;  // of a tile: lane `quad` will read it, as a[word]
    const int token = first_token + warp / 4 * 16 + quad / 4 + word % 2 * 8;
    there = token < a.tokens;
    row = static_cast<const uint16_t*>(a.io.x) + (there ? token : 0) * a.io.x_stride;
    offset = quad % 4 * S::kWidth + word / 2 * 2;
    to = warp / 4 * Stage::kTileBytes + quad * 16 + word * 4;
  }

  // Steps first .. first + steps - 1; zeros past the end of a group, of K, and of tokens.
  __device__ __forceinline__ void stage(unsigned char* stage, int first, int steps) const {
    const int K = static_cast<int>(a.io.K);
    const bool simple = a.straight && a.aligned && (first + steps) * S::kInputs <= K;
    stage += to;
#pragma unroll 2
    for (int s = 0; s < steps; ++s, stage += Stage::kStepBytes) {
      int k = (first + s) * S::kInputs + offset, end = K;
      if (!a.straight) {
        const int group = (first + s) / a.steps.steps_per_group;
        k = group * a.group_size + (first + s - group * a.steps.steps_per_group) * S::kInputs + offset;
        end = min(K, (group + 1) * a.group_size);
      }
#pragma unroll
      for (int m = 0; m < S::kMmas; ++m) {
        unsigned char* word = stage + m * Stage::kMmaBytes;
        const uint16_t* from = row + k + 4 * m;
        const int left = end - k - 4 * m;
        if (simple || (left >= 2 && a.aligned)) {
          cp_async4(word, from, there);
        } else {
          const uint32_t low = there && left >= 1 ? from[0] : 0, high = there && left >= 2 ? from[1] : 0;
          *reinterpret_cast<uint32_t*>(word) = low | high << 16;
        }
      }
    }
  }
};

template <int kVec, bool kBf16>
__global__ void __launch_bounds__(kThreads, 1) codebook_gemm_kernel(MmaArguments a) {
  using Stage = StageX<kVec>;
  unsigned char* table = dynamic_shared();
  unsigned char* stages = table + a.table_bytes;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = __shfl_sync(kFullMask, threadIdx.x / kWarpSize, 0);  // one value a warp, as the compiler then knows
  const int row_block = blockIdx.x / a.token_blocks, token_block = blockIdx.x - row_block * a.token_blocks;
  const OwnBlocks own = own_blocks(a.rows, row_block);
  const int tile = own.blocks.first_unit + own.number * kWarps + warp, first_token = token_block * kTokens;
  const int first_chunk = blockIdx.y * a.split_chunks;
  const int end_chunk = min(first_chunk + a.split_chunks, a.steps.chunks);
  const int first_step = first_chunk * kChunkItems / a.steps.items;
  const int end_step = end_chunk * kChunkItems / a.steps.items;
  const int stage_steps = a.stage_chunks * kChunkItems / a.steps.items;
  const bool there = tile < own.blocks.first_unit + own.blocks.units;

  // Codes of this warp; those `ahead` are under way.
  constexpr int kAhead = 2;
  const int64_t load_bytes = static_cast<int64_t>(a.steps.chunks) * kChunkBytes;  // 16 rows
  const unsigned char* next =
      a.codes + kLaneBytes * lane + kLoads * load_bytes * tile + static_cast<int64_t>(first_chunk) * kChunkBytes;
  int left = there ? end_chunk - first_chunk : 0;
  uint4 ahead[kAhead][kLoads];
  const auto load_next = [&](uint4(&to)[kLoads]) {
    if (left > 0) {
      --left;
#pragma unroll
      for (int l = 0; l < kLoads; ++l) to[l] = load_stream16(next + l * load_bytes);
      next += kChunkBytes;
    }
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load_next(ahead[i]);
  fill_table<kVec, kThreads>(a, own.sibling, table);
  const CopyX<kVec> copy(a, first_token);
  grid_dependency_wait();
  launch_dependents();
  copy.stage(stages, first_step, min(stage_steps, end_step - first_step));
  cp_async_commit();

  Stage x{stages + 16 * lane, 0};
  WarpSums<kVec, kBf16, kOctets, Stage> w(a, x, table, first_step);
  if (there) w.begin(tile, first_chunk);
  for (int chunk = first_chunk, stage = 0; chunk < end_chunk; ++stage) {
    cp_async_wait<0>();
    __syncthreads();  // this stage is there for all, and the one before it has been read by all
    const int step = first_step + (stage + 1) * stage_steps;
    if (step < end_step) {
      copy.stage(stages + (stage + 1) % 2 * a.x_bytes, step, min(stage_steps, end_step - step));
    }
    cp_async_commit();
    x.at = stages + stage % 2 * a.x_bytes + 16 * lane;
    x.first_step = stage * stage_steps;
    const int stage_end = min(chunk + a.stage_chunks, end_chunk);
    if (!there) {
      chunk = stage_end;
      continue;
    }
#pragma unroll 1
    for (; chunk < stage_end; ++chunk) {
      if constexpr (is_usual(kVec)) {
        w.template chunk<true>(ahead[0]);
      } else {
        w.any_steps(ahead[0]);
      }
#pragma unroll
      for (int i = 0; i + 1 < kAhead; ++i) {
#pragma unroll
        for (int l = 0; l < kLoads; ++l) ahead[i][l] = ahead[i + 1][l];
      }
      load_next(ahead[kAhead - 1]);
    }
  }
  if (!there) return;
  w.end_group();

  const float unit = a.units[3 * own.sibling] * a.units[3 * own.sibling + 1];
  const int64_t first_n = static_cast<int64_t>(tile) * kMmaTileRows + 2 * (lane % 4);
  const bool pairs = a.io.N % 2 == 0;
#pragma unroll
  for (int octet = 0; octet < kOctets; ++octet) {
    const int64_t m = first_token + octet * 8 + lane / 4;
    if (m >= a.tokens) continue;
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      const int64_t n = first_n + 8 * f;
      const float sums[2] = {w.outer[f][2 * octet] * unit, w.outer[f][2 * octet + 1] * unit};
      float* partial = a.partial + (blockIdx.y * a.io.M + m) * a.io.N + n;
      if (a.splits > 1 && pairs && n < a.io.N) {
        store8(partial, make_uint2(__float_as_uint(sums[0]), __float_as_uint(sums[1])));
        continue;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (n + i >= a.io.N) continue;
        if (a.splits > 1) {
          partial[i] = sums[i];
        } else {
          store_result(a.io.y, a.io.bias, kBf16 ? DType::kBFloat16 : DType::kFloat16, a.io.N, m, n + i, sums[i]);
        }
      }
    }
  }
}

template <int kVec>
void launch_gemm(const MmaArguments& a, const LaunchShape& shape) {
  if (a.io.dtype == DType::kBFloat16) {
    launch(codebook_gemm_kernel<kVec, true>, shape, a);
  } else {
    launch(codebook_gemm_kernel<kVec, false>, shape, a);
  }
}

// Clocks of an SM for one step of its 8 warps: look-ups and x from shared memory, or mma.
int64_t step_clocks(const CodebookMmaProblem& p, const MmaSteps& steps) {
  const int64_t wavefronts = 2 * p.planes * steps.slots * p.vec_len + steps.width * kTiles;
  const int64_t multiplied = p.planes == 2 && p.half_tables ? 1 : p.planes;
  return kWarps * std::max(wavefronts, multiplied * steps.width * kTiles * 8 / 5);
}

}  // namespace

CodebookGemmPlan plan_codebook_gemm(const CodebookMmaProblem& p, int sm_count, int shared_limit) {
  CodebookGemmPlan plan{};
  if (p.io.M <= 16) return plan;
  const MmaSteps steps = mma_steps(p.io.K, p.group_size, p.planes, p.vec_len);
  const int64_t token_blocks = ceil_div(p.io.M, kTokens);
  plan.rows = whole_blocks(p.siblings, p.io.N, kWarps);
  const int64_t row_blocks = dealt_blocks(plan.rows);
  if (token_blocks * row_blocks > INT32_MAX) return plan;
  plan.token_blocks = static_cast<int>(token_blocks), plan.row_blocks = static_cast<int>(row_blocks);

  const int64_t units = steps.chunks / steps.unit_chunks;
  const int64_t unit_steps = int64_t(steps.unit_chunks) * kChunkItems / steps.items;
  const int64_t unit_bytes = unit_steps * 4 * steps.width * 2 * kTokens;
  plan.copies = table_copies(p, shared_limit - 2 * unit_bytes);
  plan.table_bytes = static_cast<int>(copy_bytes(p) * plan.copies);
  if (plan.table_bytes + 2 * unit_bytes > shared_limit) return plan;

  const int64_t split_units =
      best_split(p.io, token_blocks * row_blocks, units, unit_steps * step_clocks(p, steps), sm_count);
  plan.splits = static_cast<int>(ceil_div(units, split_units));
  plan.split_chunks = static_cast<int>(split_units * steps.unit_chunks);
  int64_t stage_units = 1;
  while (stage_units * 2 <= split_units && stage_units * 2 * unit_bytes <= kMostStageBytes &&
         plan.table_bytes + stage_units * 4 * unit_bytes <= shared_limit) {
    stage_units *= 2;
  }
  plan.stage_chunks = static_cast<int>(stage_units * steps.unit_chunks);
  plan.stage_bytes = static_cast<int>(stage_units * unit_bytes);
  return plan;
}

void codebook_gemm(const CodebookMmaProblem& p, const CodebookGemmPlan& plan, const Gpu& gpu) {
  MmaArguments a = mma_arguments(p, plan.copies);
  if (a.whole_planes == 2 && !p.half_tables) a.whole_planes = 0;
  a.aligned = p.io.x_stride % 2 == 0;
  a.splits = plan.splits, a.split_chunks = plan.split_chunks, a.rows = plan.rows;
  a.x_bytes = plan.stage_bytes, a.stage_chunks = plan.stage_chunks;
  a.tokens = static_cast<int>(p.io.M), a.token_blocks = plan.token_blocks;
  const LaunchShape shape{dim3(plan.row_blocks * plan.token_blocks, plan.splits), dim3(kThreads),
                          static_cast<size_t>(plan.table_bytes + 2 * plan.stage_bytes), gpu.stream, true};
  switch (p.vec_len) {
    case 2:
      launch_gemm<2>(a, shape);
      break;
    case 4:
      launch_gemm<4>(a, shape);
      break;
    case 8:
      launch_gemm<8>(a, shape);
      break;
    default:
      launch_gemm<16>(a, shape);
  }
  if (plan.splits > 1) reduce_splits(p.io, a.partial, plan.splits, gpu);
}

}  // namespace lutgemm::cuda
