// codebook_mma for many tokens on Hopper: W in fp16 in the registers of wgmma, tokens in shared memory by bulk copies.
//
//   y[m, n] = token_scale[m] * unit * sum over k of half(scales[n, g] * sum of centroids) * half(x[m, k] /
//   token_scale[m])
//
// A token's scale is a power of two that brings its largest |x| to the upper range of fp16, so that bf16 loses nothing;
// a weight is rounded once for each of its codebooks.
//
//   codes   those of codebook_mma: lane 4 * g + t of a warp has the codes of lane t's inputs of rows g and g + 8 of 16,
//           and a centroid of 4, times the row's scale, is a[0], a[2] of row g, or a[1], a[3] of row g + 8
//   tokens  [block of kTokens][k step of 16][half][token][t 4][2]     inputs 4t + 0, 1 of the 16; 4t + 2, 3: by a
//           kernel before. 8 tokens x 16 bytes are a core matrix: 128 bytes to the next 8 tokens
//   block   256 rows x kTokens, 2 warpgroups; a warp has two tiles of 16 rows, each 16 of the 64 rows of a wgmma
//   part    4 k steps: 4 products of each tile, and a stage of tokens, 8 or 16 KB, a ring. `full`: the bytes of a stage
//           have come. `free`: 8 arrivals, when a warp's products with it are done; thread 0 copies
//
//   warp    products of tile 0  |  makes tile 1  |  products of tile 1  |  makes tile 0 of the next part  | ...
//           --- run here ------------------->       --- run here ---------------------------------->
//
// Counts for a part of a block, 256 rows x 64 inputs x 128 tokens: 1024 clocks of the tensor cores (2048 multiply-adds
// a clock); their reads of tokens take 512 wavefronts, look-ups 256 for one codebook of v = 4 or 8, 512 for two of
// v = 8; 8 warps issue 250 instructions each for two such parts, 250 clocks a part. 64 tokens take half of the first
// two. An 8192 x 8192 layer has 32 parts for each of 128 blocks: 10 us at 1.7 GHz for 64 tokens (two codebooks of
// v = 8: 15), 20 for 128, 39 for 256. Derived, not measured.
#include <algorithm>
#include <type_traits>

#include "cuda/codebook_mma.cuh"
#include "cuda/codebook_wgmma.h"
#include "cuda/epilogue.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/reduce.h"
#include "cuda/wgmma_block.cuh"

namespace lutgemm::cuda {
namespace {

using namespace mma_parts;

constexpr int kWarps = 8;
constexpr int kMostTokens = 128;  // of a block
constexpr int kPartSteps = 4;
constexpr int kBlockRows = kWarps * kMmaTileRows;
constexpr int kSumsPitch = kBlockRows + 4;  // the tokens of a quad, 2 apart, in banks 8 apart
constexpr int kMostStages = 8;

[[maybe_unused]] constexpr int kLag = 2;  // parts that warps may be apart before thread 0 waits for another

struct WgmmaArguments {
  MmaArguments mma;
  const unsigned char* tokens;
  const float* token_scales;
  int stages;
  int group_chunks;  // of a group; all where there is one
};

#ifdef LUTGEMM_HAS_WGMMA
// centroids * scale + sum, in fp16 pairs.
__device__ __forceinline__ uint32_t add_scaled(uint32_t centroids, uint32_t scale, uint32_t sum, bool first) {
  __half2 c, s, y;
  memcpy(&c, &centroids, sizeof c);
  memcpy(&s, &scale, sizeof s);
  memcpy(&y, &sum, sizeof y);
  y = first ? __hmul2(c, s) : __hfma2(c, s, y);
  memcpy(&sum, &y, sizeof y);
  return sum;
}

// Part kPart of a chunk, for one tile of 16 rows, as A registers of its 4 products.
template <int kVec, int kPlanes, int kPart>
__device__ __forceinline__ void make_part(const unsigned char* table, int entry_bytes, int plane_bytes,
                                          const uint4& codes, const uint32_t (&scale)[2],
                                          uint32_t (&a)[kPartSteps][4]) {
  using S = Shape<kVec>;
  constexpr int kSteps = kPartSteps / S::kMmas;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      uint32_t words[2 * S::kMmas] = {};
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        const int at = (kPart * kSteps + s) * kPlanes + plane;
        const uint32_t code = prmt(part(codes, at / 2), 0, 0x4440 + at % 2 * 2 + row);
        const unsigned char* centroid = table + plane * plane_bytes + code * entry_bytes;
        if constexpr (kVec == 4) {
          const uint2 v = load8(centroid);
          words[0] = add_scaled(v.x, scale[row], words[0], plane == 0);
          words[1] = add_scaled(v.y, scale[row], words[1], plane == 0);
        } else {
          const uint4 v = load16(centroid);
#pragma unroll
          for (int w = 0; w < 4; ++w) words[w] = add_scaled(part(v, w), scale[row], words[w], plane == 0);
        }
      }
#pragma unroll
      for (int m = 0; m < S::kMmas; ++m) {
        a[s * S::kMmas + m][row] = words[2 * m];
        a[s * S::kMmas + m][row + 2] = words[2 * m + 1];
      }
    }
  }
}

#endif

template <int kVec, int kPlanes, int kTokens>
__global__ void LUTGEMM_WGMMA_BOUNDS(kWarps* kWarpSize) codebook_wgmma_kernel(WgmmaArguments arguments) {
#ifdef LUTGEMM_HAS_WGMMA
  using S = Shape<kVec>;
  constexpr int kStepBytes = wgmma_step_bytes(kTokens), kPartBytes = kPartSteps * kStepBytes;
  constexpr int kParts = kChunkItems / kPlanes * S::kMmas / kPartSteps;  // of a chunk
  LUTGEMM_SHARED(uint64_t, full, [kMostStages]);
  LUTGEMM_SHARED(uint64_t, free, [kMostStages]);
  const MmaArguments& a = arguments.mma;
  const int lane = threadIdx.x % kWarpSize, g = lane / 4;
  const int warp = __shfl_sync(kFullMask, threadIdx.x / kWarpSize, 0);
  unsigned char* table = dynamic_shared();
  unsigned char* stages = table + a.table_bytes;
  if (threadIdx.x == 0) {
    for (int i = 0; i < arguments.stages; ++i) mbarrier_init(full + i, 1), mbarrier_init(free + i, kWarps);
    mbarrier_init_fence();
  }
  const int row_block = blockIdx.x / a.token_blocks, token_block = blockIdx.x - row_block * a.token_blocks;
  const OwnBlocks own = own_blocks(a.rows, row_block);
  const int first_tile = own.blocks.first_unit + own.number * kWarps,
            end_tile = own.blocks.first_unit + own.blocks.units;
  const int tile = min(first_tile + warp, end_tile - 1);
  const int first_chunk = blockIdx.y * a.split_chunks;
  const int chunks = min(a.split_chunks, a.steps.chunks - first_chunk), parts = chunks * kParts;

  const int64_t load_bytes = static_cast<int64_t>(a.steps.chunks) * kChunkBytes;  // 16 rows
  const unsigned char* next_codes =
      a.codes + kLaneBytes * lane + kLoads * load_bytes * tile + static_cast<int64_t>(first_chunk) * kChunkBytes;
  uint4 codes[2], later[2];
  const auto load_codes = [&](uint4(&to)[2], bool more) {
    if (!more) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) to[r] = load16(next_codes + r * load_bytes);
    next_codes += kChunkBytes;
  };
  load_codes(codes, true);
#pragma unroll
  for (int r = 0; r < 2; ++r) later[r] = codes[r];
  load_codes(later, chunks > 1);
  // Scales of the lane's rows 8 f + g: word f, half g % 2, of what a group has for t = g / 2.
  int group = first_chunk / arguments.group_chunks, group_left = (group + 1) * arguments.group_chunks - first_chunk;
  const auto load_scales = [&](int of) {
    const int64_t at = (static_cast<int64_t>(tile) * a.steps.groups + min(of, a.steps.groups - 1)) * 4 + g / 2;
    return load16(a.scales + at * 16);
  };
  uint32_t scale[2][2];
  const auto take_scales = [&](const uint4& of) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) scale[f / 2][f % 2] = prmt(part(of, f), 0, g % 2 ? 0x3232 : 0x1010);
  };
  take_scales(load_scales(group));
  uint4 later_scales = load_scales(group + 1);
  int chunks_left = chunks - 2;  // behind `later`
  const auto next_chunk = [&] {
#pragma unroll
    for (int r = 0; r < 2; ++r) codes[r] = later[r];
    load_codes(later, chunks_left-- > 0);
    if (--group_left == 0) {
      take_scales(later_scales);
      ++group, group_left = arguments.group_chunks;
      later_scales = load_scales(group + 1);
    }
  };
  fill_table<kVec, kWarps * kWarpSize>(a, own.sibling, table);
  __syncthreads();
  grid_dependency_wait();
  launch_dependents();

  const unsigned char* tokens =
      arguments.tokens + (static_cast<int64_t>(token_block) * a.steps.chunks + first_chunk) * (kParts * kPartBytes);
  const auto copy_part = [&](int stage, int of) {
    mbarrier_arrive_expect(full + stage, kPartBytes);
    bulk_copy(stages + stage * kPartBytes, tokens + static_cast<int64_t>(of) * kPartBytes, kPartBytes, full + stage);
  };
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int i = 0; i < min(arguments.stages, parts); ++i) copy_part(i, i);
  }
  __syncwarp();

  const unsigned char* own_table = table + lane % a.copies * S::kPartBytes;
  const int entry_bytes = a.copies * S::kPartBytes, plane_bytes = entry_bytes << a.entry_bits;
  float acc[2][kTokens / 2] = {};
  uint32_t fragments[2][kPartSteps][4];
  Ring now{arguments.stages}, refilled{arguments.stages};
  const auto multiply = [&](auto row_tile) {
    constexpr int kTile = decltype(row_tile)::value;
    multiply_steps<kTokens>(acc[kTile], fragments[kTile], stages + now.stage * kPartBytes);
  };
  const auto make = [&](auto row_tile, auto part_of_chunk) {
    constexpr int kTile = decltype(row_tile)::value, kPart = decltype(part_of_chunk)::value;
    make_part<kVec, kPlanes, kPart>(own_table, entry_bytes, plane_bytes, codes[kTile], scale[kTile], fragments[kTile]);
  };
  using First = std::integral_constant<int, 0>;
  using Second = std::integral_constant<int, 1>;
  int done = 0;  // parts
  const auto run_part = [&](auto part_of_chunk) {
    constexpr int kPart = decltype(part_of_chunk)::value;
    mbarrier_wait(full + now.stage, now.phase);
    multiply(First{});
    make(Second{}, part_of_chunk);
    multiply(Second{});
    if constexpr (kPart + 1 == kParts) next_chunk();
    wgmma_wait<1>();
    hold_registers(acc[0]);
    make(First{}, std::integral_constant<int, (kPart + 1) % kParts>{});  // behind the last chunk: of no use
    wgmma_wait<0>();
    hold_registers(acc[1]);
    if (lane == 0) mbarrier_arrive(free + now.stage);
    now.advance();
    if (threadIdx.x == 0 && ++done >= kLag && done - kLag + arguments.stages < parts) {
      mbarrier_wait(free + refilled.stage, refilled.phase);
      copy_part(refilled.stage, done - kLag + arguments.stages);
      refilled.advance();
    }
    __syncwarp();
  };
  make(First{}, First{});
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    run_part(std::integral_constant<int, 0>{});
    if constexpr (kParts > 1) run_part(std::integral_constant<int, 1>{});
    if constexpr (kParts > 2) run_part(std::integral_constant<int, 2>{});
    if constexpr (kParts > 3) run_part(std::integral_constant<int, 3>{});
  }

  // Through shared memory to whole rows of y or of the partial sums: [token][row], and both sides without conflicts.
  __syncthreads();
  auto* sums = reinterpret_cast<float*>(table);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    store_sums<kTokens, kSumsPitch>(acc[r], sums + warp * kMmaTileRows + r * 16);
  }
  __syncthreads();
  const int64_t n = static_cast<int64_t>(first_tile) * kMmaTileRows + threadIdx.x;
  if (n >= min(a.io.N, static_cast<int64_t>(end_tile) * kMmaTileRows)) return;
  const float unit = a.units[3 * own.sibling + 1] * a.units[3 * own.sibling + 2];
  const float bias = a.splits == 1 && a.io.bias != nullptr ? load_value(a.io.bias, a.io.dtype, n) : 0.f;
  const int64_t first_token = static_cast<int64_t>(token_block) * kTokens;
  const int count = static_cast<int>(min(a.io.M - first_token, static_cast<int64_t>(kTokens)));
  // Eight tokens at a time, so that their scales and sums are under way together; tokens past M have some too. to: of
  // the block's first token.
  const auto write = [&](auto* to, const auto& as_stored) {
#pragma unroll 1
    for (int first = 0; first < count; first += 8) {
      float results[8];
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        const uint4 scales = load16(arguments.token_scales + first_token + first + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          results[i + j] = sums[(first + i + j) * kSumsPitch + threadIdx.x] * unit * __uint_as_float(part(scales, j));
        }
      }
#pragma unroll
      for (int i = 0; i < 8; ++i, to += a.io.N) {
        if (first + i < count) *to = as_stored(results[i] + bias);
      }
    }
  };
  const int64_t at = first_token * a.io.N + n;
  if (a.splits > 1) {
    write(a.partial + blockIdx.y * a.io.M * a.io.N + at, [](float sum) { return sum; });
  } else if (a.io.dtype == DType::kBFloat16) {
    write(static_cast<__nv_bfloat16*>(a.io.y) + at, [](float sum) { return __float2bfloat16_rn(sum); });
  } else {
    write(static_cast<__half*>(a.io.y) + at, [](float sum) { return __float2half_rn(sum); });
  }
#endif
}

bool wgmma_there(const Gpu& gpu) {
  if (gpu.capability != 90) return false;
  static const bool compiled = has_body(codebook_wgmma_kernel<4, 1, 64>);
  return compiled;
}

template <int kVec, int kPlanes>
void launch_wgmma(const WgmmaArguments& a, int tokens, const LaunchShape& shape) {
  if (tokens == 64) {
    launch(codebook_wgmma_kernel<kVec, kPlanes, 64>, shape, a);
  } else {
    launch(codebook_wgmma_kernel<kVec, kPlanes, kMostTokens>, shape, a);
  }
}

template <int kVec>
void launch_wgmma(const WgmmaArguments& a, int tokens, const LaunchShape& shape) {
  if (a.mma.planes == 1) {
    launch_wgmma<kVec, 1>(a, tokens, shape);
  } else {
    launch_wgmma<kVec, 2>(a, tokens, shape);
  }
}

}  // namespace

CodebookWgmmaPlan plan_codebook_wgmma(const CodebookMmaProblem& p, const Gpu& gpu) {
  CodebookWgmmaPlan plan{};
  const bool taken = p.half_tables != nullptr && !p.float_scales && p.planes <= 2 && (p.vec_len == 4 || p.vec_len == 8);
  if (!taken || p.io.M <= 32 || !wgmma_there(gpu)) return plan;
  const MmaSteps steps = mma_steps(p.io.K, p.group_size, p.planes, p.vec_len);
  if (mma_arguments(p, 1).whole_planes == 0) return plan;
  plan.tokens = p.io.M <= 64 ? 64 : kMostTokens;
  const int part_bytes = kPartSteps * wgmma_step_bytes(plan.tokens);
  plan.copies = table_copies(p, gpu.shared_bytes - 4 * part_bytes);
  plan.table_bytes = static_cast<int>(copy_bytes(p) * plan.copies);
  plan.stages =
      static_cast<int>(std::min<int64_t>(kMostStages, (gpu.shared_bytes - 1024 - plan.table_bytes) / part_bytes));
  plan.shared_bytes = std::max<int64_t>(plan.table_bytes + plan.stages * part_bytes, plan.tokens * kSumsPitch * 4);
  plan.rows = whole_blocks(p.siblings, p.io.N, kWarps);
  const int64_t token_blocks = ceil_div(p.io.M, plan.tokens), row_blocks = dealt_blocks(plan.rows);
  if (plan.stages < 4 || plan.shared_bytes + 1024 > gpu.shared_bytes || token_blocks * row_blocks > INT32_MAX) {
    return CodebookWgmmaPlan{};
  }
  plan.token_blocks = static_cast<int>(token_blocks), plan.row_blocks = static_cast<int>(row_blocks);
  const int chunk_parts = kChunkItems / p.planes * (steps.width / 4) / kPartSteps;
  plan.split_chunks = static_cast<int>(
      best_split(p.io, token_blocks * row_blocks, steps.chunks, chunk_parts * 9 * plan.tokens, gpu.sm_count));
  plan.splits = static_cast<int>(ceil_div(steps.chunks, plan.split_chunks));
  plan.token_bytes = token_blocks * steps.chunks * chunk_parts * part_bytes;
  plan.scale_bytes = token_blocks * plan.tokens * 4;
  return plan;
}

void codebook_wgmma(const CodebookMmaProblem& p, const CodebookWgmmaPlan& plan, const Gpu& gpu) {
  WgmmaArguments a{};
  a.mma = mma_arguments(p, plan.copies);
  a.mma.tables = static_cast<const unsigned char*>(p.half_tables);
  a.mma.rows = plan.rows, a.mma.splits = plan.splits, a.mma.split_chunks = plan.split_chunks,
  a.mma.token_blocks = plan.token_blocks;
  auto* tokens = static_cast<unsigned char*>(p.workspace);
  auto* token_scales = reinterpret_cast<float*>(tokens + plan.token_bytes);
  a.mma.partial = reinterpret_cast<float*>(tokens + plan.token_bytes + plan.scale_bytes);
  a.tokens = tokens, a.token_scales = token_scales, a.stages = plan.stages;
  a.group_chunks = a.mma.steps.groups == 1 ? a.mma.steps.chunks : a.mma.steps.steps_per_group * p.planes / kChunkItems;
  codebook_tokens(p, plan.token_blocks, plan.tokens, tokens, token_scales, gpu);
  const LaunchShape shape{dim3(plan.row_blocks * plan.token_blocks, plan.splits), dim3(kWarps * kWarpSize),
                          static_cast<size_t>(plan.shared_bytes), gpu.stream, true};
  if (p.vec_len == 4) {
    launch_wgmma<4>(a, plan.tokens, shape);
  } else {
    launch_wgmma<8>(a, plan.tokens, shape);
  }
  if (plan.splits > 1) reduce_splits(p.io, a.mma.partial, plan.splits, gpu);
}

}  // namespace lutgemm::cuda
