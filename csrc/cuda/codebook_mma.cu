// Codebook weights on tensor cores: centroids from copies of the codebooks in shared memory straight into fragments of
// mma m16n8k16, for up to 16 tokens at a time (more: codebook_gemm.cu).
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
// takes 60. Instructions in the SASS of sm_90: 22, and 125 for loads and the end of a group every 8 such steps: 109
// bits a clock. Derived, not measured.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/codebook_mma.cuh"
#include "cuda/codebook_wgmma.h"
#include "cuda/epilogue.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/reduce.h"

namespace lutgemm::cuda {
namespace {

using namespace mma_parts;

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kSumStride = 40;  // of a token's 32 sums: neighbouring tokens are 8 banks apart
constexpr int kMostTableBytes = 128 << 10;
constexpr int kLeastStagedBytes = 24 << 10;  // left for x, rather than more copies
constexpr int kMostStagedBytes = 68 << 10;   // 8 tokens of K = 4096, so that one pass needs no second kernel

// Bytes from one token's staged x to the next: a phase of 4 (2) tokens is spread over all banks.
template <int kVec>
__device__ __forceinline__ int token_bytes(int steps) {
  return steps * Shape<kVec>::kInputs * 2 + 4 * Shape<kVec>::kPieceInputs * 2;
}

// x of this pass for steps first .. first + steps - 1: [token][step][piece][4 lanes][kPieceInputs], zeros past the end
// of a group and of K.
template <int kVec>
__device__ __forceinline__ void stage_x(const MmaArguments& a, int first, int steps, unsigned char* staged) {
  using S = Shape<kVec>;
  const int pieces = steps * 4 * S::kPieces, stride = token_bytes<kVec>(steps), first_k = first * S::kInputs;
  const int K = static_cast<int>(a.io.K);
  const uint16_t* first_x = static_cast<const uint16_t*>(a.io.x) + a.token_base * a.io.x_stride;
  int done = 0;                                      // pieces
  if (S::kPieces == 1 && a.straight && a.aligned) {  // then the layout is that of x
    constexpr int kAtOnce = kVec == 8 ? 2 : 4;       // tokens whose loads are under way together, as registers allow
    const int whole = max(min(steps * S::kInputs, K - first_k), 0) / 8;
#pragma unroll 1
    for (int token = 0; token < a.tokens; token += kAtOnce) {
      const uint16_t* x = first_x + token * a.io.x_stride + first_k;
#pragma unroll 1
      for (int i = threadIdx.x; i < whole; i += kThreads) {
        uint4 values[kAtOnce];
#pragma unroll
        for (int t = 0; t < kAtOnce; ++t) {
          if (token + t < a.tokens) values[t] = load16(x + t * a.io.x_stride + 8 * i);
        }
#pragma unroll
        for (int t = 0; t < kAtOnce; ++t) {
          if (token + t < a.tokens) store16(staged + (token + t) * stride + 16 * i, values[t]);
        }
      }
    }
    done = whole * (8 / S::kPieceInputs);
  }
#pragma unroll 1
  for (int token = 0; token < a.tokens; ++token) {
    const uint16_t* x = first_x + token * a.io.x_stride;
    unsigned char* to = staged + token * stride;
    for (int i = done + threadIdx.x; i < pieces; i += kThreads) {
      const int step = i / (4 * S::kPieces), piece = i / 4 % S::kPieces, t = i % 4;
      int k = first_k + step * S::kInputs, end = K;
      if (!a.straight) {
        const int group = (first + step) / a.steps.steps_per_group;
        k = group * a.group_size + (first + step - group * a.steps.steps_per_group) * S::kInputs;
        end = min(end, (group + 1) * a.group_size);
      }
      k += t * S::kWidth + piece * S::kPieceInputs;
      uint32_t words[S::kPieceInputs / 2];
#pragma unroll
      for (int d = 0; d < S::kPieceInputs; d += 2) {
        const uint32_t low = k + d < end ? x[k + d] : 0, high = k + d + 1 < end ? x[k + d + 1] : 0;
        words[d / 2] = low | high << 16;
      }
      if constexpr (S::kPieceInputs == 8) {
        store16(to + 16 * i, make_uint4(words[0], words[1], words[2], words[3]));
      } else {
        store8(to + 8 * i, make_uint2(words[0], words[1]));
      }
    }
  }
}

// What a lane reads of that: pieces of its token of each octet. Words of tokens that are not there are masked: as
// constants, the compiler would bring each mma its own copy of A.
template <int kVec, int kOctets>
struct StagedX {
  using S = Shape<kVec>;
  const unsigned char* at[kOctets];
  uint32_t masks[2];  // of tokens r and r + 8; 0 or ~0

  __device__ __forceinline__ StagedX(const MmaArguments& a, const unsigned char* staged, int token_stride) {
    const int lane = threadIdx.x % kWarpSize, r = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = 8 * i + r;
      masks[i] = token < a.tokens ? ~0u : 0u;
      if (i < kOctets) at[i] = staged + min(token, a.tokens - 1) * token_stride + t * (S::kPieceInputs * 2);
    }
  }

  __device__ __forceinline__ bool there(int octet) const { return masks[octet] != 0; }

  __device__ __forceinline__ void load(int step, int, uint32_t (&x)[S::kMmas][4]) const {
#pragma unroll
    for (int piece = 0; piece < S::kPieces; ++piece) {
      const int from = step * (S::kInputs * 2) + piece * (S::kPieceInputs * 8);
      uint32_t words[2][S::kPieceInputs / 2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (S::kPieceInputs == 8) {
          const uint4 v = load16(at[i % kOctets] + from);
          words[i][0] = v.x, words[i][1] = v.y, words[i][2] = v.z, words[i][3] = v.w;
        } else {
          const uint2 v = load8(at[i % kOctets] + from);
          words[i][0] = v.x, words[i][1] = v.y;
        }
#pragma unroll
        for (int w = 0; w < S::kPieceInputs / 2; ++w) {
          x[piece * (S::kPieceInputs / 4) + w / 2][i + w % 2 * 2] = words[i][w] & masks[i];
        }
      }
    }
  }
};

template <int kVec, bool kBf16, int kOctets>
__global__ void __launch_bounds__(kThreads, 1) codebook_mma_kernel(MmaArguments a) {
  unsigned char* table = dynamic_shared();
  unsigned char* staged = table + a.table_bytes;
  float* sums = reinterpret_cast<float*>(staged + a.x_bytes);  // [warp][token][kSumStride]
  const int lane = threadIdx.x % kWarpSize;
  const int warp = __shfl_sync(kFullMask, threadIdx.x / kWarpSize, 0);  // one value a warp, as the compiler then knows
  const int first_chunk = blockIdx.y * a.split_chunks;
  const int end_chunk = min(first_chunk + a.split_chunks, a.steps.chunks);
  const int units = (end_chunk - first_chunk) / a.steps.unit_chunks;
  const int warp_begin = first_chunk + units * warp / kWarps * a.steps.unit_chunks;
  const int warp_end = first_chunk + units * (warp + 1) / kWarps * a.steps.unit_chunks;
  const int first_step = first_chunk * kChunkItems / a.steps.items;
  const int block_steps = end_chunk * kChunkItems / a.steps.items - first_step;

  const OwnBlocks own = own_blocks(a.rows, blockIdx.x);
  const int first_tile = own.blocks.first_unit + own.number, end_tile = own.blocks.first_unit + own.blocks.units;

  // The chunks of this warp, tile after tile; those `ahead` are under way.
  constexpr int kAhead = kOctets == 2 && kVec == 8 ? 1 : 2;  // as registers allow: up to 2 KB a warp, 32 KB a block
  const int64_t load_bytes = static_cast<int64_t>(a.steps.chunks) * kChunkBytes;  // 16 rows
  const int warp_chunks = warp_end - warp_begin;
  const int64_t to_next_tile =
      kLoads * load_bytes * own.blocks.blocks - static_cast<int64_t>(warp_chunks) * kChunkBytes;
  const unsigned char* next =
      a.codes + kLaneBytes * lane + kLoads * load_bytes * first_tile + static_cast<int64_t>(warp_begin) * kChunkBytes;
  int tile_left = warp_chunks;
  int left = (own.blocks.block_units + (own.number < own.blocks.longer ? 1 : 0)) * warp_chunks;
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
  fill_table<kVec, kThreads>(a, own.sibling, table);
  grid_dependency_wait();
  stage_x<kVec>(a, first_step, block_steps, staged);
  __syncthreads();
  launch_dependents();

  using X = StagedX<kVec, kOctets>;
  const X x(a, staged, token_bytes<kVec>(block_steps));
  WarpSums<kVec, kBf16, kOctets, X> w(a, x, table, first_step);
  const int r = lane / 4, t = lane % 4;
  const float unit = a.units[3 * own.sibling] * a.units[3 * own.sibling + 1];

  for (int tile = first_tile; tile < end_tile; tile += own.blocks.blocks) {
    w.begin(tile, warp_begin);
    for (int chunk = warp_begin; chunk < warp_end; ++chunk) {
      w.template chunk<false>(ahead[0]);
#pragma unroll
      for (int i = 0; i + 1 < kAhead; ++i) {
#pragma unroll
        for (int l = 0; l < kLoads; ++l) ahead[i][l] = ahead[i + 1][l];
      }
      load_next(ahead[kAhead - 1]);
    }
    w.end_group();

#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
      if (!x.there(octet)) continue;
      float* to = sums + (warp * a.tokens + octet * 8 + r) * kSumStride + 2 * t;
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        const float* pair = &w.outer[f][2 * octet];
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
        if (a.splits > 1) {
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
constexpr bool has_two_octets(int vec_len) { return vec_len == 4 || vec_len == 8; }

template <int kVec, bool kBf16>
void launch_mma(const MmaArguments& a, const CodebookMmaPlan& plan, const Gpu& gpu) {
  const LaunchShape shape{dim3(plan.blocks, plan.splits), dim3(kThreads),
                          static_cast<size_t>(plan.table_bytes + plan.x_bytes + plan.sum_bytes), gpu.stream, true};
  if constexpr (has_two_octets(kVec)) {
    if (plan.octets == 2) return launch(codebook_mma_kernel<kVec, kBf16, 2>, shape, a);
  }
  launch(codebook_mma_kernel<kVec, kBf16, 1>, shape, a);
}

template <int kVec>
void launch_mma(const MmaArguments& a, const CodebookMmaPlan& plan, const Gpu& gpu) {
  if (a.io.dtype == DType::kBFloat16) {
    launch_mma<kVec, true>(a, plan, gpu);
  } else {
    launch_mma<kVec, false>(a, plan, gpu);
  }
}

int64_t pass_tokens(const CodebookMmaPlan& plan, int64_t M) { return std::min<int64_t>(M, 8 * plan.octets); }

}  // namespace

CodebookMmaPlan plan_codebook_mma(const CodebookMmaProblem& p, int sm_count, int shared_limit) {
  const MmaSteps steps = mma_steps(p.io.K, p.group_size, p.planes, p.vec_len);
  CodebookMmaPlan plan{};
  plan.octets = p.io.M > 8 && has_two_octets(p.vec_len) ? 2 : 1;
  const int64_t tokens = pass_tokens(plan, p.io.M), tiles = ceil_div(p.io.N, kMmaTileRows);

  plan.sum_bytes = static_cast<int>(kWarps * tokens * kSumStride * 4);
  plan.copies = table_copies(p, std::min(kMostTableBytes, shared_limit - plan.sum_bytes - kLeastStagedBytes));
  plan.table_bytes = static_cast<int>(copy_bytes(p) * plan.copies);

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
  plan.rows = deal_blocks(p.siblings, p.io.N, std::min<int64_t>(tiles, std::max(1, sm_count / plan.splits)));
  plan.blocks = dealt_blocks(plan.rows);
  return plan;
}

int64_t codebook_mma_workspace(const CodebookMmaProblem& p, const Gpu& gpu) {
  if (const CodebookWgmmaPlan plan = plan_codebook_wgmma(p, gpu); plan.splits > 0) {
    return plan.token_bytes + plan.scale_bytes + split_workspace(p.io, plan.splits);
  }
  if (const CodebookGemmPlan many = plan_codebook_gemm(p, gpu.sm_count, gpu.shared_bytes); many.splits > 0) {
    return split_workspace(p.io, many.splits);
  }
  const CodebookMmaPlan plan = plan_codebook_mma(p, gpu.sm_count, gpu.shared_bytes);
  return plan.splits > 1 ? plan.splits * pass_tokens(plan, p.io.M) * p.io.N * 4 : 0;
}

void codebook_mma(const CodebookMmaProblem& p, const Gpu& gpu) {
  if (const CodebookWgmmaPlan plan = plan_codebook_wgmma(p, gpu); plan.splits > 0) return codebook_wgmma(p, plan, gpu);
  if (const CodebookGemmPlan many = plan_codebook_gemm(p, gpu.sm_count, gpu.shared_bytes); many.splits > 0) {
    return codebook_gemm(p, many, gpu);
  }
  const CodebookMmaPlan plan = plan_codebook_mma(p, gpu.sm_count, gpu.shared_bytes);
  if (plan.splits == 0) {
    throw std::runtime_error("codebook_mma: the codebooks do not fit in the " + std::to_string(gpu.shared_bytes) +
                             " bytes of shared memory that a block of this GPU gets; use algorithm \"codegemm\"");
  }
  MmaArguments a = mma_arguments(p, plan.copies);
  a.splits = plan.splits, a.split_chunks = plan.split_chunks, a.x_bytes = plan.x_bytes, a.rows = plan.rows;
  for (int64_t first = 0; first < p.io.M; first += 8 * plan.octets) {
    a.tokens = static_cast<int>(std::min<int64_t>(8 * plan.octets, p.io.M - first));
    a.token_base = first;
    switch (p.vec_len) {
      case 2:
        launch_mma<2>(a, plan, gpu);
        break;
      case 4:
        launch_mma<4>(a, plan, gpu);
        break;
      case 8:
        launch_mma<8>(a, plan, gpu);
        break;
      default:
        launch_mma<16>(a, plan, gpu);
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
