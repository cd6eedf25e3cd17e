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
// Entries of 32 and 64 bytes are read in 2 and 4 parts of 16. A phase then has each word 2 or 4 times, and these lanes
// look slices up in other orders (i ^ row lane), so that 2 or 4 slices share the 128 bytes which one has above, and
// parts take the place of slices:
//
//   kEntryBytes 32: 4 words x 8 rows    entry * 256 + (word * 2 + slice % 2) * 16 + part * 128 + slice / 2 * 32768
//               64: 2 words x 16 rows   entry * 256 + (word * 4 + slice) * 16 + part % 2 * 128 + part / 2 * 32768
//
// All tables take 64 KiB, whatever kEntryBytes, and 512 wavefronts to write: as many as look up 128 rows and planes.
//
//   FloatTables<bytes>   fp32 values of 1, 2, 4, 8, 16 tokens
//   HalfTables<bytes>    fp16 values of 2, 4, 8, 16 tokens, for results that need not be better than fp16
//   ShortTables          16-bit values of one token, in 1/32760 of its largest; 256 entries, so that a byte of code
//                        is an address as it is. Two slices share a bank: slice % 2 * 2 takes the place of slice % 2 *
//                        128, and slice / 2 * 128 that of slice / 2 * 32768.
//
// Instructions per word of code (4 look-ups, 32 bits) and T tokens; those of the whole loop over planes as nvcc 13.0
// compiles it for sm_90a, with the loads of codes and fp16 scales; and what a multiprocessor can do at most in a clock
// by that count (128 issue lanes), by integer operations (64 lanes), by shared memory (128 bytes). Counted, not timed:
//
//            rotate address load sign add to fp32 scale  total  loop    code bits a clock: issue, integers, memory
//   Short         -       4    4    -   2       1     1     12  16.0    256  341  256
//   Float T=1     3       4    4    4   4       -     -     19  23.0    178  186  256
//   Float T=2     3       4    4    4   8       -     -     23  28.8    142  186  128
//   Float T=4     3       4    4    4  16       -     -     31  36.3    113  186   64
//   Float T=8     4       4    8    4  32       -     -     52  71.5     57  171   32
//   Float T=16    4       4   16    4  64       -     -     92   126     33  171   16
//   Half  T=2     3       4    4    4   4       2     2     23  27.1    151  186  256
//   Half  T=4     3       4    4    4   8       4     4     31  36.5    112  186  128
//   Half  T=8     3       4    4    4  16       8     8     47  52.8     78  186   64
//   Half  T=16    4       4    8    4  32      16    16     84   106     39  171   32
//
// To keep up with memory an H100 has to do about 100 a clock, an H200 about 144. Sums over lanes, offsets and results
// add 145 instructions to a strip of 8 rows of one token, some 300 to one of 16 rows and 8 tokens; a build takes 16
// warps 110 to 160 each, 8 warps 190 to 280: they are why rows are streamed in numbers.
//
// Why 16 tokens share one table of half the words: the bytes that look-ups read are the same in any form, 32 (fp16) or
// 64 bytes a byte of code, and so are those of tables for a row, so only instructions, registers and occupancy differ.
// Two tables of 8 tokens side by side take 128 KB: one block a multiprocessor, whose warps all wait while it builds,
// none where it has 100 KB, and 64 sums a lane. A second visit to the codes, out of registers or shared memory, repeats
// rotations and addresses (94 instructions a word instead of 84). One table keeps 32 sums, 8 or 4 bytes of codes a lane
// and load (a warp reads whole sectors still), and two blocks a multiprocessor, one looking up while one builds.
#pragma once

#include "cuda/device.cuh"
#include "cuda/lut.h"
#include "cuda/ptx.cuh"

namespace lutgemm::cuda {

constexpr int kGroupBytes = 32 * 1024;  // from tables of slices 0, 1 to those of 2, 3
constexpr int kAndOr = 0xea;            // lop3: a & b | c

// In what the sums of a lane are: x's own unit, that of its word, or that of the token.
enum class Units { kNone, kOfWord, kOfToken };

// kBytes: of an entry. A block has kWarpsOfBlock warps, each of which takes kRowsOfStrip rows at a time.
template <int kBytes, int kTokensOfEntry, int kWarpsOfBlock, int kRowsOfStrip>
struct LutShape {
  static constexpr int kEntryBytes = kBytes;
  static constexpr int kTokens = kTokensOfEntry;
  static constexpr int kWarps = kWarpsOfBlock;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kStripRows = kRowsOfStrip;
  static constexpr int kParts = kBytes > 16 ? kBytes / 16 : 1;  // loads of an entry
  static constexpr int kPartBytes = kBytes / kParts;
  static constexpr int kWords = 128 / kBytes;
  static constexpr int kInputs = kWords * kWordInputs;
  static constexpr int kRowLanes = kWarpSize / kWords;
  static constexpr int kRows = kStripRows / kRowLanes;           // of a lane
  static constexpr int kLoadRows = kRows < 4 ? kRows : 4;        // of a load of codes
  static constexpr int kLoads = kRows / kLoadRows;               // of a lane and plane
  static constexpr int kSums = kRows * kTokens;                  // of a lane
  static constexpr int kKept = kWords < kSums ? kWords : kSums;  // lanes among which spread_sums leaves them
  // Of a row: few bank conflicts.
  static constexpr int kResultStride = kTokens > 4 ? kTokens + 2 : kTokens == 4 ? 5 : kTokens;
  // In a build a lane has the tokens of a bank, lanes next to each other those of a part, then slices or words.
  static constexpr int kLaneTokens = kPartBytes / 4;
  static constexpr int kBankTokens = kTokens / kParts / kLaneTokens;

  // Floats of staged x before the `piece`-th four inputs of a word. A build's 16-byte loads, of 8 lanes at a time that
  // differ in token and word, or in token and slice, find free banks.
  static __device__ __forceinline__ int staged_place(int token, int word, int piece) {
    const int lane_token = token / kBankTokens % kLaneTokens;
    const int turned = kParts == 1 ? word * kLaneTokens + lane_token : lane_token % 2 + lane_token / 2 * 4;
    return (token * kWords + word) * kWordInputs + (piece ^ turned % 8) * 4;
  }
};

// x of a table's inputs as the build reads it, and sums over words.
template <class Shape>
struct StagedX {
  float x[Shape::kTokens * Shape::kInputs];       // by staged_place
  float sum[Shape::kTokens * Shape::kWords];      // of a word's x, in its unit
  float largest[Shape::kTokens * Shape::kWords];  // of the sums of |x| of its slices, at least 1e-30, or of all words

  __device__ __forceinline__ void load_slice(float (&values)[8], int token, int word, int slice) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 loaded = load16(x + Shape::staged_place(token, word, 2 * slice + i));
      values[4 * i] = __uint_as_float(loaded.x), values[4 * i + 1] = __uint_as_float(loaded.y);
      values[4 * i + 2] = __uint_as_float(loaded.z), values[4 * i + 3] = __uint_as_float(loaded.w);
    }
  }
};

// Where a lane finds the entries of its word. Lanes of a phase with the same word look slices up in orders of their
// own, i ^ turn, for which the bytes of their codes change places.
template <class Shape>
struct LaneWord {
  uint32_t address[Shape::kParts];  // of the i-th, i + kParts-th, ... slice
  uint32_t order;                   // of bytes, for prmt

  __device__ __forceinline__ LaneWord(int word, int row_lane) {
    const int turn = row_lane % Shape::kParts;
#pragma unroll
    for (int i = 0; i < Shape::kParts; ++i) {
      address[i] = word * Shape::kEntryBytes + (i ^ turn) * Shape::kPartBytes;
    }
    order = 0x3210u ^ turn * 0x1111u;
  }
};

// (i bit 0 ? a : -a) + (i bit 1 ? b : -b) + (i bit 2 ? c : -c). That of 7 - i is its negative, to the last bit.
__device__ __forceinline__ float signed_sum(int i, float a, float b, float c) {
  return (i & 1 ? a : -a) + (i & 2 ? b : -b) + (i & 4 ? c : -c);
}

// Rotations of a word by 0, 8, 16, 24 bits. One brings a byte's entry to bits 8..14, where it is an address; another
// its sign to bit 31.
template <class Shape>
struct TurnedWord {
  uint32_t by[4];
  __device__ __forceinline__ TurnedWord(uint32_t word, const LaneWord<Shape>& lane) {
    if (Shape::kParts > 1) word = prmt(word, 0, lane.order);
    by[0] = word;
#pragma unroll
    for (int i = 1; i < 4; ++i) by[i] = __funnelshift_r(word, word, 8 * i);
  }
  // Of the slice's first part. lop3: the compiler likes to take two instructions for this.
  __device__ __forceinline__ uint32_t address(int slice, const LaneWord<Shape>& lane) const {
    return lop3<kAndOr>(by[(slice + 3) % 4], 0x7f00u, lane.address[slice % Shape::kParts]);
  }
  __device__ __forceinline__ uint32_t sign(int slice) const { return by[(slice + 1) % 4] & 0x80000000u; }
};

// Of 128 bytes of the entries: group 0..3 is a slice, or with several parts a part of 2 or 4 slices.
__device__ __forceinline__ constexpr int group_offset(int group) { return group / 2 * kGroupBytes + group % 2 * 128; }

template <class Shape>
__device__ __forceinline__ constexpr int part_offset(int slice, int part) {
  return group_offset(slice / Shape::kParts * Shape::kParts + part);
}

// What a thread builds: the entries of its share of a group, in the bank of its lane.
template <class Shape>
struct BuildPlace {
  static constexpr int kShares = Shape::kWarps / 4;  // of a group: 2 or 4
  static constexpr int kEntries = 128 / kShares, kHigh = kEntries / 8;
  int group, share, slice, word, bank;  // bank: the first token is bank * kBankTokens

  __device__ __forceinline__ BuildPlace() {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, column = lane / Shape::kLaneTokens;
    group = warp / kShares, share = warp % kShares;
    slice = group / Shape::kParts * Shape::kParts + column % Shape::kParts;
    word = column / Shape::kParts;
    bank = group % Shape::kParts * Shape::kLaneTokens + lane % Shape::kLaneTokens;
  }

  // The sum of inputs 3.. of a slice for entries 8i..8i+7 of the share: by bits 3.., with what the share has of the
  // last ones.
  __device__ __forceinline__ float high(int i, const float (&x)[8]) const {
    if constexpr (kShares == 2) return x[7] + (share ? x[6] : -x[6]) + signed_sum(i, x[3], x[4], x[5]);
    const float upper = x[7] + (share & 1 ? x[5] : -x[5]) + (share & 2 ? x[6] : -x[6]);
    return upper + (i & 1 ? x[3] : -x[3]) + (i & 2 ? x[4] : -x[4]);
  }

  __device__ __forceinline__ uint32_t* entries(unsigned char* tables) const {
    return reinterpret_cast<uint32_t*>(tables + group_offset(group) + share * kEntries * 256 +
                                       threadIdx.x % kWarpSize * 4);
  }
};

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

template <int kBytes, int kWarps = 8, int kStripRows = 16>
struct FloatTables : LutShape<kBytes, kBytes / 4, kWarps, kStripRows> {
  using Shape = LutShape<kBytes, kBytes / 4, kWarps, kStripRows>;
  static constexpr Units kUnits = Units::kNone;

  static __device__ __forceinline__ float unit(float) { return 1; }
  static __device__ __forceinline__ float inverse_unit(float) { return 1; }

  static __device__ __forceinline__ void build(const StagedX<Shape>& staged, unsigned char* tables) {
    const BuildPlace<Shape> place;
    float x[8], low[4];
    staged.load_slice(x, place.bank, place.word, place.slice);
#pragma unroll
    for (int i = 0; i < 4; ++i) low[i] = signed_sum(i, x[0], x[1], x[2]);
    uint32_t* to = place.entries(tables);
#pragma unroll
    for (int h = 0; h < place.kHigh; ++h) {
      const float high = place.high(h, x);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        to[(8 * h + i) * 64] = __float_as_uint(i < 4 ? high + low[i] : high - low[7 - i]);
      }
    }
  }

  // sums[t] += scale * (the word's signs) . (token t's 32 inputs)
  static __device__ __forceinline__ void add_word(float* sums, uint32_t code, float scale, const unsigned char* tables,
                                                  const LaneWord<Shape>& lane) {
    const TurnedWord<Shape> turned(code, lane);
#pragma unroll
    for (int slice = 0; slice < 4; ++slice) {
      const uint32_t address = turned.address(slice, lane);
      const float signed_scale = __uint_as_float(turned.sign(slice) ^ __float_as_uint(scale));
#pragma unroll
      for (int part = 0; part < Shape::kParts; ++part) {
        uint32_t values[Shape::kLaneTokens];
        load_entry(values, tables + address + part_offset<Shape>(slice, part));
#pragma unroll
        for (int t = 0; t < Shape::kLaneTokens; ++t) {
          float& sum = sums[part * Shape::kLaneTokens + t];
          sum = fmaf(signed_scale, __uint_as_float(values[t]), sum);
        }
      }
    }
  }
};

template <int kBytes, int kWarps = 8, int kStripRows = 16>
struct HalfTables : LutShape<kBytes, kBytes / 2, kWarps, kStripRows> {
  using Shape = LutShape<kBytes, kBytes / 2, kWarps, kStripRows>;
  static constexpr int kPairs = kBytes / 4;
  static constexpr int kLargestExponent = 12;  // a slice's sums stay below 2^13, those of a word below 2^15
  // fp16 has a range for 4 words of a token too.
  static constexpr Units kUnits = Shape::kWords == 4 ? Units::kOfToken : Units::kOfWord;

  // A power of two.
  static __device__ __forceinline__ float unit(float largest) {
    return __uint_as_float((__float_as_uint(largest) & 0x7f800000u) - (kLargestExponent << 23));
  }
  static __device__ __forceinline__ float inverse_unit(float largest) {
    return __uint_as_float(0x7f000000u - __float_as_uint(unit(largest)));
  }

  static __device__ __forceinline__ void build(const StagedX<Shape>& staged, unsigned char* tables) {
    const BuildPlace<Shape> place;
    float x[2][8];
    __half2 low[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = 2 * place.bank + i;
      staged.load_slice(x[i], token, place.word, place.slice);
      const float inverse = inverse_unit(staged.largest[token * Shape::kWords + place.word]);
#pragma unroll
      for (int k = 0; k < 8; ++k) x[i][k] *= inverse;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      low[i] = __floats2half2_rn(signed_sum(i, x[0][0], x[0][1], x[0][2]), signed_sum(i, x[1][0], x[1][1], x[1][2]));
    }
    uint32_t* to = place.entries(tables);
#pragma unroll
    for (int h = 0; h < place.kHigh; ++h) {
      const __half2 high = __floats2half2_rn(place.high(h, x[0]), place.high(h, x[1]));
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const __half2 entry = i < 4 ? __hadd2(high, low[i]) : __hadd2(high, __hneg2(low[7 - i]));
        to[(8 * h + i) * 64] = *reinterpret_cast<const uint32_t*>(&entry);
      }
    }
  }

  // As FloatTables; the sums are in the units.
  static __device__ __forceinline__ void add_word(float* sums, uint32_t code, float scale, const unsigned char* tables,
                                                  const LaneWord<Shape>& lane) {
    const TurnedWord<Shape> turned(code, lane);
    __half2 words[kPairs];
#pragma unroll
    for (int slice = 0; slice < 4; ++slice) {
      const uint32_t address = turned.address(slice, lane);
      const uint32_t one = lop3<kAndOr>(turned.by[(slice + 1) % 4], 0x80000000u, 0x3c000000u);  // +-1 in the upper half
      const __half2 sign = __high2half2(*reinterpret_cast<const __half2*>(&one));
#pragma unroll
      for (int part = 0; part < Shape::kParts; ++part) {
        uint32_t values[Shape::kLaneTokens];
        load_entry(values, tables + address + part_offset<Shape>(slice, part));
#pragma unroll
        for (int p = 0; p < Shape::kLaneTokens; ++p) {
          const __half2 value = *reinterpret_cast<const __half2*>(&values[p]);
          __half2& sum = words[part * Shape::kLaneTokens + p];
          sum = slice == 0 ? __hmul2(sign, value) : __hfma2(sign, value, sum);
        }
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
template <int kWarps, int kStripRows>
struct ShortTables : LutShape<4, 1, kWarps, kStripRows> {
  using Shape = LutShape<4, 1, kWarps, kStripRows>;
  static constexpr Units kUnits = Units::kOfWord;
  static constexpr float kLargest = 32760;
  static constexpr int kAdded = 2 - 4 * 32768;

  static __device__ __forceinline__ float unit(float largest) { return largest * (1 / kLargest); }
  static __device__ __forceinline__ float inverse_unit(float largest) { return kLargest / largest; }

  // round(second) * 2^16 + round(first), modulo 2^32, for |values| < 2^22. Sums of such pairs do not mix while those of
  // the first values stay within 16 bits, unsigned.
  static __device__ __forceinline__ uint32_t rounded_pair(float first, float second) {
    constexpr float kMagic = 12582912;  // 1.5 * 2^23: added to a small number, leaves its rounding in the lowest bits
    constexpr uint32_t kMagicBits = 0x4b400000u;
    return __float_as_uint(second + kMagic) * 65536u + (__float_as_uint(first + kMagic) - kMagicBits);
  }

  // Warp: two slices and a share of the entries, with their complements. Lane: a word.
  static __device__ __forceinline__ void build(const StagedX<Shape>& staged, unsigned char* tables) {
    constexpr int kShares = kWarps / 2, kEntries = 128 / kShares, kHigh = kEntries / 8;
    const int word = threadIdx.x % kWarpSize, pair = threadIdx.x / kWarpSize / kShares;
    const int share = threadIdx.x / kWarpSize % kShares;
    const float inverse = inverse_unit(staged.largest[word]);
    float x[2][8], upper[2];  // the latter with what the share has of the last inputs
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      staged.load_slice(x[i], 0, word, 2 * pair + i);
#pragma unroll
      for (int k = 0; k < 8; ++k) x[i][k] *= inverse;
      upper[i] = x[i][7] + (32768 - 0.5f);
#pragma unroll
      for (int bit = 1; bit < kShares; bit *= 2) {
        const float input = x[i][bit * kHigh == 2 ? 4 : bit * kHigh == 4 ? 5 : 6];
        upper[i] += share & bit ? input : -input;
      }
    }
    uint32_t high[kHigh];
#pragma unroll
    for (int h = 0; h < kHigh; ++h) {
      float sums[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        sums[i] = upper[i] + (h & 1 ? x[i][3] : -x[i][3]);
        if (kHigh == 4) sums[i] += h & 2 ? x[i][4] : -x[i][4];
      }
      high[h] = rounded_pair(sums[0], sums[1]);
    }
    uint32_t* to = reinterpret_cast<uint32_t*>(tables + pair * 128 + share * kEntries * 256 + word * 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t low =
          rounded_pair(signed_sum(i, x[0][0], x[0][1], x[0][2]), signed_sum(i, x[1][0], x[1][1], x[1][2]));
#pragma unroll
      for (int entry = 0; entry < kEntries; ++entry) {
        if (entry % 8 != i && entry % 8 != 7 - i) continue;
        const uint32_t both = entry % 8 == i ? high[entry / 8] + low : high[entry / 8] - low;
        to[entry * 64] = both;
        to[(entry + 128) * 64] = ~both;
      }
    }
  }

  static __device__ __forceinline__ void add_word(float* sums, uint32_t code, float scale, const unsigned char* tables,
                                                  const LaneWord<Shape>& lane) {
    int sum = kAdded;
#pragma unroll
    for (int slice = 0; slice < 4; ++slice) {
      const uint32_t address =
          prmt(code, lane.address[0], 0x6504 | slice << 4);  // byte 0 of the word's address, then the code's
      sum += *reinterpret_cast<const uint16_t*>(tables + address + slice / 2 * 128 + slice % 2 * 2);
    }
    sums[0] = fmaf(scale, static_cast<float>(sum), sums[0]);
  }
};

}  // namespace lutgemm::cuda
