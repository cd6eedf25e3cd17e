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
//              kHalfFloat  the same of columns 0, 1, or of columns 2, 3 alone
//              kPair14 as kFloat; a word is entry(token 1) * 65536 + entry(token 0)
//
// Integer entries are rounded in units of a lane: its largest possible entry, by Cauchy and Schwarz |x slice| times the
// largest norm of a centroid, is 32767 (kInt16) or 8191 (kPair14) of them. So outliers of x coarsen only the 4 columns
// beside them, and sums of 4 entries are exact: below 2**17, and for kPair14 below 2**15, as its lower half demands.
// They are made by tensor cores: x, in units, is the sum of two fp16 values to 2**-22, centroids are fp16 times a power
// of two (16-bit codebooks; fp32 ones take kFloat), and one mma makes 16 lanes x 8 entries of a column. fp32 entries
// are made by FFMA, in order.
#pragma once

#include "cuda/psumbook_stage.cuh"

namespace lutgemm::cuda {

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
__device__ __forceinline__ LaneUnit lane_unit(const PsumShape& s, const float* staged, float largest) {
  constexpr float kLeastBound = 1e-30f;
  const int lane = threadIdx.x % kWarpSize;
  float bound = 0.f;
  bool finite = true;
#pragma unroll
  for (int column = 0; column < kUnitColumns; ++column) {
    float x[kVec];
    load_slice<kVec>(staged, column, lane, x);
    const float norm = sqrtf(dot<kVec>(x, x)) * s.norms[column & (s.num_codebooks - 1)];
    finite = finite && norm <= 3e38f;
    bound = fmaxf(bound, norm);
  }
  if (!finite) return LaneUnit{__uint_as_float(0x7fc00000u), 0.f};
  return bound < kLeastBound ? LaneUnit{0.f, 0.f}
                             : LaneUnit{bound / largest * s.norms[s.num_codebooks], largest / bound};
}

__device__ __forceinline__ uint32_t half_pair(float low, float high) {
  return __half_as_ushort(__float2half_rn(low)) | static_cast<uint32_t>(__half_as_ushort(__float2half_rn(high))) << 16;
}

__device__ __forceinline__ float half_error(float x) { return x - __half2float(__float2half_rn(x)); }

// x in units as fragments A of mma m16n8k16, rows being lanes: [token][column][half of the lanes][thread][words]. With
// group = thread / 4, t = thread % 4, a pair being two adjacent elements of the slice in fp16, and an error what fp16
// leaves of them:
//   v = 2, 4   k 0..v-1 values, then errors: t has pair t, or the errors of pair t - v / 2; the rest of k is zero
//   v = 8      k 0..7 values, 8..15 errors: pair t and its errors
//   v = 16     two mma, of values and of errors: pairs t and 4 + t
// so that all but v = 2 multiply centroid pair t % (v / 2) (and 4 + t). Words are in the order of the registers of mma.
template <PsumWord kWord, int kVec>
__device__ __forceinline__ void make_fragments(const PsumShape& s, const float* staged, const LaneUnit* units,
                                               uint32_t* fragments) {
  constexpr int kWords = fragment_words(kVec);
  for (int i = threadIdx.x; i < word_tokens(kWord) * kUnitColumns * 2 * kWarpSize; i += blockDim.x) {
    const int group = i / 4 % 8, t = i % 4, half = i / kWarpSize % 2, column = i / (2 * kWarpSize) % kUnitColumns;
    const int token = i / (2 * kWarpSize * kUnitColumns);
    uint32_t words[kWords];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int lane = half * 16 + row * 8 + group;
      const int codebook = column & (s.num_codebooks - 1);  // a unit starts with codebook 0
      const float inverse = units[token * kTileUnits + lane].inverse;
      const float factor = inverse * s.norms[s.num_codebooks + 1 + codebook];
      const auto element =
          [&](int d) {  // zero for NaN and Inf, where a lane has no unit: they stay out of other tokens
            const float x = *staged_slice<kVec>(staged + token * (kTileColumns * kVec), column, lane, d);
            return inverse == 0.f ? 0.f : x * factor;
          };
      if constexpr (kVec <= 4) {
        const int pair = t % (kVec / 2), part = t / (kVec / 2);
        const float low = element(2 * pair), high = element(2 * pair + 1);
        words[row] = part == 0 ? half_pair(low, high) : part == 1 ? half_pair(half_error(low), half_error(high)) : 0;
      } else {
#pragma unroll
        for (int p = 0; p < kVec / 8; ++p) {
          const float low = element(8 * p + 2 * t), high = element(8 * p + 2 * t + 1);
          words[2 * p + row] = half_pair(low, high);
          words[kWords / 2 + 2 * p + row] = half_pair(half_error(low), half_error(high));
        }
      }
    }
    if constexpr (kWords == 2) {
      store8(fragments + i * 2, make_uint2(words[0], words[1]));
    } else {
#pragma unroll
      for (int w = 0; w < kWords; w += 4) {
        store16(fragments + i * kWords + w, make_uint4(words[w], words[w + 1], words[w + 2], words[w + 3]));
      }
    }
  }
}

constexpr float kRoundToInteger = 12582912.f;  // 1.5 * 2**23: the sum's lower bits are the integer nearest to the other

__device__ __forceinline__ uint32_t rounded_bits(float value) { return __float_as_uint(value + kRoundToInteger); }

// The table of integers, 16 entries to a warp. A step is the two columns of a kInt16 word, or the two tokens of one
// column. One mma has one codebook for 16 lanes, so 3 codebooks, which lanes have in different columns, take kFloat.
template <PsumWord kWord, int kVec>
__device__ __forceinline__ void build_integers(const PsumShape& s, const uint32_t* fragments, unsigned char* table) {
  constexpr bool kPair = kWord == PsumWord::kPair14;
  constexpr int kSteps = kPair ? kUnitColumns : kUnitColumns / 2;
  constexpr int kWords = fragment_words(kVec), kMmas = kVec == 16 ? 2 : 1;
  constexpr int kColumnWords = 2 * kWarpSize * kWords;  // of fragments
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, group = lane / 4, t = lane % 4;
  const int entries = max(s.entries, 8), book_words = entries * (kVec / 2);
  const uint32_t* books = static_cast<const uint32_t*>(s.codebooks) + group * (kVec / 2) + t % (kVec / 2);
  fragments += lane * kWords;
  // Threads of one group have entries in the same banks, so each starts with other lanes.
  int to[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) to[r] = 2 * t * kEntryBytes + ((r + t) % 4 * 8 + group) * 4;

#pragma unroll 1
  for (int i = 0; i < kTableEntries / 8 / kPsumWarps * kSteps; ++i) {
    const int step = i % kSteps, first = (warp + i / kSteps * kPsumWarps) * 8;
    if (first >= entries) break;
    float d[2][2][4] = {};  // [column or token][half of the lanes]
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int column = kPair ? step : 2 * step + side, token = kPair ? side : 0;
      const uint32_t* entry = books + (column & (s.num_codebooks - 1)) * book_words + first * (kVec / 2);
      uint32_t b[2];
      b[0] = entry[0];
      b[1] = kVec == 16 ? entry[4] : b[0];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t* from = fragments + (token * kUnitColumns + column) * kColumnWords + half * kWarpSize * kWords;
#pragma unroll
        for (int m = 0; m < kMmas; ++m) {
          uint32_t a[4] = {};
          if constexpr (kWords == 2) {
            const uint2 v = load8(from);
            a[0] = v.x, a[1] = v.y;
          } else {
            const uint4 v = load16(from + 4 * m);
            a[0] = v.x, a[1] = v.y, a[2] = v.z, a[3] = v.w;
          }
          mma_f16(d[side][half], a, b);
        }
      }
    }
    unsigned char* words = table + first * kEntryBytes + (kPair ? step / 2 * kHalfTable + step % 2 * 128 : step * 128);
#pragma unroll
    for (int k = 0; k < 2; ++k) {  // entry first + 2t + k, of lanes group, 8 + group, ..
      uint32_t word[4], turned[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const uint32_t low = rounded_bits(d[0][r / 2][r % 2 * 2 + k]);
        const uint32_t high = rounded_bits(d[1][r / 2][r % 2 * 2 + k]);
        word[r] = kPair ? (high << 16) + (low - __float_as_uint(kRoundToInteger)) : prmt(low, high, 0x5410);
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) turned[r] = t % 2 ? word[(r + 1) % 4] : word[r];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        *reinterpret_cast<uint32_t*>(words + k * kEntryBytes + to[r]) = t / 2 ? turned[(r + 2) % 4] : turned[r];
      }
    }
  }
}

// The table of fp32 entries: each warp takes every 16th, two columns of all lanes at a time, from pair first_pair on.
template <int kVec, int kPairs>
__device__ __forceinline__ void build_floats(const PsumShape& s, const float* staged, int first_unit, int first_pair,
                                             unsigned char* table) {
  [[maybe_unused]] constexpr int kUnroll = kVec < 8 ? 4 : kVec < 16 ? 2 : 1;  // some 32 registers of centroids
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll 1
  for (int i = 0; i < kPairs; ++i) {
    const int first = 2 * (first_pair + i);
    float xa[kVec], xb[kVec];
    load_slice<kVec>(staged, first, lane, xa);
    load_slice<kVec>(staged, first + 1, lane, xb);
    const float* books = static_cast<const float*>(s.codebooks) + warp * kVec;
    const float* a = books + column_codebook(s, first_unit + lane, first) * s.entries * kVec;
    const float* b = books + column_codebook(s, first_unit + lane, first + 1) * s.entries * kVec;
    float* word = reinterpret_cast<float*>(table + i * kHalfTable + warp * kEntryBytes + 4 * lane);
#pragma unroll kUnroll
    for (int e = warp; e < s.entries; e += kPsumWarps) {
      float ca[kVec], cb[kVec];
      load_centroid<kVec>(a, ca);
      load_centroid<kVec>(b, cb);
      word[0] = dot<kVec>(xa, ca);
      word[kWarpSize] = dot<kVec>(xb, cb);
      a += kPsumWarps * kVec;
      b += kPsumWarps * kVec;
      word += kPsumWarps * kEntryBytes / 4;
    }
  }
}

// The whole: x staged, and the table of all 4 columns of 32 lanes (kHalfFloat: of pair `half`) made, for tokens m, ..
// Returns this lane's units. All threads of the block; behind the last barrier inside, the table is there.
template <PsumWord kWord, int kVec>
__device__ __forceinline__ void make_psumbook(const PsumShape& s, int first_unit, int half, int m, unsigned char* table,
                                              float (&unit)[word_tokens(kWord)]) {
  constexpr int kTokens = word_tokens(kWord);
  float* staged = reinterpret_cast<float*>(table + table_bytes(kWord));
  stage_x<kTokens, kVec>(s, first_unit, m, staged);
  __syncthreads();
  if constexpr (is_float(kWord)) {
    build_floats<kVec, table_bytes(kWord) / kHalfTable>(s, staged, first_unit, half, table);
    unit[0] = 1.f;
  } else {
    uint32_t* fragments = reinterpret_cast<uint32_t*>(staged + kTokens * kTileColumns * kVec);
    LaneUnit* units = reinterpret_cast<LaneUnit*>(fragments + fragment_bytes(kWord, kVec) / 4);
    if (threadIdx.x < kTokens * kWarpSize) {
      constexpr float kLargest = kWord == PsumWord::kInt16 ? 32767.f : 8191.f;
      const int token = threadIdx.x / kWarpSize;
      units[threadIdx.x] = lane_unit<kVec>(s, staged + token * kTileColumns * kVec, kLargest);
    }
    __syncthreads();
    make_fragments<kWord, kVec>(s, staged, units, fragments);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) unit[t] = units[t * kTileUnits + threadIdx.x % kWarpSize].unit;
    __syncthreads();
    build_integers<kWord, kVec>(s, fragments, table);
  }
  __syncthreads();
}

}  // namespace lutgemm::cuda
