// The Psumbook: inner products of slices of x with all centroids, in shared memory, so that no two lanes of a warp ever
// want the same bank.
//
//   psumbook[column][e] = sum over d of codebooks[c, e, d] * x[m, v*j + d]       column = (slice j, codebook c)
//
// A tile is 32 units of 4 columns (codegemm.h), one unit for each lane. A lane looks up its own columns only, and its
// words all lie in its own bank: 32 look-ups of any codes take one cycle, where one table that all lanes share takes
// 2.8 (fp16 entries) or 3.4 (fp32). The address of a word is then
//
//   256 * code + 4 * lane (+ a constant):  the code is byte 1, the lane byte 0, so one PRMT makes it of a word of codes
//
//              byte    0          4     ..   124        128       ..    252
//   entry e    kInt16  lane 0     lane 1     lane 31    lane 0          lane 31     a word: columns 0, 1 | columns 2, 3
//              kFloat  column 0 of all lanes            column 1 of all lanes       columns 2, 3: 64 KB further on
//              kPair14 as kFloat; a word is entry(token 1) * 65536 + entry(token 0)
//
// Integer entries are rounded in units of a lane: its largest possible entry, by Cauchy and Schwarz |x slice| times the
// largest norm of a centroid, is 32767 (kInt16) or 8191 (kPair14) of them. So outliers of x coarsen only the 4 columns
// beside them, and sums of 4 entries are exact: below 2**17, and for kPair14 below 2**15, as its lower half demands.
#pragma once

#include "cuda/codegemm.h"
#include "cuda/device.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/ptx.cuh"

namespace lutgemm::cuda {

constexpr int kTileUnits = kWarpSize;
constexpr int kTileColumns = kTileUnits * kUnitColumns;
constexpr int kTableEntries = 256;                       // what a byte can name
constexpr int kEntryBytes = 256;                         // of two words a lane
constexpr int kHalfTable = kTableEntries * kEntryBytes;  // 64 KB

LUTGEMM_ANYWHERE constexpr int word_tokens(PsumWord word) { return word == PsumWord::kPair14 ? 2 : 1; }
LUTGEMM_ANYWHERE constexpr int table_bytes(PsumWord word) {
  return word == PsumWord::kInt16 ? kHalfTable : 2 * kHalfTable;
}
LUTGEMM_ANYWHERE constexpr int staged_bytes(PsumWord word, int vec_len) {
  return word_tokens(word) * kTileColumns * vec_len * 4;
}

// Of a launch, for the kernels.
struct PsumShape {
  CodegemmUnits units;
  int M, N, K;
  int group_size;
  int num_codebooks;
  int entries;  // 1 << codebook_bits
  int vec_len;
  int64_t x_stride;
  const void* x;
  DType x_dtype;
  const float* codebooks;
  const float* norms;  // [num_codebooks], then the unit of the scales
};

// The slice and codebook of column `column` of unit `unit`; k is -1 where there is none.
struct Column {
  int k;  // the slice's first element
  int codebook;
};

__device__ __forceinline__ Column find_column(const PsumShape& s, int unit, int column) {
  const int group = unit / s.units.units_per_group;
  const int in_group = (unit - group * s.units.units_per_group) * kUnitColumns + column;
  const int vector = in_group / s.num_codebooks;
  const bool there = unit < s.units.units && vector < s.units.group_vectors;
  return Column{there ? group * s.group_size + vector * s.vec_len : -1, in_group - vector * s.num_codebooks};
}

// Element d of a lane's column in the staged tile: [d / width][column][lane][d % width], width = min(vec_len, 4), so
// that lanes read 8 or 16 adjacent bytes each.
template <int kVec>
__device__ __forceinline__ const float* staged_slice(const float* staged, int column, int lane, int d) {
  constexpr int kWidth = kVec < 4 ? kVec : 4;
  return staged + ((d / kWidth * kUnitColumns + column) * kWarpSize + lane) * kWidth + d % kWidth;
}

// x of token m for the tile's columns, as fp32, zeros where there is none. By all threads of the block.
template <int kVec>
__device__ __forceinline__ void stage_x(const PsumShape& s, int first_unit, int m, float* staged) {
  constexpr int kWidth = kVec < 4 ? kVec : 4;
  for (int i = threadIdx.x; i < kTileColumns * kVec; i += blockDim.x) {
    const int within = i % kWidth, lane = i / kWidth % kWarpSize, outer = i / (kWidth * kWarpSize);
    const int d = outer / kUnitColumns * kWidth + within;
    const Column column = find_column(s, first_unit + lane, outer % kUnitColumns);
    const int k = column.k + d;
    const bool there = column.k >= 0 && k < s.K && m < s.M;
    staged[i] = there ? load_value(s.x, s.x_dtype, m * s.x_stride + k) : 0.f;
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

template <int kVec>
__device__ __forceinline__ float dot(const float (&x)[kVec], const float (&c)[kVec]) {
  float sum = x[0] * c[0];
#pragma unroll
  for (int d = 1; d < kVec; ++d) sum = fmaf(x[d], c[d], sum);
  return sum;
}

template <int kVec>
__device__ __forceinline__ void load_centroid(const float* centroid, float (&c)[kVec]) {
#pragma unroll
  for (int d = 0; d < kVec; d += 4) {
    if constexpr (kVec == 2) {
      const uint2 bits = load8(centroid);
      c[0] = __uint_as_float(bits.x);
      c[1] = __uint_as_float(bits.y);
    } else {
      const uint4 bits = load16(centroid + d);
      c[d] = __uint_as_float(bits.x);
      c[d + 1] = __uint_as_float(bits.y);
      c[d + 2] = __uint_as_float(bits.z);
      c[d + 3] = __uint_as_float(bits.w);
    }
  }
}

// What a lane's integers count: results are integer * scale * unit, entries are rounded(value * inverse).
struct LaneUnit {
  float unit, inverse;
};

// A bound that is NaN or Inf makes every result of the lane NaN; one that no fp32 reciprocal serves counts as zero.
template <int kVec>
__device__ __forceinline__ LaneUnit lane_unit(const PsumShape& s, const float* staged, int first_unit, float largest) {
  constexpr float kLeastBound = 1e-30f;
  const int lane = threadIdx.x % kWarpSize;
  float bound = 0.f;
  bool finite = true;
#pragma unroll
  for (int column = 0; column < kUnitColumns; ++column) {
    float x[kVec];
    load_slice<kVec>(staged, column, lane, x);
    const float norm = sqrtf(dot<kVec>(x, x)) * s.norms[find_column(s, first_unit + lane, column).codebook];
    finite = finite && norm <= 3e38f;
    bound = fmaxf(bound, norm);
  }
  if (!finite) return LaneUnit{__uint_as_float(0x7fc00000u), 0.f};
  return bound < kLeastBound ? LaneUnit{0.f, 0.f}
                             : LaneUnit{bound / largest * s.norms[s.num_codebooks], largest / bound};
}

// Zero for NaN and Inf too where the lane has no unit, so that they stay out of the other token's half of a word.
__device__ __forceinline__ float scaled(float x, float inverse) { return inverse == 0.f ? 0.f : x * inverse; }

constexpr float kRoundToInteger = 12582912.f;  // 1.5 * 2**23: the sum's lower bits are the integer nearest to the other

__device__ __forceinline__ uint32_t rounded_bits(float value) { return __float_as_uint(value + kRoundToInteger); }

// Makes the table, each warp its share of the entries. `staged` holds word_tokens tiles one after another. Every step
// takes two slices of a lane through all entries: two columns of one token, or one column of two tokens.
template <PsumWord kWord, int kVec>
__device__ __forceinline__ void build_psumbook(const PsumShape& s, const float* staged, int first_unit,
                                               const LaneUnit (&units)[word_tokens(kWord)], unsigned char* table) {
  constexpr bool kPair = kWord == PsumWord::kPair14;
  [[maybe_unused]] constexpr int kUnroll = kVec < 8    ? 4
                                           : kVec < 16 ? 2
                                                       : 1;  // about 32 registers of centroids under way
  constexpr int kSteps = kPair ? kUnitColumns : kUnitColumns / 2;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
#pragma unroll 1
  for (int step = 0; step < kSteps; ++step) {
    const int column_a = kPair ? step : 2 * step, column_b = kPair ? step : 2 * step + 1;
    float xa[kVec], xb[kVec];
    load_slice<kVec>(staged, column_a, lane, xa);
    load_slice<kVec>(staged + (kPair ? kTileColumns * kVec : 0), column_b, lane, xb);
    if constexpr (kWord != PsumWord::kFloat) {
#pragma unroll
      for (int d = 0; d < kVec; ++d) {
        xa[d] = scaled(xa[d], units[0].inverse);
        xb[d] = scaled(xb[d], units[kPair ? 1 : 0].inverse);
      }
    }
    const float* book_a = s.codebooks + find_column(s, first_unit + lane, column_a).codebook * s.entries * kVec;
    const float* book_b = s.codebooks + find_column(s, first_unit + lane, column_b).codebook * s.entries * kVec;
    unsigned char* words = table + 4 * lane;
    if (kWord == PsumWord::kInt16) words += step * 128;
    if (kWord == PsumWord::kFloat) words += step * kHalfTable;
    if (kPair) words += step / 2 * kHalfTable + step % 2 * 128;
#pragma unroll kUnroll
    for (int e = warp; e < s.entries; e += warps) {
      float ca[kVec], cb[kVec];
      load_centroid<kVec>(book_a + e * kVec, ca);
      const float a = dot<kVec>(xa, ca);
      float b;
      if constexpr (kPair) {
        b = dot<kVec>(xb, ca);
      } else {
        load_centroid<kVec>(book_b + e * kVec, cb);
        b = dot<kVec>(xb, cb);
      }
      uint32_t* word = reinterpret_cast<uint32_t*>(words + e * kEntryBytes);
      if constexpr (kWord == PsumWord::kInt16) {
        word[0] = prmt(rounded_bits(a), rounded_bits(b), 0x5410);
      } else if constexpr (kPair) {
        word[0] = (rounded_bits(b) << 16) + (rounded_bits(a) - __float_as_uint(kRoundToInteger));
      } else {
        word[0] = __float_as_uint(a);
        word[kWarpSize] = __float_as_uint(b);
      }
    }
  }
}

}  // namespace lutgemm::cuda
