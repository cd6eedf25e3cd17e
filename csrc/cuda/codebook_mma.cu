// Codebook weights on tensor cores: centroids from copies of the codebooks in shared memory straight into fragments of
// mma m16n8k16, for up to 16 tokens at a time.
//
//   y[m, n] = sum over groups g of scales[n, g] * sum over planes p, k in g of tables[p, codes[p, n, k / v], k % v] * x[m, k]
//
//   A  16 tokens x 16 inputs        the order of inputs within a step is free as long as A and B agree: lane 4 * r + t
//   B  16 inputs x 8 rows of W      has inputs 4t..4t+3 of token r (a[0], a[2]), of token r + 8 (a[1], a[3]) and of row r
//   D  16 tokens x 8 rows, fp32     (b[0], b[1]): a centroid of 4 fp16 is one 8-byte load, of 8 one 16-byte load for two
//                                   mma, into the registers that mma reads. Up to 8 tokens leave half of A empty
//
//   table   [plane][half of v = 16][entry][copy][min(2v, 16) bytes]     128 bytes of copies for each entry where they
//           fit: lane l reads copy l % copies, so the lanes that are served together use banks of their own
//   block   16 warps share tiles of 32 rows, each a part of K; their sums meet in shared memory, warp 0 first. A block
//           takes tile after tile, for one filling of the table and one staging of x
//
// Counts for 32 rows and 16 inputs of one codebook of v = 4 (1024 bits of codes): 4 look-ups of 2 wavefronts, and 1 or 2
// of x for up to 8 tokens (4 for 16): 9, 10 (12), so an SM takes 114, 102 (85) bits a clock; 2 codebooks of v = 8: 60.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/codebook_mma.h"
#include "cuda/epilogue.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/reduce.h"

namespace lutgemm::cuda {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kLaneBytes = 16;                // of a chunk, for 16 rows
constexpr int kChunkBytes = kWarpSize * kLaneBytes;
constexpr int kLoads = kMmaTileRows / 16;     // of a chunk
constexpr int kFragments = kMmaTileRows / 8;
constexpr int kSumStride = 40;                // of a token's 32 sums: neighbouring tokens are 8 banks apart
constexpr int kMostTableBytes = 128 << 10;
constexpr int kLeastStagedBytes = 24 << 10;   // left for x, rather than more copies
constexpr int kMostStagedBytes = 68 << 10;    // 8 tokens of K = 4096, so that one pass needs no second kernel

struct MmaArguments {
  GpuIo io;
  MmaSteps steps;
  CodebookMmaPlan plan;
  const unsigned char* codes;
  const unsigned char* scales;
  bool float_scales;
  const unsigned char* tables;
  const float* units;
  float* partial;  // [splits, M, N] where there are several
  int group_size, planes, entries, tiles;
  int tokens;      // of this pass, from token_base
  int64_t token_base;
  int whole_planes;  // 1, 2: that many planes, and every group a whole number of chunks; 0: anything else
  bool straight;   // inputs of a step follow one another through all groups
  bool aligned;    // rows of x start at multiples of 16 bytes
};

template <int kVec>
struct Shape {
  static constexpr int kWidth = kVec < 4 ? 4 : kVec;
  static constexpr int kSlots = kWidth / kVec;
  static constexpr int kInputs = 4 * kWidth;                   // of a step
  static constexpr int kMmas = kWidth / 4;                     // of a step and plane
  static constexpr int kPartBytes = kVec < 8 ? 2 * kVec : 16;  // of one load from the table
  static constexpr int kParts = 2 * kVec / kPartBytes;
  static constexpr int kPieceInputs = kWidth < 8 ? kWidth : 8;  // of one load from x
  static constexpr int kPieces = kWidth / kPieceInputs;
};

// Bytes from one token's staged x to the next: a phase of 4 (2) tokens is spread over all banks.
template <int kVec>
__device__ __forceinline__ int token_bytes(int steps) {
  return steps * Shape<kVec>::kInputs * 2 + 4 * Shape<kVec>::kPieceInputs * 2;
}

// Copies of the table's entries, 16 bytes a thread.
template <int kVec>
__device__ __forceinline__ void fill_table(const MmaArguments& a, unsigned char* table) {
  using S = Shape<kVec>;
  const int pieces = a.plan.copies * S::kPartBytes / 16;
  for (int i = threadIdx.x; i < a.plan.table_bytes / 16; i += kThreads) {
    const int entry_part = i / pieces;  // [plane][part][entry]
    const int entry = entry_part % a.entries, plane_part = entry_part / a.entries;
    const int plane = plane_part / S::kParts, part = plane_part % S::kParts;
    const unsigned char* from = a.tables + ((static_cast<int64_t>(plane) * a.entries + entry) * kVec * 2 + part * 16);
    uint4 value;
    if constexpr (kVec == 2) {
      const uint32_t word = *reinterpret_cast<const uint32_t*>(from);
      value = make_uint4(word, word, word, word);
    } else if constexpr (kVec == 4) {
      const uint2 words = load8(from);
      value = make_uint4(words.x, words.y, words.x, words.y);
    } else {
      value = load16(from);
    }
    store16(table + 16 * i, value);
  }
}

// x of this pass for steps first .. first + steps - 1: [token][step][piece][4 lanes][kPieceInputs], zeros past the end of
// a group and of K.
template <int kVec>
__device__ __forceinline__ void stage_x(const MmaArguments& a, int first, int steps, unsigned char* staged) {
  using S = Shape<kVec>;
  const int pieces = steps * 4 * S::kPieces, stride = token_bytes<kVec>(steps), first_k = first * S::kInputs;
  const int K = static_cast<int>(a.io.K);
#pragma unroll 1
  for (int token = 0; token < a.tokens; ++token) {
    const uint16_t* x = static_cast<const uint16_t*>(a.io.x) + (a.token_base + token) * a.io.x_stride;
    unsigned char* to = staged + token * stride;
    int done = 0;  // pieces
    if (S::kPieces == 1 && a.straight && a.aligned) {  // then the layout is that of x
      const int whole = max(min(steps * S::kInputs, K - first_k), 0) / 8;
      for (int i = threadIdx.x; i < whole; i += kThreads) store16(to + 16 * i, load16(x + first_k + 8 * i));
      done = whole * (8 / S::kPieceInputs);
    }
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

// Where the scales of a lane's 8 rows of a tile in one group are: rows 8 * f + 2 * t + i of f = 0..3, i = 0, 1. Groups
// past the end have steps of zeros only.
__device__ __forceinline__ const unsigned char* scales_at(const MmaArguments& a, int tile, int group) {
  const int64_t at = (static_cast<int64_t>(tile) * a.steps.groups + min(group, a.steps.groups - 1)) * 4 + threadIdx.x % 4;
  return a.scales + at * (a.float_scales ? 32 : 16);
}

__device__ __forceinline__ uint32_t part(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

template <bool kBf16>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kBf16) {
    mma_bf16(d, a, b);
  } else {
    mma_f16(d, a, b);
  }
}

// One warp's part of a tile: items in order, sums of a group in `inner`, scaled into `outer` at its end.
template <int kVec, bool kBf16, int kTokenTiles>
struct WarpSums {
  using S = Shape<kVec>;
  const MmaArguments& a;
  const unsigned char* table;   // of this lane's copy
  const unsigned char* staged;  // of this lane's token and inputs, of its first token tile
  int entry_bytes, plane_bytes, tile_stride;
  int first_step;               // of the block
  bool has_token[kTokenTiles];

  float outer[kFragments][2 * kTokenTiles];  // row 2t, 2t + 1 of token r, then of token r + 8
  float inner[kFragments][4];
  uint32_t x[S::kMmas][4];
  uint4 scales;  // of the group, fp16; fp32 ones are loaded at its end
  int tile, item, step, in_group, group;

  __device__ __forceinline__ void begin(int tile_, int chunk) {
    tile = tile_, item = 0;
    step = chunk * kChunkItems / a.steps.items;
    group = step / a.steps.steps_per_group;
    in_group = step - group * a.steps.steps_per_group;
    step -= first_step;
    scales = load16(scales_at(a, tile, group));
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int i = 0; i < 2 * kTokenTiles; ++i) outer[f][i] = 0.f;
    }
    clear_inner();
  }

  __device__ __forceinline__ void clear_inner() {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int i = 0; i < 4; ++i) inner[f][i] = 0.f;
    }
  }

  __device__ __forceinline__ void add_scaled(int f, float low, float high) {
#pragma unroll
    for (int i = 0; i < 2 * kTokenTiles; ++i) outer[f][i] = fmaf(inner[f][i], i % 2 ? high : low, outer[f][i]);
  }

  __device__ __forceinline__ void end_group() {
    if (a.float_scales) {
      const unsigned char* from = scales_at(a, tile, group);
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        const uint2 wide = load8(from + 8 * f);
        add_scaled(f, __uint_as_float(wide.x), __uint_as_float(wide.y));
      }
    } else {
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        const uint32_t pair = part(scales, f);
        add_scaled(f, __half2float(__ushort_as_half(static_cast<unsigned short>(pair & 0xffffu))),
                   __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16))));
      }
    }
    clear_inner();
  }

  __device__ __forceinline__ void load_x(int at_step) {
#pragma unroll
    for (int t = 0; t < 2; ++t) {
#pragma unroll
      for (int piece = 0; piece < S::kPieces; ++piece) {
        if (t >= kTokenTiles) {
#pragma unroll
          for (int m = 0; m < S::kMmas; ++m) x[m][1] = x[m][3] = 0;
          continue;
        }
        const unsigned char* from =
            staged + t * tile_stride + at_step * (S::kInputs * 2) + piece * (S::kPieceInputs * 8);
        const bool there = has_token[t % kTokenTiles];
        if constexpr (S::kPieceInputs == 8) {
          const uint4 v = there ? load16(from) : make_uint4(0, 0, 0, 0);
          x[2 * piece][t] = v.x, x[2 * piece][2 + t] = v.y;
          x[2 * piece + 1][t] = v.z, x[2 * piece + 1][2 + t] = v.w;
        } else {
          const uint2 v = there ? load8(from) : make_uint2(0, 0);
          x[0][t] = v.x, x[0][2 + t] = v.y;
        }
      }
    }
  }

  // One row's centroid (two of v = 2): words[m] are its part of mma m.
  __device__ __forceinline__ void centroid(int plane, uint32_t code, uint32_t second_code,
                                           uint32_t (&words)[S::kMmas][2]) {
    const unsigned char* at = table + plane * plane_bytes + code * entry_bytes;
    if constexpr (kVec == 2) {
      words[0][0] = *reinterpret_cast<const uint32_t*>(at);
      words[0][1] = *reinterpret_cast<const uint32_t*>(table + plane * plane_bytes + second_code * entry_bytes);
    } else if constexpr (kVec == 4) {
      const uint2 v = load8(at);
      words[0][0] = v.x, words[0][1] = v.y;
    } else {
#pragma unroll
      for (int part = 0; part < S::kParts; ++part) {
        const uint4 v = load16(at + part * (plane_bytes / S::kParts));
        words[2 * part][0] = v.x, words[2 * part][1] = v.y;
        words[2 * part + 1][0] = v.z, words[2 * part + 1][1] = v.w;
      }
    }
  }

  // One plane of a step: codes[f][slot] of a row of fragment f.
  __device__ __forceinline__ void multiply(int plane, const uint32_t (&codes)[kFragments][S::kSlots]) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      uint32_t words[S::kMmas][2];
      centroid(plane, codes[f][0], codes[f][S::kSlots - 1], words);
#pragma unroll
      for (int m = 0; m < S::kMmas; ++m) mma<kBf16>(inner[f], x[m], words[m]);
    }
  }

  __device__ __forceinline__ void end_steps(int steps) {
    step += steps;
    in_group += steps;
    if (in_group == a.steps.steps_per_group) {
      end_group();
      in_group = 0;
      scales = load16(scales_at(a, tile, ++group));
    }
  }

  // A chunk that lies in one group and holds whole steps of kPlanes planes; data[l] are the codes of fragments 2l, 2l + 1.
  template <int kPlanes>
  __device__ __forceinline__ void whole_steps(const uint4 (&data)[kLoads]) {
    constexpr int kSteps = kChunkItems / (kPlanes * S::kSlots);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      load_x(step + s);
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        uint32_t codes[kFragments][S::kSlots];
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
#pragma unroll
          for (int slot = 0; slot < S::kSlots; ++slot) {
            const int at = (s * kPlanes + plane) * S::kSlots + slot;
            codes[f][slot] = prmt(part(data[f / 2], at / 2), 0, 0x4440 + at % 2 * 2 + f % 2);
          }
        }
        multiply(plane, codes);
      }
    }
    end_steps(kSteps);
  }

  // Any chunk, item by item.
  __device__ __forceinline__ void any_steps(const uint4 (&data)[kLoads]) {
    uint64_t left[kLoads][2];
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      left[l][0] = data[l].x | static_cast<uint64_t>(data[l].y) << 32;
      left[l][1] = data[l].z | static_cast<uint64_t>(data[l].w) << 32;
    }
#pragma unroll 1
    for (int i = 0; i < kChunkItems; i += S::kSlots) {
      if (item == 0) load_x(step);
      uint32_t codes[kFragments][S::kSlots];
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
#pragma unroll
        for (int slot = 0; slot < S::kSlots; ++slot) {
          codes[f][slot] = prmt(static_cast<uint32_t>(left[f / 2][0]), 0, 0x4440 + slot * 2 + f % 2);
        }
      }
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {
        left[l][0] >>= 16 * S::kSlots;
        if (i + S::kSlots == kChunkItems / 2) left[l][0] = left[l][1];
      }
      const int plane = item / S::kSlots;
      if (plane < a.planes) multiply(plane, codes);
      item += S::kSlots;
      if (item == a.steps.items) {
        item = 0;
        end_steps(1);
      }
    }
  }

  __device__ __forceinline__ void chunk(const uint4 (&data)[kLoads]) {
    if (a.whole_planes == 1) {
      whole_steps<1>(data);
    } else if (a.whole_planes == 2) {
      whole_steps<2>(data);
    } else {
      any_steps(data);
    }
  }
};

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
  constexpr int kAhead = kTokenTiles == 2 && kVec >= 8 ? 1 : 2;  // as registers allow: up to 2 KB a warp, 32 KB a block
  const int64_t load_bytes = static_cast<int64_t>(a.steps.chunks) * kChunkBytes;  // 16 rows
  const int warp_chunks = warp_end - warp_begin;
  const int64_t to_next_tile = kLoads * load_bytes * gridDim.x - static_cast<int64_t>(warp_chunks) * kChunkBytes;
  const unsigned char* next = a.codes + kLaneBytes * lane + kLoads * load_bytes * blockIdx.x +
                              static_cast<int64_t>(warp_begin) * kChunkBytes;
  int tile_left = warp_chunks;
  int left = (a.tiles - blockIdx.x + gridDim.x - 1) / gridDim.x * warp_chunks;
  uint4 ahead[kAhead][kLoads];
  const auto load_next = [&](uint4 (&to)[kLoads]) {
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

  const int stride = token_bytes<kVec>(block_steps), r = lane / 4, t = lane % 4;
  WarpSums<kVec, kBf16, kTokenTiles> w{a,
                                       table + lane % a.plan.copies * S::kPartBytes,
                                       staged + r * stride + t * (S::kPieceInputs * 2),
                                       a.plan.copies * S::kPartBytes,
                                       a.plan.copies * S::kPartBytes * a.entries * S::kParts,
                                       8 * stride,
                                       first_step};
#pragma unroll
  for (int tile = 0; tile < kTokenTiles; ++tile) w.has_token[tile] = tile * 8 + r < a.tokens;
  const float unit = a.units[0] * a.units[1];

  for (int tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
    w.begin(tile, warp_begin);
    for (int chunk = warp_begin; chunk < warp_end; ++chunk) {
      const uint4 now[kLoads] = {ahead[0][0], ahead[0][1]};
#pragma unroll
      for (int i = 0; i + 1 < kAhead; ++i) {
#pragma unroll
        for (int l = 0; l < kLoads; ++l) ahead[i][l] = ahead[i + 1][l];
      }
      load_next(ahead[kAhead - 1]);
      w.chunk(now);
    }
    w.end_group();

#pragma unroll
    for (int token_tile = 0; token_tile < kTokenTiles; ++token_tile) {
      if (!w.has_token[token_tile]) continue;
      float* to = sums + (warp * a.tokens + token_tile * 8 + r) * kSumStride + 2 * t;
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        const float *pair = &w.outer[f][2 * token_tile];
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

template <int kVec, bool kBf16>
void launch_mma(const MmaArguments& a, const Gpu& gpu) {
  const LaunchShape shape{dim3(a.plan.blocks, a.plan.splits), dim3(kThreads),
                          static_cast<size_t>(a.plan.table_bytes + a.plan.x_bytes + a.plan.sum_bytes), gpu.stream, true};
  if (a.plan.token_tiles == 1) {
    launch(codebook_mma_kernel<kVec, kBf16, 1>, shape, a);
  } else {
    launch(codebook_mma_kernel<kVec, kBf16, 2>, shape, a);
  }
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
  plan.token_tiles = p.io.M > 8 ? 2 : 1;
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
