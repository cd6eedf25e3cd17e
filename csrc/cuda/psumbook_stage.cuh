// What a launch of codegemm works on, and x of a tile in shared memory: see psumbook.cuh.
#pragma once

#include "cuda/codegemm.h"
#include "cuda/device.cuh"
#include "cuda/ptx.cuh"

namespace lutgemm::cuda {

constexpr int kTileUnits = kWarpSize;
constexpr int kTileColumns = kTileUnits * kUnitColumns;
constexpr int kTableEntries = 256;                       // what a byte can name
constexpr int kEntryBytes = 256;                         // of two words a lane
constexpr int kHalfTable = kTableEntries * kEntryBytes;  // 64 KB
constexpr int kPsumWarps = 16;                           // of a block

LUTGEMM_ANYWHERE constexpr int word_tokens(PsumWord word) { return word == PsumWord::kPair14 ? 2 : 1; }
LUTGEMM_ANYWHERE constexpr bool is_float(PsumWord word) {
  return word == PsumWord::kFloat || word == PsumWord::kHalfFloat;
}
LUTGEMM_ANYWHERE constexpr int table_bytes(PsumWord word) {
  return word == PsumWord::kInt16 || word == PsumWord::kHalfFloat ? kHalfTable : 2 * kHalfTable;
}

// Shared memory behind the table: x as fp32; its fragments, of every column and half of the lanes; units of the lanes.
LUTGEMM_ANYWHERE constexpr int staged_bytes(PsumWord word, int vec_len) {
  return word_tokens(word) * kTileColumns * vec_len * 4;
}
LUTGEMM_ANYWHERE constexpr int fragment_words(int vec_len) { return vec_len <= 4 ? 2 : vec_len == 8 ? 4 : 8; }
LUTGEMM_ANYWHERE constexpr int fragment_bytes(PsumWord word, int vec_len) {
  return is_float(word) ? 0 : word_tokens(word) * kUnitColumns * 2 * kWarpSize * fragment_words(vec_len) * 4;
}
LUTGEMM_ANYWHERE constexpr int unit_bytes(PsumWord word) {
  return is_float(word) ? 0 : word_tokens(word) * kTileUnits * 8;
}
LUTGEMM_ANYWHERE constexpr int psumbook_bytes(PsumWord word, int vec_len) {
  return table_bytes(word) + staged_bytes(word, vec_len) + fragment_bytes(word, vec_len) + unit_bytes(word);
}

// Of a launch, for the kernels.
struct PsumShape {
  CodegemmUnits units;
  int M, N, K;
  int group_size;
  int num_codebooks;
  int entries;  // 1 << codebook_bits
  float units_per_group_inverse, num_codebooks_inverse;
  int vec_len;
  int64_t x_stride;
  const void* x;
  DType x_dtype;
  const void* codebooks;  // fp32, or fp16 for integer words (codegemm.h)
  const float* norms;
  int book_bytes;  // of one sibling's codebooks
};

// s of one of several siblings.
__device__ __forceinline__ void choose_codebooks(PsumShape& s, int sibling) {
  s.codebooks = static_cast<const unsigned char*>(s.codebooks) + static_cast<int64_t>(sibling) * s.book_bytes;
  s.norms += sibling * (2 * s.num_codebooks + 1);
}

// n / d for n >= 0, given 1 / d in fp32, in a third of the instructions: three roundings of 2**-24 leave the estimate
// off by one at most.
__device__ __forceinline__ int divide(int n, int d, float inverse) {
  if (n >= 1 << 22) return n / d;
  const int estimate = static_cast<int>(static_cast<float>(n) * inverse);
  const int rest = n - estimate * d;
  return rest < 0 ? estimate - 1 : rest >= d ? estimate + 1 : estimate;
}

// The slice and codebook of column `column` of unit `unit`; k is -1 where there is none.
struct Column {
  int k;  // the slice's first element
  int codebook;
};

__device__ __forceinline__ Column find_column(const PsumShape& s, int unit, int column) {
  const int group = divide(unit, s.units.units_per_group, s.units_per_group_inverse);
  const int in_group = (unit - group * s.units.units_per_group) * kUnitColumns + column;
  const int vector = divide(in_group, s.num_codebooks, s.num_codebooks_inverse);
  const bool there = unit < s.units.units && vector < s.units.group_vectors;
  return Column{there ? group * s.group_size + vector * s.vec_len : -1, in_group - vector * s.num_codebooks};
}

// That codebook alone: units start with codebook 0, but for 3 codebooks.
__device__ __forceinline__ int column_codebook(const PsumShape& s, int unit, int column) {
  return s.num_codebooks == 3 ? find_column(s, unit, column).codebook : column & (s.num_codebooks - 1);
}

// Element d of a lane's column in the staged tile: [d / width][column][lane][d % width], width = min(vec_len, 4), so
// that lanes read 8 or 16 adjacent bytes each.
template <int kVec>
__device__ __forceinline__ const float* staged_slice(const float* staged, int column, int lane, int d) {
  constexpr int kWidth = kVec < 4 ? kVec : 4;
  return staged + ((d / kWidth * kUnitColumns + column) * kWarpSize + lane) * kWidth + d % kWidth;
}

// x of tokens m, .. for the tile's columns, as fp32, zeros where there is none: one token's after the other's. By all
// threads of the block. All loads of a thread are under way together: each waits for L2, some 250 clocks.
template <int kTokens, int kVec>
__device__ __forceinline__ void stage_x(const PsumShape& s, int first_unit, int m, float* staged) {
  constexpr int kWidth = kVec < 4 ? kVec : 4, kThreads = kPsumWarps * kWarpSize, kValues = kTileColumns * kVec;
  constexpr int kPieces = kValues < kThreads ? 1 : kValues / kThreads;
  const bool wide = s.x_dtype == DType::kFloat32;
  uint32_t bits[kPieces][kTokens];
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int i = p * kThreads + threadIdx.x;
    const int within = i % kWidth, lane = i / kWidth % kWarpSize, outer = i / (kWidth * kWarpSize);
    const int d = outer / kUnitColumns * kWidth + within;
    const Column column = find_column(s, first_unit + lane, outer % kUnitColumns);
    const int k = column.k + d;
    const bool there = i < kValues && column.k >= 0 && k < s.K;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const int64_t at = (m + t) * s.x_stride + k;
      bits[p][t] = 0;
      if (there && m + t < s.M) {
        bits[p][t] = wide ? static_cast<const uint32_t*>(s.x)[at] : static_cast<const uint16_t*>(s.x)[at];
      }
    }
  }
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int i = p * kThreads + threadIdx.x;
    if (i >= kValues) break;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const auto half = static_cast<unsigned short>(bits[p][t]);
      staged[t * kValues + i] = wide                            ? __uint_as_float(bits[p][t])
                                : s.x_dtype == DType::kBFloat16 ? __bfloat162float(__ushort_as_bfloat16(half))
                                                                : __half2float(__ushort_as_half(half));
    }
  }
}

template <int kVec>
__device__ __forceinline__ void load_slice(const float* staged, int column, int lane, float (&x)[kVec]) {
#pragma unroll
  for (int d = 0; d < kVec; d += 4) {
    const float* slice = staged_slice<kVec>(staged, column, lane, d);
    if constexpr (kVec == 2) {
      const uint2 bits = load8(slice);
      x[0] = __uint_as_float(bits.x);
      x[1] = __uint_as_float(bits.y);
    } else {
      const uint4 bits = load16(slice);
      x[d] = __uint_as_float(bits.x);
      x[d + 1] = __uint_as_float(bits.y);
      x[d + 2] = __uint_as_float(bits.z);
      x[d + 3] = __uint_as_float(bits.w);
    }
  }
}

}  // namespace lutgemm::cuda
