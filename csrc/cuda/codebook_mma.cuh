// What codebook_mma.cu is made of: x and the codebooks into shared memory, codes into fragments, sums of one warp.
#pragma once

#include "cuda/codebook_mma.h"
#include "cuda/device.cuh"
#include "cuda/ptx.cuh"

namespace lutgemm::cuda::mma_parts {

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kLaneBytes = 16;  // of a chunk, for 16 rows
constexpr int kChunkBytes = kWarpSize * kLaneBytes;
constexpr int kLoads = kMmaTileRows / 16;  // of a chunk
constexpr int kFragments = kMmaTileRows / 8;
constexpr int kSumStride = 40;  // of a token's 32 sums: neighbouring tokens are 8 banks apart
constexpr int kMostTableBytes = 128 << 10;
constexpr int kLeastStagedBytes = 24 << 10;  // left for x, rather than more copies
constexpr int kMostStagedBytes = 68 << 10;   // 8 tokens of K = 4096, so that one pass needs no second kernel

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
  int tokens;  // of this pass, from token_base
  int64_t token_base;
  int whole_planes;  // 1, 2: that many planes, and every group a whole number of chunks; 0: anything else
  bool straight;     // inputs of a step follow one another through all groups
  bool aligned;      // rows of x start at multiples of 16 bytes
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

// x of this pass for steps first .. first + steps - 1: [token][step][piece][4 lanes][kPieceInputs], zeros past the end
// of a group and of K.
template <int kVec>
__device__ __forceinline__ void stage_x(const MmaArguments& a, int first, int steps, unsigned char* staged) {
  using S = Shape<kVec>;
  const int pieces = steps * 4 * S::kPieces, stride = token_bytes<kVec>(steps), first_k = first * S::kInputs;
  const int K = static_cast<int>(a.io.K);
#pragma unroll 1
  for (int token = 0; token < a.tokens; ++token) {
    const uint16_t* x = static_cast<const uint16_t*>(a.io.x) + (a.token_base + token) * a.io.x_stride;
    unsigned char* to = staged + token * stride;
    int done = 0;                                      // pieces
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

// One warp's part of a tile: items in order, sums of a group in `inner`, scaled into `outer` at its end.
template <int kVec, bool kBf16, int kTokenTiles>
struct WarpSums {
  using S = Shape<kVec>;
  const MmaArguments& a;
  const unsigned char* table;   // of this lane's copy
  const unsigned char* staged;  // of this lane's token and inputs, of its first token tile
  int entry_bytes, plane_bytes, tile_stride;
  int first_step;  // of the block
  bool has_token[kTokenTiles];

  float outer[kFragments][2 * kTokenTiles];  // row 2t, 2t + 1 of token r, then of token r + 8
  float inner[kFragments][4];
  uint32_t x[S::kMmas][4];
  uint4 scales;  // of the group, fp16; fp32 ones are loaded at its end
  int tile, item, step, in_group, group;

  __device__ __forceinline__ WarpSums(const MmaArguments& arguments, const unsigned char* tables,
                                      const unsigned char* x_at, int token_stride, int block_first_step)
      : a(arguments),
        entry_bytes(arguments.plan.copies * S::kPartBytes),
        plane_bytes(entry_bytes * arguments.entries * S::kParts),
        tile_stride(8 * token_stride),
        first_step(block_first_step) {
    const int lane = threadIdx.x % kWarpSize, r = lane / 4, t = lane % 4;
    table = tables + lane % a.plan.copies * S::kPartBytes;
    staged = x_at + r * token_stride + t * (S::kPieceInputs * 2);
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) has_token[i] = i * 8 + r < a.tokens;
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

  // A chunk that lies in one group and holds whole steps of kPlanes planes; data[l] are the codes of fragments 2l, 2l
  // + 1.
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

}  // namespace lutgemm::cuda::mma_parts
