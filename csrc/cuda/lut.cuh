// The kernel behind LUT-GEMM and BiQGEMM: signed sums of 8 activations, looked up by bytes of code.
//
//   y[m, n] = sum over planes b and slices j of scale[b, n, g] * sign * T[j, m][entry]
//           + sum over groups g of offset[n, g] * X[g, m]
//
// with T as in lut_tables.cuh, X[g, m] the sum of x over the group. A block builds tables of some inputs and tokens
// once and streams its rows through them; then come its next inputs:
//
//   for each table's worth of inputs:  loads of the first codes | x -> staged -> tables | for each tile of 16 rows:
//     ask for the next tile, to L2
//     for each plane:  a word of each of the lane's rows: look up, add    (the registers of a quad of rows are filled
//                      again with the next plane's codes as soon as they are used)
//     sums over the lanes of the warp -> results in shared memory
//   results -> y, or partial sums of this split of K
#pragma once

#include "cuda/device.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/lut.h"
#include "cuda/lut_tables.cuh"
#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"

namespace lutgemm::cuda {

// Strides and counts of LutProblem and LutPlan, as the kernel steps by them.
struct LutArguments {
  GpuIo io;
  const uint32_t* codes;
  const char* scales;
  const float* scale_unit;
  float* partial;       // [splits, M, N], or null when there is one split
  int64_t tile_codes;   // from a tile to the next: words
  int64_t tile_scales;  // bytes
  uint64_t group_inverse;
  int quad_scales;  // of a term, from a quad of rows to the next: bytes
  int terms, bits;
  bool offsets;
  int all_tiles, tiles_of_block, all_tables, tables_of_split;
};

constexpr int kUnitWords = kUnitInputs / kWordInputs;

// word / (words of a group) by a multiplication with inverse = 2^40 / divisor + 1. Exact for words and divisors up to
// 2^19, all that kMaxFeatures allows: inverse * divisor exceeds 2^40 by at most the divisor, and word * divisor < 2^40.
constexpr int kInverseBits = 40;
__device__ __forceinline__ int group_of_word(int word, uint64_t inverse) {
  return static_cast<int>(static_cast<unsigned>(word) * inverse >> kInverseBits);
}

// Scales of four rows.
struct NarrowScales {
  static constexpr int kBytes = 2;
  uint32_t pairs[2];
  __device__ __forceinline__ void load(const char* from) {
    const uint2 loaded = load_stream8(from);
    pairs[0] = loaded.x, pairs[1] = loaded.y;
  }
  __device__ __forceinline__ float operator[](int row) const {
    const uint32_t pair = pairs[row / 2];
    return __half2float(__ushort_as_half(static_cast<unsigned short>(row % 2 ? pair >> 16 : pair & 0xffffu)));
  }
};

struct WideScales {
  static constexpr int kBytes = 4;
  uint4 values;
  __device__ __forceinline__ void load(const char* from) { values = load_stream16(from); }
  __device__ __forceinline__ float operator[](int row) const {
    return __uint_as_float(row == 0 ? values.x : row == 1 ? values.y : row == 2 ? values.z : values.w);
  }
};

// x of a table's inputs and tokens -> shared fp32, 0 beyond K and M, and each word's sum and largest slice. Eight lanes
// have a word, four inputs each.
template <class Shape, class T>
__device__ __forceinline__ void stage_x(const GpuIo& io, int64_t first_input, int64_t first_token,
                                        StagedX<Shape>& staged) {
  const T* x = static_cast<const T*>(io.x);
  const bool aligned = io.x_stride % 4 == 0 || io.M == 1;
  float values[Shape::kPieces][4];
#pragma unroll
  for (int piece = 0; piece < Shape::kPieces; ++piece) {
    const int place = piece * kLutThreads + threadIdx.x;
    const int64_t m = first_token + place / (Shape::kInputs / 4), k = first_input + place % (Shape::kInputs / 4) * 4;
    T loaded[4] = {};
    if (m < io.M) {
      const T* from = x + m * io.x_stride + k;
      if (aligned && k + 4 <= io.K) {
        if constexpr (sizeof(T) == 4) {
          const uint4 bits = load16(from);
          __builtin_memcpy(loaded, &bits, sizeof bits);
        } else {
          const uint2 bits = load8(from);
          __builtin_memcpy(loaded, &bits, sizeof bits);
        }
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (k + i < io.K) loaded[i] = from[i];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) values[piece][i] = as_float(loaded[i]);
  }
#pragma unroll
  for (int piece = 0; piece < Shape::kPieces; ++piece) {
    const int place = piece * kLutThreads + threadIdx.x;
    const int token = place / (Shape::kInputs / 4), word = place % (Shape::kInputs / 4) / 8;
    const float (&v)[4] = values[piece];
    const uint4 bits{__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])};
    store16(staged.x + token * Shape::kTokenStride + word * kPaddedWord + threadIdx.x % 8 * 4, bits);
    const float sum = lane_sum<8>((v[0] + v[1]) + (v[2] + v[3]));
    const float size = lane_sum<2>((fabsf(v[0]) + fabsf(v[1])) + (fabsf(v[2]) + fabsf(v[3])));
    float largest = fmaxf(size, __shfl_xor_sync(kFullMask, size, 2));
    largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, 4));
    if (threadIdx.x % 8 == 0) {
      staged.sum[token * Shape::kWords + word] = sum;
      staged.largest[token * Shape::kWords + word] = fmaxf(largest, 1e-30f) + 0 * sum;  // NaN where an input is
    }
  }
}

template <class Shape>
__device__ __forceinline__ void stage_x(const GpuIo& io, int64_t first_input, int64_t first_token,
                                        StagedX<Shape>& staged) {
  switch (io.dtype) {
    case DType::kFloat16:
      return stage_x<Shape, __half>(io, first_input, first_token, staged);
    case DType::kBFloat16:
      return stage_x<Shape, __nv_bfloat16>(io, first_input, first_token, staged);
    default:
      return stage_x<Shape, float>(io, first_input, first_token, staged);
  }
}

// Asks for what a warp reads of a tile for a table: `codes` is what its lane 0 reads first, `scales` those of the unit.
template <class Shape>
__device__ __forceinline__ void prefetch_tile(const LutArguments& arguments, const uint32_t* codes, const char* scales,
                                              int first_plane) {
  constexpr int kQuadLines = Shape::kWords / 8, kPlaneLines = 4 * kQuadLines;  // of 128 bytes: 8 words of 4 rows
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll 1
  for (int line = first_plane * kPlaneLines + lane; line < arguments.bits * kPlaneLines; line += kWarpSize) {
    prefetch_l2(codes + line / kQuadLines * 128 + line % kQuadLines * 32);
  }
  const int unit_scales = arguments.terms * 4 * arguments.quad_scales;
#pragma unroll 1
  for (int byte = lane * 128; byte < unit_scales; byte += kWarpSize * 128) prefetch_l2(scales + byte);
}

// Grid (token block, row block, split): blocks that share codes are neighbours.
template <class Tables, class Scales, bool kUniform>
__device__ __forceinline__ void lut_block(const LutArguments& arguments) {
  using Shape = typename Tables::Shape;
  constexpr int kTokens = Shape::kTokens, kQuads = Shape::kQuads;
  constexpr bool kPrefetches = Scales::kBytes == 2;  // fp32 scales leave no registers for it
  const GpuIo& io = arguments.io;
  LUTGEMM_SHARED(StagedX<Shape>, staged, );
  unsigned char* tables = dynamic_shared();
  float* results = reinterpret_cast<float*>(tables + kTableBytes);  // [row][kResultStride]

  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int word = lane % Shape::kWords, row_lane = lane / Shape::kWords;
  const uint32_t lane_address = word * Shape::kEntryBytes;
  const int bits = arguments.bits, terms = arguments.terms;
  const int quad_scales = arguments.quad_scales, term_scales = 4 * quad_scales;

  const int64_t first_token = int64_t(blockIdx.x) * kTokens;
  const int first_tile = blockIdx.y * arguments.tiles_of_block;
  const int tiles = min(arguments.tiles_of_block, arguments.all_tiles - first_tile);
  const int first_table = blockIdx.z * arguments.tables_of_split;
  const int last_table = min(first_table + arguments.tables_of_split, arguments.all_tables);

  for (int table = first_table; table < last_table; ++table) {
    const int first_word = table * Shape::kWords, unit = first_word / kUnitWords;
    const uint32_t* tile_codes = arguments.codes + (first_tile + warp) * arguments.tile_codes +
                                 unit * bits * kPlaneWords + first_word % kUnitWords * 4;
    const char* tile_scales =
        arguments.scales + (first_tile + warp) * arguments.tile_scales + unit * terms * term_scales;
    const uint32_t* codes = tile_codes + row_lane * kQuads * 128 + word * 4;
    uint4 ahead[kQuads];
    if (warp < tiles) {
#pragma unroll
      for (int quad = 0; quad < kQuads; ++quad) ahead[quad] = load_stream16(codes + quad * 128);
    }
    const int last_word = static_cast<int>((io.K - 1) / kWordInputs);
    const int slot = group_of_word(min(first_word + word, last_word), arguments.group_inverse) -
                     group_of_word(unit * kUnitWords, arguments.group_inverse);
    const int lane_scales = row_lane * kQuads * quad_scales + slot * 4 * Scales::kBytes;
    const char* next_scales = tile_scales + lane_scales;
    Scales ahead_scales[kQuads];
    if (warp < tiles && !kUniform) {
#pragma unroll
      for (int quad = 0; quad < kQuads; ++quad) ahead_scales[quad].load(next_scales + quad * quad_scales);
    }
    if (warp < tiles) prefetch_tile<Shape>(arguments, tile_codes, tile_scales, 1);

    if (table == first_table) {
      grid_dependency_wait();
      launch_dependents();
    } else {
      __syncthreads();  // all warps are through with the last tables
    }
    stage_x<Shape>(io, int64_t(first_word) * kWordInputs, first_token, staged);
    __syncthreads();
    Tables::build(staged, tables);
    __syncthreads();

    for (int tile = warp; tile < tiles; tile += kLutWarps) {
      const bool last_tile = tile + kLutWarps >= tiles;
      Scales offsets[kQuads], steps[kQuads];  // the uniform kind: centers and s
#pragma unroll
      for (int quad = 0; quad < kQuads; ++quad) {
        const char* from = tile_scales + lane_scales + quad * quad_scales;
        if (arguments.offsets) offsets[quad].load(from + (terms - 1) * term_scales);
        if (kUniform) steps[quad].load(from);
      }
      tile_codes += kLutWarps * arguments.tile_codes, tile_scales += kLutWarps * arguments.tile_scales;
      if (kPrefetches && !last_tile) {
        prefetch_tile<Shape>(arguments, tile_codes, tile_scales, 0);
      }
      float sums[Shape::kSums] = {};
      for (int plane = 0; plane < bits; ++plane) {
        const bool last = plane == bits - 1, more = !last || !last_tile;
        codes += last ? kLutWarps * arguments.tile_codes - (bits - 1) * kPlaneWords : kPlaneWords;
        next_scales = last ? tile_scales + lane_scales : next_scales + term_scales;
        const float place =
            __int_as_float((127 + bits - 1 - plane) << 23);  // 2^(bits - 1 - plane), of the uniform kind
#pragma unroll
        for (int quad = 0; quad < kQuads; ++quad) {
          const uint4 code = ahead[quad];
          const Scales scale = ahead_scales[quad];
          float* quad_sums = sums + quad * 4 * kTokens;
          Tables::add_word(quad_sums, code.x, kUniform ? place : scale[0], tables, lane_address);
          Tables::add_word(quad_sums + kTokens, code.y, kUniform ? place : scale[1], tables, lane_address);
          Tables::add_word(quad_sums + 2 * kTokens, code.z, kUniform ? place : scale[2], tables, lane_address);
          Tables::add_word(quad_sums + 3 * kTokens, code.w, kUniform ? place : scale[3], tables, lane_address);
          if (more) {
            ahead[quad] = load_stream16(codes + quad * 128);
            if (!kUniform) ahead_scales[quad].load(next_scales + quad * quad_scales);
          }
        }
      }
#pragma unroll
      for (int token = 0; token < kTokens; ++token) {
        const float unit = Tables::unit(staged, token, word);
        const float x_sum = staged.sum[token * Shape::kWords + word];
#pragma unroll
        for (int row = 0; row < Shape::kRows; ++row) {
          float& sum = sums[row * kTokens + token];
          sum *= unit;
          if (arguments.offsets) sum = fmaf(offsets[row / 4][row % 4], x_sum, sum);
          if (kUniform) sum *= steps[row / 4][row % 4];
        }
      }
      spread_sums<Shape::kWords, Shape::kSums>(sums);
      constexpr int kKept = Shape::kWords < Shape::kSums ? Shape::kWords : Shape::kSums;
#pragma unroll
      for (int i = 0; i < Shape::kSums / kKept; ++i) {
        const int value = lane % kKept + i * kKept;
        const int row = tile * kTileRows + row_lane * Shape::kRows + value / kTokens;
        float* result = results + row * Shape::kResultStride + value % kTokens;
        if (word < kKept) *result = table == first_table ? sums[i] : *result + sums[i];
      }
    }
  }

  __syncthreads();
  const float unit = *arguments.scale_unit;
  const int64_t first_row = int64_t(first_tile) * kTileRows;
  const int rows = static_cast<int>(min(int64_t(tiles) * kTileRows, io.N - first_row));
  for (int token = 0; token < kTokens && first_token + token < io.M; ++token) {
    const int64_t m = first_token + token;
    for (int row = threadIdx.x; row < rows; row += kLutThreads) {
      const float sum = results[row * Shape::kResultStride + token] * unit;
      if (arguments.partial == nullptr) {
        store_result(io.y, io.bias, io.dtype, io.N, m, first_row + row, sum);
      } else {
        arguments.partial[(blockIdx.z * io.M + m) * io.N + first_row + row] = sum;
      }
    }
  }
}

}  // namespace lutgemm::cuda
