// What codebook_mma.cu and codebook_gemm.cu share: the codebooks into shared memory, codes into fragments, sums of one
// warp.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/codebook_mma.h"
#include "cuda/device.cuh"
#include "cuda/ptx.cuh"

namespace lutgemm::cuda::mma_parts {

constexpr int kLaneBytes = 16;  // of a chunk, for 16 rows
constexpr int kChunkBytes = kWarpSize * kLaneBytes;
constexpr int kLoads = kMmaTileRows / 16;  // of a chunk
constexpr int kFragments = kMmaTileRows / 8;

// Of a launch, for both kernels.
struct MmaArguments {
  GpuIo io;
  MmaSteps steps;
  const unsigned char* codes;
  const unsigned char* scales;
  bool float_scales;
  const unsigned char* tables;
  const float* units;
  float* partial;  // [splits, M, N] where there are several
  int splits, split_chunks;
  int group_size, planes;
  BlockPlan rows;
  int book_bytes;           // of one sibling's tables
  int entry_bits;           // log2 of the entries of a codebook
  int copies, table_bytes;  // of the codebooks in shared memory
  int piece_bits;           // log2 of the pieces of 16 bytes of an entry's copies
  int x_bytes;              // of the staged x: of one stage in codebook_gemm
  int tokens;               // of this pass, from token_base; codebook_gemm: all
  int64_t token_base;
  int stage_chunks;  // codebook_gemm
  int token_blocks;  // codebook_gemm
  int whole_planes;  // 1, 2: that many planes, and every group a whole number of chunks; 0: anything else
  bool straight;     // inputs of a step follow one another through all groups
  bool aligned;      // rows of x start at multiples of 16 bytes; codebook_gemm: of 4
};

// Bytes of one copy of the codebooks, and of the part of an entry that is loaded at once.
inline int64_t copy_bytes(const CodebookMmaProblem& p) {
  return (int64_t(p.planes) << p.codebook_bits) * 2 * p.vec_len;
}
inline int part_bytes(const CodebookMmaProblem& p) { return p.vec_len < 8 ? 2 * p.vec_len : 16; }

// 128 bytes of copies of an entry, or as many as fit in `room`: at least 16 bytes.
inline int table_copies(const CodebookMmaProblem& p, int64_t room) {
  int copies = 128 / part_bytes(p);
  while (copy_bytes(p) * copies > room && copies * part_bytes(p) > 16) copies /= 2;
  return copies;
}

// Units of K for each of as many splits as end first, with the time that their partial sums take to L2 and back, at
// some 3 KB a clock, and the kernel that adds them.
inline int64_t best_split(const GpuIo& io, int64_t blocks, int64_t units, int64_t unit_clocks, int sm_count) {
  int64_t least = INT64_MAX, best = units;
  for (int64_t splits = 1; splits <= (units < 64 ? units : 64); ++splits) {
    const int64_t each = ceil_div(units, splits);
    const int64_t rounds = ceil_div(blocks * ceil_div(units, each), sm_count);
    const int64_t clocks =
        rounds * (3000 + each * unit_clocks) + (splits > 1 ? 2500 + splits * io.M * io.N * 8 / 3000 : 0);
    if (clocks < least) least = clocks, best = each;
  }
  return best;
}

inline MmaArguments mma_arguments(const CodebookMmaProblem& p, int copies) {
  MmaArguments a{};
  a.io = p.io;
  a.steps = mma_steps(p.io.K, p.group_size, p.planes, p.vec_len);
  a.codes = static_cast<const unsigned char*>(p.codes);
  a.scales = static_cast<const unsigned char*>(p.scales);
  a.float_scales = p.float_scales;
  a.tables = static_cast<const unsigned char*>(p.tables);
  a.units = p.units;
  a.partial = static_cast<float*>(p.workspace);
  a.group_size = static_cast<int>(p.group_size < p.io.K ? p.group_size : p.io.K);
  a.planes = p.planes;
  a.book_bytes = static_cast<int>(copy_bytes(p));
  a.entry_bits = p.codebook_bits;
  a.copies = copies;
  a.table_bytes = static_cast<int>(copy_bytes(p) * copies);
  while (16 << a.piece_bits < copies * part_bytes(p)) ++a.piece_bits;
  const int group_items = a.steps.steps_per_group * a.steps.items;
  const bool whole = p.planes <= 2 && (a.steps.groups == 1 || group_items % kChunkItems == 0);
  a.whole_planes = whole ? p.planes : 0;
  a.straight = a.steps.groups == 1 || p.group_size % (4 * a.steps.width) == 0;
  a.aligned = p.io.x_stride % 8 == 0;
  return a;
}

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

// Copies of the table's entries, 16 bytes a thread.
template <int kVec, int kThreads>
__device__ __forceinline__ void fill_table(const MmaArguments& a, int sibling, unsigned char* table) {
  using S = Shape<kVec>;
  const unsigned char* tables = a.tables + static_cast<int64_t>(sibling) * a.book_bytes;
  for (int i = threadIdx.x; i < a.table_bytes / 16; i += kThreads) {
    const int entry_part = i >> a.piece_bits;  // [plane][part][entry]
    const int entry = entry_part & ((1 << a.entry_bits) - 1), plane_part = entry_part >> a.entry_bits;
    const int plane = plane_part / S::kParts, part = plane_part % S::kParts;
    const unsigned char* from = tables + (((plane << a.entry_bits) + entry) * (kVec * 2) + part * 16);
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

// Where the scales of a lane's 8 rows of a tile in one group are: rows 8 * f + 2 * t + i of f = 0..3, i = 0, 1. Groups
// past the end have steps of zeros only.
__device__ __forceinline__ const unsigned char* scales_at(const MmaArguments& a, int tile, int group) {
  const int64_t at =
      (static_cast<int64_t>(tile) * a.steps.groups + min(group, a.steps.groups - 1)) * 4 + threadIdx.x % 4;
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

// The sum of two pairs of values, each rounded once.
template <bool kBf16>
__device__ __forceinline__ uint32_t add_pairs(uint32_t first, uint32_t second) {
  using Pair = std::conditional_t<kBf16, __nv_bfloat162, __half2>;
  static_assert(sizeof(Pair) == sizeof(uint32_t));
  Pair a, b;
  memcpy(&a, &first, sizeof a);
  memcpy(&b, &second, sizeof b);
  a = __hadd2(a, b);
  memcpy(&first, &a, sizeof a);
  return first;
}

// One warp's part of a tile of 32 rows, for octets of 8 tokens: items in order, sums of a group in `inner`, scaled into
// `outer` at its end. X says where x is: load(step, tile of 16 tokens, fragments of A for each mma).
template <int kVec, bool kBf16, int kOctets, typename X>
struct WarpSums {
  using S = Shape<kVec>;
  static constexpr int kTokenTiles = (kOctets + 1) / 2;  // of 16: of A
  const MmaArguments& a;
  const X& staged;
  const unsigned char* table;  // of this lane's copy
  int entry_bytes, plane_bytes;
  int first_step;  // of what is staged

  float outer[kFragments][2 * kOctets];  // row 2t, 2t + 1 of token r, then of token r + 8, ..
  float inner[kFragments][kTokenTiles][4];
  uint32_t x[kTokenTiles][S::kMmas][4];
  uint4 scales;  // of the group, fp16; fp32 ones are loaded at its end
  int tile, item, step, in_group, group;

  __device__ __forceinline__ WarpSums(const MmaArguments& arguments, const X& x_staged, const unsigned char* tables,
                                      int block_first_step)
      : a(arguments),
        staged(x_staged),
        entry_bytes(arguments.copies * S::kPartBytes),
        plane_bytes((entry_bytes * S::kParts) << arguments.entry_bits),
        first_step(block_first_step) {
    table = tables + threadIdx.x % kWarpSize % a.copies * S::kPartBytes;
  }

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
      for (int i = 0; i < 2 * kOctets; ++i) outer[f][i] = 0.f;
    }
    clear_inner();
  }

  __device__ __forceinline__ void clear_inner() {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int i = 0; i < 4 * kTokenTiles; ++i) inner[f][i / 4][i % 4] = 0.f;
    }
  }

  __device__ __forceinline__ void end_group() {
    float scale[kFragments][2];
    if (a.float_scales) {
      const unsigned char* from = scales_at(a, tile, group);
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        const uint2 wide = load8(from + 8 * f);
        scale[f][0] = __uint_as_float(wide.x), scale[f][1] = __uint_as_float(wide.y);
      }
    } else {
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        const uint32_t pair = part(scales, f);
        scale[f][0] = __half2float(__ushort_as_half(static_cast<unsigned short>(pair & 0xffffu)));
        scale[f][1] = __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)));
      }
    }
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int i = 0; i < 2 * kOctets; ++i) outer[f][i] = fmaf(inner[f][i / 4][i % 4], scale[f][i % 2], outer[f][i]);
    }
    clear_inner();
  }

  __device__ __forceinline__ void load_x(int at_step) {
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) staged.load(at_step, t, x[t]);
  }

  // One row's centroid (two of v = 2): words[m] are its part of mma m.
  __device__ __forceinline__ void centroid(int plane, const uint32_t (&codes)[S::kSlots],
                                           uint32_t (&words)[S::kMmas][2]) {
    const unsigned char* at = table + plane * plane_bytes + codes[0] * entry_bytes;
    if constexpr (kVec == 2) {
      words[0][0] = *reinterpret_cast<const uint32_t*>(at);
      words[0][1] = *reinterpret_cast<const uint32_t*>(table + plane * plane_bytes + codes[1] * entry_bytes);
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

  __device__ __forceinline__ void multiply(int f, const uint32_t (&words)[S::kMmas][2]) {
#pragma unroll
    for (int m = 0; m < S::kMmas; ++m) {
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) mma<kBf16>(inner[f][t], x[t][m], words[m]);
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

  // A chunk that lies in one group and holds whole steps of kPlanes planes; data[l] are the codes of fragments 2l, 2l
  // + 1. kSum: of two planes, the sums of their centroids in x's dtype are multiplied.
  template <int kPlanes, bool kSum>
  __device__ __forceinline__ void whole_steps(const uint4 (&data)[kLoads]) {
    constexpr int kSteps = kChunkItems / (kPlanes * S::kSlots);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      load_x(step + s);
      const auto look_up = [&](int plane, int f, uint32_t (&words)[S::kMmas][2]) {
        uint32_t codes[S::kSlots];
#pragma unroll
        for (int slot = 0; slot < S::kSlots; ++slot) {
          const int at = (s * kPlanes + plane) * S::kSlots + slot;
          codes[slot] = prmt(part(data[f / 2], at / 2), 0, 0x4440 + at % 2 * 2 + f % 2);
        }
        centroid(plane, codes, words);
      };
#pragma unroll
      for (int plane = 0; plane < (kSum ? 1 : kPlanes); ++plane) {
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
          uint32_t words[S::kMmas][2];
          look_up(plane, f, words);
          if constexpr (kSum) {
            uint32_t second[S::kMmas][2];
            look_up(1, f, second);
#pragma unroll
            for (int m = 0; m < S::kMmas; ++m) {
#pragma unroll
              for (int w = 0; w < 2; ++w) words[m][w] = add_pairs<kBf16>(words[m][w], second[m][w]);
            }
          }
          multiply(f, words);
        }
      }
    }
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
      if (plane < a.planes) {
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
          uint32_t words[S::kMmas][2];
          centroid(plane, codes[f], words);
          multiply(f, words);
        }
      }
      item += S::kSlots;
      if (item == a.steps.items) {
        item = 0;
        end_steps(1);
      }
    }
  }

  // kSum: a.whole_planes == 2 says that sums may be multiplied.
  template <bool kSum>
  __device__ __forceinline__ void chunk(const uint4 (&data)[kLoads]) {
    if (a.whole_planes == 0) return any_steps(data);
    if (a.whole_planes == 1) {
      whole_steps<1, false>(data);
    } else {
      whole_steps<2, kSum>(data);
    }
    end_steps(kChunkItems / a.steps.items);
  }
};

}  // namespace lutgemm::cuda::mma_parts
