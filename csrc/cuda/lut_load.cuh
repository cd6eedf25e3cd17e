// What the kernel of lut.cuh is told, and how it reads the weight: codes and scales of neighbouring rows, and lines of
// both that are asked for ahead.
#pragma once

#include "cuda/device.cuh"
#include "cuda/lut.h"
#include "cuda/ptx.cuh"

namespace lutgemm::cuda {

// Strides and counts of LutProblem and LutPlan, as the kernel steps by them.
struct LutArguments {
  GpuIo io;
  const char* codes;
  const char* scales;
  const float* scale_unit;
  float* partial;                   // [splits, M, N], or null when there is one split
  int64_t step_codes, step_scales;  // from a warp's strip to its next: bytes
  int64_t last_plane_codes;         // from the last plane of a strip to the next strip
  int offset_scales;                // from a strip's first term to its offsets
  int tile_codes, tile_scales;      // from a tile to the next: bytes, below 2^29 for kMaxFeatures
  uint64_t group_inverse;
  int quad_scales;  // of a term, from a quad of rows to the next: bytes
  int terms, bits;
  bool offsets, uniform, wide_scales;
  int ahead;  // strips of a warp that are asked for before they are needed
  int all_strips, strips_of_block, all_tables, tables_of_split;
};

constexpr int kUnitWords = kUnitInputs / kWordInputs;
constexpr int kPlaneBytes = kPlaneWords * 4, kQuadBytes = kPlaneBytes / 4, kWordBytes = kQuadBytes / kUnitWords;

// word / (words of a group) by a multiplication with inverse = 2^40 / divisor + 1. Exact for words and divisors up to
// 2^19, all that kMaxFeatures allows: inverse * divisor exceeds 2^40 by at most the divisor, and word * divisor < 2^40.
constexpr int kInverseBits = 40;
__device__ __forceinline__ int group_of_word(int word, uint64_t inverse) {
  return static_cast<int>(static_cast<unsigned>(word) * inverse >> kInverseBits);
}

// Words of a plane, of neighbouring rows.
template <int kRows>
struct RowCodes {
  uint32_t row[kRows];
  __device__ __forceinline__ void load(const char* from) {
    if constexpr (kRows == 4) {
      const uint4 loaded = load_stream16(from);
      row[0] = loaded.x, row[1] = loaded.y, row[2] = loaded.z, row[3] = loaded.w;
    } else if constexpr (kRows == 2) {
      const uint2 loaded = load_stream8(from);
      row[0] = loaded.x, row[1] = loaded.y;
    } else {
      row[0] = load_stream4(from);
    }
  }
};

// Scales of the rows of a load: of four rows in fp16 or fp32, or of fewer in what the arguments say. `first`: of the
// load's rows in its quad.
template <int kRows>
struct NarrowScales {
  static_assert(kRows == 4, "a whole quad");
  static constexpr bool kAnyKind = false, kWide = false;
  uint32_t pairs[2];
  __device__ __forceinline__ void load(const char* quad, bool, int) {
    const uint2 loaded = load_stream8(quad);
    pairs[0] = loaded.x, pairs[1] = loaded.y;
  }
  __device__ __forceinline__ float of(int row, bool, int) const {
    const uint32_t pair = pairs[row / 2];
    return __half2float(__ushort_as_half(static_cast<unsigned short>(row % 2 ? pair >> 16 : pair & 0xffffu)));
  }
};

template <int kRows>
struct WideScales {
  static_assert(kRows == 4, "a whole quad");
  static constexpr bool kAnyKind = false, kWide = true;
  uint4 values;
  __device__ __forceinline__ void load(const char* quad, bool, int) { values = load_stream16(quad); }
  __device__ __forceinline__ float of(int row, bool, int) const {
    return __uint_as_float(row == 0 ? values.x : row == 1 ? values.y : row == 2 ? values.z : values.w);
  }
};

template <int kRows>
struct AnyScales {
  static_assert(kRows <= 2, "at most a pair");
  static constexpr bool kAnyKind = true, kWide = false;
  uint32_t words[kRows];  // of fp16 the first alone: the pair that has the rows
  __device__ __forceinline__ void load(const char* quad, bool wide, int first) {
    if (!wide) {
      words[0] = load_stream4(quad + first / 2 * 4);
    } else if constexpr (kRows == 1) {
      words[0] = load_stream4(quad + first * 4);
    } else {
      const uint2 loaded = load_stream8(quad + first * 4);
      words[0] = loaded.x, words[1] = loaded.y;
    }
  }
  __device__ __forceinline__ float of(int row, bool wide, int first) const {
    const uint32_t half = words[0] >> (first + row) % 2 * 16 & 0xffffu;
    const float narrow = __half2float(__ushort_as_half(static_cast<unsigned short>(half)));
    return wide ? __uint_as_float(words[row]) : narrow;
  }
};

// What a lane asks for ahead of its warp, to L2: lines of the planes of a strip, and of the scales of its tile, up to
// 8 KB of them.
template <class Shape>
struct Prefetch {
  static constexpr int kLine = 128;  // bytes: 8 words of 4 rows
  static constexpr int kQuadLines = Shape::kWords < 8 ? 1 : Shape::kWords / 8;
  static constexpr int kPlaneLines = Shape::kStripRows / 4 * kQuadLines, kPlanes = kWarpSize / kPlaneLines;
  const char* codes;  // of the lane's line of the lane's first plane
  const char* scales;
  int plane, scale_bytes;

  __device__ __forceinline__ Prefetch(const LutArguments& arguments, const char* strip_codes, const char* tile_scales) {
    const int lane = threadIdx.x % kWarpSize, line = lane % kPlaneLines;
    plane = lane / kPlaneLines;
    codes = strip_codes + (plane * kPlaneBytes + line / kQuadLines * kQuadBytes + line % kQuadLines * kLine);
    scales = tile_scales + lane * kLine;
    scale_bytes = arguments.terms * 4 * arguments.quad_scales - lane * kLine;
  }
  __device__ __forceinline__ void step(const LutArguments& arguments) {
    codes += arguments.step_codes, scales += arguments.step_scales;
  }
  __device__ __forceinline__ void operator()(const LutArguments& arguments, int first_plane) const {
#pragma unroll
    for (int more = 0; more < 8; more += kPlanes) {
      if (plane + more >= first_plane && plane + more < arguments.bits) prefetch_l2(codes + more * kPlaneBytes);
    }
#pragma unroll
    for (int more = 0; more < 2 * kWarpSize * kLine; more += kWarpSize * kLine) {
      if (scale_bytes > more) prefetch_l2(scales + more);
    }
  }
};

}  // namespace lutgemm::cuda
