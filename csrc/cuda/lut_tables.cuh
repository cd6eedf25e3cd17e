// Tables of LUT-GEMM and BiQGEMM in shared memory: their layouts, how they are built and how a word of code is looked
// up.
//
//   T[j, m][e] = x[8j + 7] + sum over i < 7 of (e bit i ? +x[8j + i] : -x[8j + i])     slice j of 8 inputs, token m
//
// These 128 entries are all there is up to a sign, which is bit 7 of a code. Look-ups never conflict: a word of 32
// inputs has its entries in banks of its own, and a phase of an access (128 bytes: 32, 16 or 8 lanes of 4, 8 or 16
// bytes) has each word once. Lanes beyond the words take other rows:
//
//   lane = row lane * kWords + word          kEntryBytes 4: 32 words x 1 row      8: 16 words x 2 rows      16: 8 x 4
//
//   byte address = entry * 256 + word * kEntryBytes + (slice % 2) * 128 + (slice / 2) * 32768   slice 0..3 of a word
//
// All tables take 64 KiB, whatever kEntryBytes, and 512 wavefronts to write: as many as look up 128 rows and planes.
//
//   FloatTables<bytes>   fp32 values of 1, 2, 4 tokens
//   HalfTables<bytes>    fp16 values of 2, 4, 8 tokens, for results that need not be better than fp16
//   ShortTables          16-bit values of one token, in 1/32760 of its largest; 256 entries, so that a byte of code
//                        is an address as it is. Two slices share a bank: slice % 2 * 2 takes the place of slice % 2 *
//                        128, and slice / 2 * 128 that of slice / 2 * 32768.
//
// Instructions per word of code (4 look-ups, 32 bits) and T tokens; those of the whole loop over planes as nvcc 13.0
// compiles it for sm_90a, with the loads of codes and fp16 scales; and what a multiprocessor can do at most in a clock
// by that count (128 issue lanes), by integer operations (64 lanes), by shared memory (128 bytes). Counted, not timed:
//
//            rotate address load sign add to fp32 scale  total  loop    code bits a clock: issue, integers, memory
//   Short         -       4    4    -   2       1     1     12  15.5    264  341  256
//   Float T=1     3       4    4    4   4       -     -     19  22.4    183  186  256
//   Float T=2     3       4    4    4   8       -     -     23  27.5    149  186  128
//   Float T=4     3       4    4    4  16       -     -     31  37.8    108  186   64
//   Half  T=2     3       4    4    4   4       2     2     23  26.9    152  186  256
//   Half  T=4     3       4    4    4   8       4     4     31  36.1    113  186  128
//   Half  T=8     3       4    4    4  16       8     8     47  53.8     76  186   64
//
// To keep up with memory an H100 has to do about 100 a clock, an H200 about 144. Sums over lanes, offsets and results
// add some 250 instructions to a tile of 16 rows, a build some 400 to each warp: they are why rows are streamed in
// numbers.
#pragma once

#include "cuda/device.cuh"
#include "cuda/lut.h"
#include "cuda/ptx.cuh"

namespace lutgemm::cuda {

constexpr int kLutWarps = 8;  // a build's parts: two (or four) for each slice (or pair) of a word
constexpr int kLutThreads = kLutWarps * kWarpSize;
constexpr int kTableBytes = 64 * 1024;
constexpr int kAndOr = 0xea;  // lop3: a & b | c
// Floats of a word of staged x, and in LutShape of a token: a build's 16-byte loads then find free banks.
constexpr int kPaddedWord = kWordInputs + 4;

template <int kBytes, int kTokensOfEntry>
struct LutShape {
  static constexpr int kEntryBytes = kBytes;
  static constexpr int kTokens = kTokensOfEntry;
  static constexpr int kWords = 128 / kBytes;
  static constexpr int kInputs = kWords * kWordInputs;
  static constexpr int kRowLanes = kWarpSize / kWords;
  static constexpr int kRows = kTileRows / kRowLanes;  // of a lane
  static constexpr int kQuads = kRows / 4;             // 16-byte loads of a lane and plane
  static constexpr int kSums = kRows * kTokens;        // of a lane
  static constexpr int kResultStride = kTokens == 8 ? 10 : kTokens == 4 ? 5 : kTokens;  // of a row: few bank conflicts
  static constexpr int kPieces = kTokens * kInputs / (4 * kLutThreads);  // of 4 inputs, that a thread stages
  static constexpr int kTokenStride = kWords * kPaddedWord + (kTokens > 1 ? kWarpSize / kTokens : 0);
};

// x of a table's inputs as the build reads it, and sums over words.
template <class Shape>
struct StagedX {
  float x[Shape::kTokens * Shape::kTokenStride];  // [token][word][kPaddedWord]
  float sum[Shape::kTokens * Shape::kWords];      // of a word's x
  float largest[Shape::kTokens * Shape::kWords];  // of the sums of |x| of its slices, at least 1e-30
};

__device__ __forceinline__ void load_slice(float (&x)[8], const float* staged) {
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    const uint4 loaded = load16(staged + i);
    x[i] = __uint_as_float(loaded.x), x[i + 1] = __uint_as_float(loaded.y);
    x[i + 2] = __uint_as_float(loaded.z), x[i + 3] = __uint_as_float(loaded.w);
  }
}

// (i bit 0 ? a : -a) + (i bit 1 ? b : -b) + (i bit 2 ? c : -c)
__device__ __forceinline__ float signed_sum(int i, float a, float b, float c) {
  return (i & 1 ? a : -a) + (i & 2 ? b : -b) + (i & 4 ? c : -c);
}

// Rotations of a word by 0, 8, 16, 24 bits. One brings a byte's entry to bits 8..14, where it is an address; another
// its sign to bit 31.
struct TurnedWord {
  uint32_t by[4];
  __device__ __forceinline__ explicit TurnedWord(uint32_t word)
      : by{word, __funnelshift_r(word, word, 8), __funnelshift_r(word, word, 16), __funnelshift_r(word, word, 24)} {}
  // With the address of the lane's word. lop3: the compiler likes to take two instructions for this.
  __device__ __forceinline__ uint32_t address(int slice, uint32_t lane_address) const {
    return lop3<kAndOr>(by[(slice + 3) % 4], 0x7f00u, lane_address);
  }
  __device__ __forceinline__ uint32_t sign(int slice) const { return by[(slice + 1) % 4] & 0x80000000u; }
};

__device__ __forceinline__ constexpr int slice_offset(int slice) { return slice / 2 * 32768 + slice % 2 * 128; }

template <int kValues>
__device__ __forceinline__ void load_entry(uint32_t (&values)[kValues], const unsigned char* entry) {
  if constexpr (kValues == 1) {
    values[0] = *reinterpret_cast<const uint32_t*>(entry);
  } else if constexpr (kValues == 2) {
    const uint2 loaded = load8(entry);
    values[0] = loaded.x, values[1] = loaded.y;
  } else {
    const uint4 loaded = load16(entry);
    values[0] = loaded.x, values[1] = loaded.y, values[2] = loaded.z, values[3] = loaded.w;
  }
}

template <int kBytes>
struct FloatTables : LutShape<kBytes, kBytes / 4> {
  using Shape = LutShape<kBytes, kBytes / 4>;

  // Warp: a slice and half of the entries. Lane: a bank, that is, a token of a word.
  static __device__ __forceinline__ void build(const StagedX<Shape>& staged, unsigned char* tables) {
    const int lane = threadIdx.x % kWarpSize, slice = threadIdx.x / kWarpSize / 2, half = threadIdx.x / kWarpSize % 2;
    const int token = lane % Shape::kTokens, word = lane / Shape::kTokens;
    float x[8];
    load_slice(x, staged.x + token * Shape::kTokenStride + word * kPaddedWord + slice * 8);
    float low[8], high[8];  // by bits 0..2, and 3..5 with what the warp has of bit 6
    const float upper = x[7] + (half ? x[6] : -x[6]);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      low[i] = signed_sum(i, x[0], x[1], x[2]);
      high[i] = upper + signed_sum(i, x[3], x[4], x[5]);
    }
    unsigned char* to = tables + slice_offset(slice) + half * 64 * 256 + lane * 4;
#pragma unroll
    for (int i = 0; i < 64; ++i) *reinterpret_cast<float*>(to + i * 256) = high[i / 8] + low[i % 8];
  }

  static __device__ __forceinline__ float unit(const StagedX<Shape>&, int, int) { return 1.0f; }

  // sums[t] += scale * (the word's signs) . (token t's 32 inputs)
  static __device__ __forceinline__ void add_word(float* sums, uint32_t code, float scale, const unsigned char* tables,
                                                  uint32_t lane_address) {
    const TurnedWord turned(code);
#pragma unroll
    for (int slice = 0; slice < 4; ++slice) {
      uint32_t values[Shape::kTokens];
      load_entry(values, tables + turned.address(slice, lane_address) + slice_offset(slice));
      const float signed_scale = __uint_as_float(turned.sign(slice) ^ __float_as_uint(scale));
#pragma unroll
      for (int t = 0; t < Shape::kTokens; ++t) sums[t] = fmaf(signed_scale, __uint_as_float(values[t]), sums[t]);
    }
  }
};

template <int kBytes>
struct HalfTables : LutShape<kBytes, kBytes / 2> {
  using Shape = LutShape<kBytes, kBytes / 2>;
  static constexpr int kPairs = kBytes / 4;
  static constexpr int kLargestExponent = 12;  // a slice's sums stay below 2^13, those of a word below 2^15

  // A power of two.
  static __device__ __forceinline__ float unit(const StagedX<Shape>& staged, int token, int word) {
    const float largest = staged.largest[token * Shape::kWords + word];
    return __uint_as_float((__float_as_uint(largest) & 0x7f800000u) - (kLargestExponent << 23));
  }

  // Warp: a slice and half of the entries. Lane: a bank, that is, two tokens of a word.
  static __device__ __forceinline__ void build(const StagedX<Shape>& staged, unsigned char* tables) {
    const int lane = threadIdx.x % kWarpSize, slice = threadIdx.x / kWarpSize / 2, half = threadIdx.x / kWarpSize % 2;
    const int pair = lane % kPairs, word = lane / kPairs;
    float x[2][8];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = 2 * pair + i;
      load_slice(x[i], staged.x + token * Shape::kTokenStride + word * kPaddedWord + slice * 8);
      const float inverse = __uint_as_float(0x7f000000u - __float_as_uint(unit(staged, token, word)));
#pragma unroll
      for (int k = 0; k < 8; ++k) x[i][k] *= inverse;
    }
    __half2 low[8], high[8];
    const float upper[2] = {x[0][7] + (half ? x[0][6] : -x[0][6]), x[1][7] + (half ? x[1][6] : -x[1][6])};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      low[i] = __floats2half2_rn(signed_sum(i, x[0][0], x[0][1], x[0][2]), signed_sum(i, x[1][0], x[1][1], x[1][2]));
      high[i] = __floats2half2_rn(upper[0] + signed_sum(i, x[0][3], x[0][4], x[0][5]),
                                  upper[1] + signed_sum(i, x[1][3], x[1][4], x[1][5]));
    }
    unsigned char* to = tables + slice_offset(slice) + half * 64 * 256 + lane * 4;
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const __half2 entry = __hadd2(high[i / 8], low[i % 8]);
      *reinterpret_cast<uint32_t*>(to + i * 256) = *reinterpret_cast<const uint32_t*>(&entry);
    }
  }

  // As FloatTables; the sums are in each token's unit.
  static __device__ __forceinline__ void add_word(float* sums, uint32_t code, float scale, const unsigned char* tables,
                                                  uint32_t lane_address) {
    const TurnedWord turned(code);
    __half2 words[kPairs];
#pragma unroll
    for (int slice = 0; slice < 4; ++slice) {
      uint32_t values[kPairs];
      load_entry(values, tables + turned.address(slice, lane_address) + slice_offset(slice));
      const uint32_t one = lop3<kAndOr>(turned.by[(slice + 1) % 4], 0x80000000u, 0x3c000000u);  // +-1 in the upper half
      const __half2 sign = __high2half2(*reinterpret_cast<const __half2*>(&one));
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        const __half2 value = *reinterpret_cast<const __half2*>(&values[p]);
        words[p] = slice == 0 ? __hmul2(sign, value) : __hfma2(sign, value, words[p]);
      }
    }
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      sums[2 * p] = fmaf(scale, __low2float(words[p]), sums[2 * p]);
      sums[2 * p + 1] = fmaf(scale, __high2float(words[p]), sums[2 * p + 1]);
    }
  }
};

// A value v, in its word's unit, is stored as u = round(v - 1/2) + 2^15, without a sign. Then ~u is exactly what -v is
// stored as, and the four of a word want 4 * (1/2 - 2^15) added. A sum of two rounded parts, it is off by up to 1.
struct ShortTables : LutShape<4, 1> {
  using Shape = LutShape<4, 1>;
  static constexpr float kLargest = 32760;
  static constexpr int kAdded = 2 - 4 * 32768;

  static __device__ __forceinline__ float unit(const StagedX<Shape>& staged, int, int word) {
    return staged.largest[word] * (1 / kLargest);
  }

  // round(second) * 2^16 + round(first), modulo 2^32, for |values| < 2^22. Sums of such pairs do not mix while those of
  // the first values stay within 16 bits, unsigned.
  static __device__ __forceinline__ uint32_t rounded_pair(float first, float second) {
    constexpr float kMagic = 12582912;  // 1.5 * 2^23: added to a small number, leaves its rounding in the lowest bits
    constexpr uint32_t kMagicBits = 0x4b400000u;
    return __float_as_uint(second + kMagic) * 65536u + (__float_as_uint(first + kMagic) - kMagicBits);
  }

  // Warp: two slices and a quarter of the entries, with their complements. Lane: a word.
  static __device__ __forceinline__ void build(const StagedX<Shape>& staged, unsigned char* tables) {
    const int word = threadIdx.x % kWarpSize, pair = threadIdx.x / kWarpSize / 4, quarter = threadIdx.x / kWarpSize % 4;
    const float inverse = kLargest / staged.largest[word];
    float x[2][8];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      load_slice(x[i], staged.x + word * kPaddedWord + pair * 16 + i * 8);
#pragma unroll
      for (int k = 0; k < 8; ++k) x[i][k] *= inverse;
    }
    uint32_t low[8], high[4];  // by bits 0..2, and 3..4 with what the warp has of bits 5 and 6
    float upper[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      upper[i] = x[i][7] + (32768 - 0.5f) + (quarter & 1 ? x[i][5] : -x[i][5]) + (quarter & 2 ? x[i][6] : -x[i][6]);
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      low[k] = rounded_pair(signed_sum(k, x[0][0], x[0][1], x[0][2]), signed_sum(k, x[1][0], x[1][1], x[1][2]));
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      high[k] = rounded_pair(upper[0] + (k & 1 ? x[0][3] : -x[0][3]) + (k & 2 ? x[0][4] : -x[0][4]),
                             upper[1] + (k & 1 ? x[1][3] : -x[1][3]) + (k & 2 ? x[1][4] : -x[1][4]));
    }
    unsigned char* to = tables + pair * 128 + quarter * 32 * 256 + word * 4;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const uint32_t both = high[i / 8] + low[i % 8];
      *reinterpret_cast<uint32_t*>(to + i * 256) = both;
      *reinterpret_cast<uint32_t*>(to + (i + 128) * 256) = ~both;
    }
  }

  static __device__ __forceinline__ void add_word(float* sums, uint32_t code, float scale, const unsigned char* tables,
                                                  uint32_t lane_address) {
    int sum = kAdded;
#pragma unroll
    for (int slice = 0; slice < 4; ++slice) {
      const uint32_t address =
          prmt(code, lane_address, 0x6504 | slice << 4);  // byte 0 of lane_address, then the code's
      sum += *reinterpret_cast<const uint16_t*>(tables + address + slice / 2 * 128 + slice % 2 * 2);
    }
    sums[0] = fmaf(scale, static_cast<float>(sum), sums[0]);
  }
};

}  // namespace lutgemm::cuda
