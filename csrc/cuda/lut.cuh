// The kernel behind LUT-GEMM and BiQGEMM: signed sums of 8 activations, looked up by bytes of code.
//
//   y[m, n] = sum over planes b and slices j of scale[b, n, g] * sign * T[j, m][entry] + sum over g of offset[n, g] * X[g, m]
//
//   T[j, m][e] = x[8j + 7] + sum over i < 7 of (e bit i ? +x[8j + i] : -x[8j + i])     128 entries: the rest by negation
//
// Tables in shared memory, an entry being the fp32 values of 1, 2 or 4 tokens (kEntryBytes 4, 8, 16):
//
//   byte address = (slice / 2) * 32768 + entry * 256 + (slice % 2) * 128 + word * kEntryBytes        slice 0..3 of a word
//
// Look-ups never conflict: 32 lanes read entries of 32, 16 or 8 words of input, word w always in the banks
// w * kEntryBytes / 4 .., and a phase of the access (128 bytes: 32, 16 or 8 lanes) has each word once. Lanes beyond the
// words take other rows. All tables take 64 KiB, whatever kEntryBytes.
//
//   lane = row lane * kWords + word          kEntryBytes 4: 32 words x 1 row      8: 16 words x 2 rows      16: 8 x 4
//
// Counted per word of code (4 look-ups, 32 bits), T tokens: 3 rotations, 4 addresses (and-or), 4 loads of T wavefronts,
// 4 signed scales (and-xor), 4 T fused multiply-adds: 15 + 4 T instructions, 4 T wavefronts. For T = 1 that is 0.59
// instructions a code bit; with 128 issue lanes a clock the bound is 215 bits a clock and multiprocessor, that of the
// 64 lanes that do the 11 integer operations 186, that of shared memory 256.
//
// A block builds a table once and streams its rows through it; then come its next inputs. A build costs 512 wavefronts,
// as much as the look-ups of 128 rows and planes. Sums over the lanes of a warp are taken once per tile of 16 rows.
#pragma once

#include "cuda/device.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/lut.h"
#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"

namespace lutgemm::cuda {

constexpr int kLutWarps = 8;                             // two for each (slice of a word), each half of the entries
constexpr int kLutThreads = kLutWarps * kWarpSize;
constexpr int kLutBlocks = 2;                            // a multiprocessor: 128 registers a thread, 2 x 81 KB shared
constexpr int kTableBytes = 64 * 1024;
// Steps (a plane of a tile) whose loads are under way. Two are 4 KB a warp, 64 KB a multiprocessor; with fp32 scales the
// registers are enough for one.
template <class Scale>
constexpr int kAhead = sizeof(Scale) == 2 ? 2 : 1;

struct LutArguments {
  LutProblem problem;
  LutPlan plan;
  float* partial;  // [splits, M, N], or null when there is one split
};

template <int kEntryBytes>
struct LutShape {
  static constexpr int kTokens = kEntryBytes / 4;
  static constexpr int kWords = 128 / kEntryBytes;
  static constexpr int kInputs = kWords * kWordInputs;
  static constexpr int kRowLanes = kWarpSize / kWords;
  static constexpr int kRows = kTileRows / kRowLanes;   // of a lane
  static constexpr int kQuads = kRows / 4;              // 16-byte loads of a lane and plane
  static constexpr int kSums = kRows * kTokens;         // of a lane: 16
  static constexpr int kPadded = kWordInputs + 4;       // floats of a word of x: keeps 16-byte loads free of conflicts
  static constexpr int kTokenStride = kWords * kPadded + (kTokens > 1 ? kWarpSize / kTokens : 0);
};

// A lane's rows of one step: codes of a plane, and a term of the scales.
template <class Scale, int kQuads>
struct LutStep {
  uint4 codes[kQuads];
  uint32_t scales[kQuads * sizeof(Scale)];
};

template <int kRows>
__device__ __forceinline__ float scale_of(const uint32_t (&scales)[kRows], int row, float) {
  return __uint_as_float(scales[row]);
}

template <int kHalves>
__device__ __forceinline__ float scale_of(const uint32_t (&scales)[kHalves], int row, __half) {
  const uint32_t pair = scales[row / 2];
  return __half2float(__ushort_as_half(static_cast<unsigned short>(row % 2 ? pair >> 16 : pair)));
}

// 16-byte loads where the size allows.
template <int kCount>
__device__ __forceinline__ void load_stream(uint32_t (&values)[kCount], const void* source) {
  const char* bytes = static_cast<const char*>(source);
  if constexpr (kCount % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      const uint4 loaded = load_stream16(bytes + 16 * i);
      values[4 * i] = loaded.x, values[4 * i + 1] = loaded.y, values[4 * i + 2] = loaded.z, values[4 * i + 3] = loaded.w;
    }
  } else {
    static_assert(kCount == 2);
    const uint2 loaded = load_stream8(bytes);
    values[0] = loaded.x, values[1] = loaded.y;
  }
}

// x of the table's inputs and tokens -> shared fp32 [token][word][kPadded]; 0 beyond K and M.
template <int kEntryBytes>
__device__ __forceinline__ void stage_x(const GpuIo& io, int64_t first_input, int64_t first_token, float* staged) {
  using Shape = LutShape<kEntryBytes>;
#pragma unroll
  for (int i = threadIdx.x; i < Shape::kTokens * Shape::kInputs; i += kLutThreads) {
    const int token = i / Shape::kInputs, input = i % Shape::kInputs;
    const int64_t m = first_token + token, k = first_input + input;
    const float value = m < io.M && k < io.K ? load_value(io.x, io.dtype, m * io.x_stride + k) : 0.0f;
    staged[token * Shape::kTokenStride + input / kWordInputs * Shape::kPadded + input % kWordInputs] = value;
  }
}

// Staged x -> tables. Warp: a slice and half of the entries. Lane: a bank, that is, a token of a word.
template <int kEntryBytes>
__device__ __forceinline__ void build_tables(const float* staged, unsigned char* tables) {
  using Shape = LutShape<kEntryBytes>;
  const int lane = threadIdx.x % kWarpSize, slice = threadIdx.x / kWarpSize / 2, half = threadIdx.x / kWarpSize % 2;
  const float* own = staged + lane % Shape::kTokens * Shape::kTokenStride + lane / Shape::kTokens * Shape::kPadded + slice * 8;
  float x[8];
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    const uint4 loaded = load16(own + i);
    x[i] = __uint_as_float(loaded.x), x[i + 1] = __uint_as_float(loaded.y);
    x[i + 2] = __uint_as_float(loaded.z), x[i + 3] = __uint_as_float(loaded.w);
  }
  float low[8], high[8];  // by bits 0..2, and 3..5 with what the warp has of bit 6
  const float upper = x[7] + (half ? x[6] : -x[6]);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    low[i] = (i & 1 ? x[0] : -x[0]) + (i & 2 ? x[1] : -x[1]) + (i & 4 ? x[2] : -x[2]);
    high[i] = upper + (i & 1 ? x[3] : -x[3]) + (i & 2 ? x[4] : -x[4]) + (i & 4 ? x[5] : -x[5]);
  }
  unsigned char* to = tables + slice / 2 * 32768 + slice % 2 * 128 + half * 64 * 256 + lane * 4;
#pragma unroll
  for (int entry = 0; entry < 64; ++entry) *reinterpret_cast<float*>(to + entry * 256) = high[entry / 8] + low[entry % 8];
}

template <int kTokens>
__device__ __forceinline__ void load_entry(float (&values)[kTokens], const unsigned char* entry) {
  if constexpr (kTokens == 1) {
    values[0] = *reinterpret_cast<const float*>(entry);
  } else if constexpr (kTokens == 2) {
    const uint2 loaded = load8(entry);
    values[0] = __uint_as_float(loaded.x), values[1] = __uint_as_float(loaded.y);
  } else {
    const uint4 loaded = load16(entry);
    values[0] = __uint_as_float(loaded.x), values[1] = __uint_as_float(loaded.y);
    values[2] = __uint_as_float(loaded.z), values[3] = __uint_as_float(loaded.w);
  }
}

// sums[t] += scale * (the word's signs) . (token t's 32 inputs). Rotations bring a byte's entry to bits 8..14, where it is
// an address, and its sign to bit 31; each of the four serves one byte for the former and another for the latter.
template <int kTokens>
__device__ __forceinline__ void add_word(float* sums, uint32_t word, float scale, const unsigned char* tables,
                                         uint32_t lane_address) {
  const uint32_t turned[4] = {word, __funnelshift_r(word, word, 8), __funnelshift_r(word, word, 16),
                              __funnelshift_r(word, word, 24)};
#pragma unroll
  for (int slice = 0; slice < 4; ++slice) {
    const uint32_t address = (turned[(slice + 3) % 4] & 0x7f00u) | lane_address;
    const float signed_scale = __uint_as_float((turned[(slice + 1) % 4] & 0x80000000u) ^ __float_as_uint(scale));
    float values[kTokens];
    load_entry(values, tables + address + slice / 2 * 32768 + slice % 2 * 128);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) sums[t] = fmaf(signed_scale, values[t], sums[t]);
  }
}

// Grid (row block * token blocks + token block, split).
template <int kEntryBytes, class Scale, bool kUniform>
__device__ __forceinline__ void lut_block(const LutArguments& arguments) {
  using Shape = LutShape<kEntryBytes>;
  constexpr int kTokens = Shape::kTokens;
  const LutProblem& problem = arguments.problem;
  const LutPlan& plan = arguments.plan;
  const GpuIo& io = problem.io;
  LUTGEMM_SHARED(float, staged, [kTokens * Shape::kTokenStride]);
  unsigned char* tables = dynamic_shared();
  float* results = reinterpret_cast<float*>(tables + kTableBytes);  // [token][row]

  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int word = lane % Shape::kWords, row_lane = lane / Shape::kWords;
  const uint32_t lane_address = word * kEntryBytes;

  const int64_t first_tile = blockIdx.x / plan.token_blocks * plan.tiles_per_block;
  const int64_t all_tiles = ceil_div(io.N, kTileRows);
  const int tiles = static_cast<int>(min(plan.tiles_per_block, all_tiles - first_tile));
  const int64_t first_token = blockIdx.x % plan.token_blocks * kTokens;
  const int64_t first_table = blockIdx.y * plan.tables_per_split;
  const int64_t last_table = min(first_table + plan.tables_per_split, ceil_div(io.K, Shape::kInputs));

  const int64_t units = ceil_div(io.K, kUnitInputs);
  const int terms = kUniform ? 2 : problem.bits + problem.offsets;
  const int steps = kUniform ? problem.bits + 1 : terms;
  const int64_t unit_scales = int64_t(terms) * problem.slots * kTileRows;
  const int rows_of_block = static_cast<int>(plan.tiles_per_block * kTileRows);

  for (int64_t table = first_table; table < last_table; ++table) {
    const int64_t first_input = table * Shape::kInputs;
    const int64_t unit = first_input / kUnitInputs;
    const int64_t input = min(first_input + word * kWordInputs, io.K - 1);
    const int slot = static_cast<int>(input / problem.group_size - unit * kUnitInputs / problem.group_size);
    const uint32_t* codes = problem.codes + (first_tile * units + unit) * problem.bits * kPlaneWords +
                            row_lane * Shape::kQuads * 128 + (first_input % kUnitInputs / kWordInputs + word) * 4;
    const Scale* scales = static_cast<const Scale*>(problem.scales) + (first_tile * units + unit) * unit_scales +
                          slot * kTileRows + row_lane * Shape::kRows;

    const auto fetch = [&](LutStep<Scale, Shape::kQuads>& step, int tile, int index) {
      if (tile >= tiles) return;
      if (index < problem.bits) {
        const uint32_t* from = codes + (tile * units * problem.bits + index) * kPlaneWords;
#pragma unroll
        for (int quad = 0; quad < Shape::kQuads; ++quad) step.codes[quad] = load_stream16(from + quad * 128);
      }
      if (!kUniform) load_stream(step.scales, scales + tile * units * unit_scales + index * problem.slots * kTileRows);
    };

    LutStep<Scale, Shape::kQuads> ahead[kAhead<Scale>];
    int next_tile = warp, next_index = 0;
    const auto fetch_next = [&](LutStep<Scale, Shape::kQuads>& step) {
      fetch(step, next_tile, next_index);
      if (++next_index == steps) next_index = 0, next_tile += kLutWarps;
    };
#pragma unroll
    for (int i = 0; i < kAhead<Scale>; ++i) fetch_next(ahead[i]);

    if (table == first_table) {
      grid_dependency_wait();
      launch_dependents();
    } else {
      __syncthreads();  // all warps are through with the last tables
    }
    stage_x<kEntryBytes>(io, first_input, first_token, staged);
    __syncthreads();
    build_tables<kEntryBytes>(staged, tables);
    __syncthreads();

    float x_sums[kTokens] = {};  // of the lane's word
#pragma unroll
    for (int slice = 0; slice < 4; ++slice) {
      float values[kTokens];
      load_entry(values, tables + slice / 2 * 32768 + slice % 2 * 128 + 127 * 256 + lane_address);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) x_sums[t] += values[t];
    }

    for (int tile = warp; tile < tiles; tile += kLutWarps) {
      float sums[Shape::kSums] = {};
      for (int index = 0; index < steps; ++index) {
        const LutStep<Scale, Shape::kQuads> step = ahead[0];
#pragma unroll
        for (int i = 1; i < kAhead<Scale>; ++i) ahead[i - 1] = ahead[i];
        fetch_next(ahead[kAhead<Scale> - 1]);
        if (index < problem.bits) {
          const float place = static_cast<float>(1 << (problem.bits - 1)) / static_cast<float>(1 << index);
#pragma unroll
          for (int row = 0; row < Shape::kRows; ++row) {
            const uint4 quad = step.codes[row / 4];
            const uint32_t code = row % 4 == 0 ? quad.x : row % 4 == 1 ? quad.y : row % 4 == 2 ? quad.z : quad.w;
            const float scale = kUniform ? place : scale_of(step.scales, row, Scale());
            add_word<kTokens>(sums + row * kTokens, code, scale, tables, lane_address);
          }
        } else if (!kUniform) {
#pragma unroll
          for (int i = 0; i < Shape::kSums; ++i) {
            sums[i] = fmaf(scale_of(step.scales, i / kTokens, Scale()), x_sums[i % kTokens], sums[i]);
          }
        } else {
          LutStep<Scale, Shape::kQuads> s, center;
          const Scale* from = scales + tile * units * unit_scales;
          load_stream(s.scales, from);
          load_stream(center.scales, from + problem.slots * kTileRows);
#pragma unroll
          for (int i = 0; i < Shape::kSums; ++i) {
            const int row = i / kTokens;
            sums[i] = fmaf(scale_of(center.scales, row, Scale()), x_sums[i % kTokens], sums[i]) *
                      scale_of(s.scales, row, Scale());
          }
        }
      }
      spread_sums<Shape::kWords, Shape::kSums>(sums);
      constexpr int kKept = Shape::kWords < Shape::kSums ? Shape::kWords : Shape::kSums;
#pragma unroll
      for (int i = 0; i < Shape::kSums / kKept; ++i) {
        const int value = lane % kKept + i * kKept;
        const int row = tile * kTileRows + row_lane * Shape::kRows + value / kTokens;
        float* result = results + value % kTokens * rows_of_block + row;
        if (word < kKept) *result = table == first_table ? sums[i] : *result + sums[i];
      }
    }
  }

  __syncthreads();
  const float unit = *problem.scale_unit;
  const int64_t first_row = first_tile * kTileRows;
  const int rows = static_cast<int>(min(int64_t(tiles) * kTileRows, io.N - first_row));
  for (int token = 0; token < kTokens && first_token + token < io.M; ++token) {
    const int64_t m = first_token + token;
    for (int row = threadIdx.x; row < rows; row += kLutThreads) {
      const float sum = results[token * rows_of_block + row] * unit;
      if (arguments.partial == nullptr) {
        store_result(io.y, io.bias, io.dtype, io.N, m, first_row + row, sum);
      } else {
        arguments.partial[(blockIdx.y * io.M + m) * io.N + first_row + row] = sum;
      }
    }
  }
}

}  // namespace lutgemm::cuda
