// Codebook weights on tensor cores: centroids from copies of the codebooks in shared memory straight into fragments of
// mma m16n8k16, for up to 16 tokens at a time.
//
//   y[m, n] = sum over groups g of scales[n, g] *
//             sum over planes p and k in g of tables[p, codes[p, n, k / v], k % v] * x[m, k]
//
//   A   16 tokens x 16 inputs     a[0], a[2]: inputs 4t..4t+3 of token r; a[1], a[3]: of token r + 8; lane = 4 * r + t
//   B   16 inputs x 8 rows of W   b[0], b[1]: the same inputs of row r
//   D   16 tokens x 8 rows        fp32
//
// The order of inputs within a step is free as long as A and B agree, and so a centroid of 4 fp16 is one 8-byte load,
// of 8 one 16-byte load for two mma, into the registers that mma reads. Up to 8 tokens leave half of A empty.
//
//   table   [plane][half of v = 16][entry][copy][min(2v, 16) bytes]     128 bytes of copies for each entry where they
//           fit: lane l reads copy l % copies, so the lanes that are served together use banks of their own
//   block   16 warps share tiles of 32 rows, each a part of K; their sums meet in shared memory, warp 0 first. A block
//           takes tile after tile, for one filling of the table and one staging of x
//
// Counts for 32 rows and 16 inputs of one codebook of v = 4, 1024 bits of codes: 4 look-ups of 2 wavefronts, and 1 of x
// for up to 4 tokens, 2 for 8, 4 for 16. So shared memory takes 114, 102, 85 bits a clock; with 2 codebooks of v = 8 it
// takes 60. Instructions: 25, and 130 for loads and the end of a group every 8 such steps: 100 bits a clock. Derived,
// not measured.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/codebook_mma.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/reduce.h"

namespace lutgemm::cuda {
namespace {

using namespace mma_parts;

template <int kVec, bool kBf16, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, 1) codebook_mma_kernel(MmaArguments a) {
  using S = Shape<kVec>;
  unsigned char* table = dynamic_shared();
  unsigned char* staged = table + a.plan.table_bytes;
  float* sums = reinterpret_cast<float*>(staged + a.plan.x_bytes);  // [warp][token][kSumStride]
  const int lane = threadIdx.x % kWarpSize;
  const int warp = __shfl_sync(kFullMask, threadIdx.x / kWarpSize, 0);  // one value a warp, as the compiler then knows
  const int first_chunk = blockIdx.y * a.plan.split_chunks;
  const int end_chunk = min(first_chunk + a.plan.split_chunks, a.steps.chunks);
  const int units = (end_chunk - first_chunk) / a.steps.unit_chunks;
  const int warp_begin = first_chunk + units * warp / kWarps * a.steps.unit_chunks;
  const int warp_end = first_chunk + units * (warp + 1) / kWarps * a.steps.unit_chunks;
  const int first_step = first_chunk * kChunkItems / a.steps.items;
  const int block_steps = end_chunk * kChunkItems / a.steps.items - first_step;

  // The chunks of this warp, tile after tile; those `ahead` are under way.
  constexpr int kAhead = kTokenTiles == 2 && kVec == 8 ? 1 : 2;  // as registers allow: up to 2 KB a warp, 32 KB a block
  const int64_t load_bytes = static_cast<int64_t>(a.steps.chunks) * kChunkBytes;  // 16 rows
  const int warp_chunks = warp_end - warp_begin;
  const int64_t to_next_tile = kLoads * load_bytes * gridDim.x - static_cast<int64_t>(warp_chunks) * kChunkBytes;
  const unsigned char* next =
      a.codes + kLaneBytes * lane + kLoads * load_bytes * blockIdx.x + static_cast<int64_t>(warp_begin) * kChunkBytes;
  int tile_left = warp_chunks;
  int left = (a.tiles - blockIdx.x + gridDim.x - 1) / gridDim.x * warp_chunks;
  uint4 ahead[kAhead][kLoads];
  const auto load_next = [&](uint4(&to)[kLoads]) {
    if (left > 0) {
      --left;
#pragma unroll
      for (int l = 0; l < kLoads; ++l) to[l] = load_stream16(next + l * load_bytes);
      next += kChunkBytes;
      if (--tile_left == 0) {
        next += to_next_tile;
        tile_left = warp_chunks;
      }
    }
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load_next(ahead[i]);
  fill_table<kVec>(a, table);
  grid_dependency_wait();
  stage_x<kVec>(a, first_step, block_steps, staged);
  __syncthreads();
  launch_dependents();

  WarpSums<kVec, kBf16, kTokenTiles> w(a, table, staged, token_bytes<kVec>(block_steps), first_step);
  const int r = lane / 4, t = lane % 4;
  const float unit = a.units[0] * a.units[1];

  for (int tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
    w.begin(tile, warp_begin);
    for (int chunk = warp_begin; chunk < warp_end; ++chunk) {
      w.chunk(ahead[0]);
#pragma unroll
      for (int i = 0; i + 1 < kAhead; ++i) {
#pragma unroll
        for (int l = 0; l < kLoads; ++l) ahead[i][l] = ahead[i + 1][l];
      }
      load_next(ahead[kAhead - 1]);
    }
    w.end_group();

#pragma unroll
    for (int token_tile = 0; token_tile < kTokenTiles; ++token_tile) {
      if (!w.has_token[token_tile]) continue;
      float* to = sums + (warp * a.tokens + token_tile * 8 + r) * kSumStride + 2 * t;
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        const float* pair = &w.outer[f][2 * token_tile];
        store8(to + 8 * f, make_uint2(__float_as_uint(pair[0]), __float_as_uint(pair[1])));
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < a.tokens * kMmaTileRows; i += kThreads) {
      const int token = i / kMmaTileRows, row = i % kMmaTileRows;
      const int64_t m = a.token_base + token, n = static_cast<int64_t>(tile) * kMmaTileRows + row;
      float sum = 0.f;
#pragma unroll
      for (int other = 0; other < kWarps; ++other) sum += sums[(other * a.tokens + token) * kSumStride + row];
      if (n < a.io.N) {
        if (a.plan.splits > 1) {
          a.partial[(static_cast<int64_t>(blockIdx.y) * a.tokens + token) * a.io.N + n] = sum * unit;
        } else {
          store_result(a.io.y, a.io.bias, a.io.dtype, a.io.N, m, n, sum * unit);
        }
      }
    }
    __syncthreads();
  }
}

// Other vec_len take 16 tokens in two passes: they are rare, and each of these kernels takes time to compile.
constexpr bool has_two_token_tiles(int vec_len) { return vec_len == 4 || vec_len == 8; }

template <int kVec, bool kBf16>
void launch_mma(const MmaArguments& a, const Gpu& gpu) {
  const LaunchShape shape{dim3(a.plan.blocks, a.plan.splits), dim3(kThreads),
                          static_cast<size_t>(a.plan.table_bytes + a.plan.x_bytes + a.plan.sum_bytes), gpu.stream,
                          true};
  if constexpr (has_two_token_tiles(kVec)) {
    if (a.plan.token_tiles == 2) return launch(codebook_mma_kernel<kVec, kBf16, 2>, shape, a);
  }
  launch(codebook_mma_kernel<kVec, kBf16, 1>, shape, a);
}

template <int kVec>
void launch_mma(const MmaArguments& a, const Gpu& gpu) {
  if (a.io.dtype == DType::kBFloat16) {
    launch_mma<kVec, true>(a, gpu);
  } else {
    launch_mma<kVec, false>(a, gpu);
  }
}

int64_t pass_tokens(const CodebookMmaPlan& plan, int64_t M) { return std::min<int64_t>(M, 8 * plan.token_tiles); }

}  // namespace

CodebookMmaPlan plan_codebook_mma(const CodebookMmaProblem& p, int sm_count, int shared_limit) {
  const MmaSteps steps = mma_steps(p.io.K, p.group_size, p.planes, p.vec_len);
  CodebookMmaPlan plan{};
  plan.token_tiles = p.io.M > 8 && has_two_token_tiles(p.vec_len) ? 2 : 1;
  const int64_t tokens = pass_tokens(plan, p.io.M), tiles = ceil_div(p.io.N, kMmaTileRows);

  // 128 bytes of copies, or as many as fit: at least 16 bytes.
  const int part = std::min(2 * p.vec_len, 16);
  const int64_t copy_bytes = (int64_t(p.planes) << p.codebook_bits) * 2 * p.vec_len;
  plan.sum_bytes = static_cast<int>(kWarps * tokens * kSumStride * 4);
  const int64_t table_room = std::min(kMostTableBytes, shared_limit - plan.sum_bytes - kLeastStagedBytes);
  plan.copies = 128 / part;
  while (copy_bytes * plan.copies > table_room && plan.copies * part > 16) plan.copies /= 2;
  plan.table_bytes = static_cast<int>(copy_bytes * plan.copies);

  // Splits of K: enough for staged x to fit, and to give every multiprocessor a tile.
  const int64_t units = steps.chunks / steps.unit_chunks;
  const int64_t unit_steps = int64_t(steps.unit_chunks) * kChunkItems / steps.items;
  const int64_t room = std::min<int64_t>(kMostStagedBytes, shared_limit - plan.table_bytes - plan.sum_bytes);
  const int64_t unit_bytes = unit_steps * 4 * steps.width * 2, padding = 4 * std::min(steps.width, 8) * 2;
  const int64_t fitting = (room / tokens - padding) / unit_bytes;  // units of a split
  if (room < 0 || fitting < 1) return CodebookMmaPlan{};
  const int64_t filling = std::max<int64_t>(1, sm_count / tiles);
  const int64_t wanted = std::clamp<int64_t>(std::max(ceil_div(units, fitting), filling), 1, units);
  const int64_t split_units = ceil_div(units, wanted);
  plan.splits = static_cast<int>(ceil_div(units, split_units));
  plan.split_chunks = static_cast<int>(split_units * steps.unit_chunks);
  plan.x_bytes = static_cast<int>(round_up(tokens * (split_units * unit_bytes + padding), 16));
  plan.blocks = static_cast<int>(std::min<int64_t>(tiles, std::max(1, sm_count / plan.splits)));
  return plan;
}

int64_t codebook_mma_workspace(const CodebookMmaProblem& p, const Gpu& gpu) {
  const CodebookMmaPlan plan = plan_codebook_mma(p, gpu.sm_count, gpu.shared_bytes);
  return plan.splits > 1 ? plan.splits * pass_tokens(plan, p.io.M) * p.io.N * 4 : 0;
}

void codebook_mma(const CodebookMmaProblem& p, const Gpu& gpu) {
  const CodebookMmaPlan plan = plan_codebook_mma(p, gpu.sm_count, gpu.shared_bytes);
  if (plan.splits == 0) {
    throw std::runtime_error("codebook_mma: the codebooks do not fit in the " + std::to_string(gpu.shared_bytes) +
                             " bytes of shared memory that a block of this GPU gets; use algorithm \"codegemm\"");
  }
  MmaArguments a{};
  a.io = p.io;
  a.steps = mma_steps(p.io.K, p.group_size, p.planes, p.vec_len);
  a.plan = plan;
  a.codes = static_cast<const unsigned char*>(p.codes);
  a.scales = static_cast<const unsigned char*>(p.scales);
  a.float_scales = p.float_scales;
  a.tables = static_cast<const unsigned char*>(p.tables);
  a.units = p.units;
  a.partial = static_cast<float*>(p.workspace);
  a.group_size = static_cast<int>(std::min(p.group_size, p.io.K));
  a.planes = p.planes;
  a.entries = 1 << p.codebook_bits;
  a.tiles = static_cast<int>(ceil_div(p.io.N, kMmaTileRows));
  const int group_items = a.steps.steps_per_group * a.steps.items;
  const bool whole = p.planes <= 2 && (a.steps.groups == 1 || group_items % kChunkItems == 0);
  a.whole_planes = whole ? p.planes : 0;
  a.straight = a.steps.groups == 1 || p.group_size % (4 * a.steps.width) == 0;
  a.aligned = p.io.x_stride % 8 == 0;
  for (int64_t first = 0; first < p.io.M; first += 8 * plan.token_tiles) {
    a.tokens = static_cast<int>(std::min<int64_t>(8 * plan.token_tiles, p.io.M - first));
    a.token_base = first;
    switch (p.vec_len) {
      case 2:
        launch_mma<2>(a, gpu);
        break;
      case 4:
        launch_mma<4>(a, gpu);
        break;
      case 8:
        launch_mma<8>(a, gpu);
        break;
      default:
        launch_mma<16>(a, gpu);
    }
    if (plan.splits > 1) {
      GpuIo io = p.io;
      io.M = a.tokens;
      io.y = static_cast<unsigned char*>(p.io.y) + first * p.io.N * 2;
      reduce_splits(io, a.partial, plan.splits, gpu);
    }
  }
}

}  // namespace lutgemm::cuda
