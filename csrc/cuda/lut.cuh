// The kernel behind LUT-GEMM and BiQGEMM: signed sums of 8 activations, looked up by bytes of code.
//
//   y[m, n] = sum over planes b and slices j of scale[b, n, g] * sign * T[j, m][entry]
//           + sum over groups g of offset[n, g] * X[g, m]
//
// with T as in lut_tables.cuh, X[g, m] the sum of x over the group. A block builds tables of some inputs and tokens
// once and streams its rows through them, a strip of 16 or 8 by a warp at a time; then come its next inputs:
//
//   for each table's worth of inputs:  loads of the first codes | x -> staged -> tables | for each strip of rows:
//     ask for a later strip, to L2
//     for each plane:  a word of each of the lane's rows: look up, add    (the registers of a load are filled again
//                      with the next plane's codes as soon as they are used)
//     sums over the lanes of the warp -> results in shared memory
//   results -> y, or partial sums of this split of K
//
// Codes are read once for all tokens of a block: up to 16 of them take one pass over the weights.
#pragma once

#include "cuda/device.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/lut_load.cuh"
#include "cuda/lut_tables.cuh"
#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"

namespace lutgemm::cuda {

// x of a table's inputs and tokens -> shared fp32, 0 beyond K and M, and each word's sum, in its unit, and largest
// slice, or that of the token where units are of tokens. Eight lanes have a word, four inputs each.
template <class Tables, class T, class Shape = typename Tables::Shape>
__device__ __forceinline__ void stage_x(const GpuIo& io, int64_t first_input, int64_t first_token,
                                        StagedX<Shape>& staged) {
  const T* x = static_cast<const T*>(io.x);
  const bool aligned = io.x_stride % 4 == 0 || io.M == 1;
  constexpr int kPlaces = Shape::kTokens * Shape::kInputs / 4;  // whole warps'
  constexpr int kPieces = static_cast<int>(ceil_div(kPlaces, Shape::kThreads));
  float values[kPieces][4];
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    const int place = piece * Shape::kThreads + threadIdx.x;
    if (kPlaces % Shape::kThreads != 0 && place >= kPlaces) break;
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
  for (int piece = 0; piece < kPieces; ++piece) {
    const int place = piece * Shape::kThreads + threadIdx.x;
    if (kPlaces % Shape::kThreads != 0 && place >= kPlaces) break;
    const int token = place / (Shape::kInputs / 4), word = place % (Shape::kInputs / 4) / 8;
    const float (&v)[4] = values[piece];
    const uint4 bits{__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])};
    store16(staged.x + Shape::staged_place(token, word, threadIdx.x % 8), bits);
    const float sum = lane_sum<8>((v[0] + v[1]) + (v[2] + v[3]));
    const float size = lane_sum<2>((fabsf(v[0]) + fabsf(v[1])) + (fabsf(v[2]) + fabsf(v[3])));
    float largest = fmaxf(size, __shfl_xor_sync(kFullMask, size, 2));
    largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, 4));
    if constexpr (Tables::kUnits == Units::kOfToken) {  // else of the word
      static_assert(Shape::kWords * 8 == kWarpSize, "a warp has a token");
      largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, 8));
      largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, 16));
    }
    largest = fmaxf(largest, 1e-30f);
    if (threadIdx.x % 8 == 0) {
      staged.sum[token * Shape::kWords + word] = sum * Tables::inverse_unit(largest);
      staged.largest[token * Shape::kWords + word] = largest + 0 * sum;  // NaN where an input is
    }
  }
}

template <class Tables, class Shape = typename Tables::Shape>
__device__ __forceinline__ void stage_x(const GpuIo& io, int64_t first_input, int64_t first_token,
                                        StagedX<Shape>& staged) {
  switch (io.dtype) {
    case DType::kFloat16:
      return stage_x<Tables, __half>(io, first_input, first_token, staged);
    case DType::kBFloat16:
      return stage_x<Tables, __nv_bfloat16>(io, first_input, first_token, staged);
    default:
      return stage_x<Tables, float>(io, first_input, first_token, staged);
  }
}

// Grid (token block, row block, split): blocks that share codes are neighbours.
template <class Tables, template <int> class ScalesOf, bool kUniform>
__device__ __forceinline__ void lut_block(const LutArguments& arguments) {
  using Shape = typename Tables::Shape;
  using Codes = RowCodes<Shape::kLoadRows>;
  using Scales = ScalesOf<Shape::kLoadRows>;
  constexpr int kTokens = Shape::kTokens, kLoads = Shape::kLoads, kLoadRows = Shape::kLoadRows;
  constexpr int kTileStrips = kTileRows / Shape::kStripRows;
  const GpuIo& io = arguments.io;
  LUTGEMM_SHARED(StagedX<Shape>, staged, );
  unsigned char* tables = dynamic_shared();
  float* results = reinterpret_cast<float*>(tables + kLutTableBytes);  // [row][kResultStride]

  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int word = lane % Shape::kWords, row_lane = lane / Shape::kWords;
  const LaneWord<Shape> lane_word(word, row_lane);
  const int bits = arguments.bits, terms = arguments.terms;
  const int quad_scales = arguments.quad_scales, term_scales = 4 * quad_scales;
  const bool uniform = Scales::kAnyKind ? arguments.uniform : kUniform;
  const bool wide = Scales::kAnyKind ? arguments.wide_scales : Scales::kWide;

  const int64_t first_token = int64_t(blockIdx.x) * kTokens;
  const int first_strip = blockIdx.y * arguments.strips_of_block;
  const int strips = min(arguments.strips_of_block, arguments.all_strips - first_strip);
  const int first_table = blockIdx.z * arguments.tables_of_split;
  const int last_table = min(first_table + arguments.tables_of_split, arguments.all_tables);
  const float scale_unit = *arguments.scale_unit;
  // The rows that the lane begins with.
  const int tile = (first_strip + warp) / kTileStrips,
            strip_quad = (first_strip + warp) % kTileStrips * 4 / kTileStrips;
  const int lane_quad = strip_quad + row_lane * Shape::kRows / 4, first = row_lane * Shape::kRows % 4;

  for (int table = first_table; table < last_table; ++table) {
    const int first_word = table * Shape::kWords, unit = first_word / kUnitWords;
    const char* strip_codes =
        arguments.codes + int64_t(tile) * arguments.tile_codes +
        (unit * bits * kPlaneBytes + strip_quad * kQuadBytes + first_word % kUnitWords * kWordBytes);
    const char* unit_scales = arguments.scales + int64_t(tile) * arguments.tile_scales + unit * terms * term_scales;
    const char* codes = strip_codes + ((lane_quad - strip_quad) * kQuadBytes + word * kWordBytes + first * 4);
    Codes ahead[kLoads];
    if (warp < strips) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) ahead[i].load(codes + i * kQuadBytes);
    }
    const int last_word = static_cast<int>((io.K - 1) / kWordInputs);
    const int slot = group_of_word(min(first_word + word, last_word), arguments.group_inverse) -
                     group_of_word(unit * kUnitWords, arguments.group_inverse);
    const char* strip_scales = unit_scales + (lane_quad * quad_scales + slot * (wide ? 16 : 8));
    Scales ahead_scales[kLoads], offsets[kLoads];  // of the uniform kind the latter are its centers
    if (warp < strips) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const char* from = strip_scales + i * quad_scales;
        if (!uniform) ahead_scales[i].load(from, wide, first);
        if (arguments.offsets) offsets[i].load(from + arguments.offset_scales, wide, first);
      }
    }
    const char* next_scales = strip_scales;
    Prefetch<Shape> prefetch(arguments, strip_codes, unit_scales);
    if (warp < strips) prefetch(arguments, 1);
#pragma unroll 1
    for (int i = 1; i <= arguments.ahead && warp + i * Shape::kWarps < strips; ++i) {
      prefetch.step(arguments);
      if (i < arguments.ahead) prefetch(arguments, 0);
    }

    if (table == first_table) {
      grid_dependency_wait();
      launch_dependents();
    } else {
      __syncthreads();  // all warps are through with the last tables
    }
    stage_x<Tables>(io, int64_t(first_word) * kWordInputs, first_token, staged);
    __syncthreads();
    Tables::build(staged, tables);
    __syncthreads();

    // What the lane needs of each token, where registers allow: units of its sums, or of those that spread_sums leaves
    // it, and in these units the sum of its word, which offsets multiply.
    constexpr bool kOfToken = Tables::kUnits == Units::kOfToken;
    constexpr int kUnitsKept = kOfToken ? static_cast<int>(ceil_div(kTokens, Shape::kKept)) : kTokens;
    constexpr bool kKeepsSums = Shape::kSums + 2 * kTokens <= 48;
    float units[kUnitsKept], x_sums[kTokens];
#pragma unroll
    for (int i = 0; i < kUnitsKept; ++i) {
      const int token = kOfToken ? (lane % Shape::kKept + i * Shape::kKept) % kTokens : i;
      units[i] = Tables::unit(staged.largest[token * Shape::kWords + word]);
    }
    const auto x_sum = [&](int token) { return staged.sum[token * Shape::kWords + word]; };
    if (kKeepsSums) {
#pragma unroll
      for (int token = 0; token < kTokens; ++token) x_sums[token] = x_sum(token);
    }

    for (int strip = warp; strip < strips; strip += Shape::kWarps) {
      const bool last_strip = strip + Shape::kWarps >= strips;
      float sums[Shape::kSums];
#pragma unroll
      for (float& sum : sums) sum = 0;
      if (arguments.offsets) {
        float of_rows[Shape::kRows];
#pragma unroll
        for (int row = 0; row < Shape::kRows; ++row) {
          of_rows[row] = offsets[row / kLoadRows].of(row % kLoadRows, wide, first);
        }
#pragma unroll
        for (int token = 0; token < kTokens; ++token) {
          const float of_word = kKeepsSums ? x_sums[token] : x_sum(token);
#pragma unroll
          for (int row = 0; row < Shape::kRows; ++row) sums[row * kTokens + token] = of_rows[row] * of_word;
        }
      }
      Scales steps[kLoads];  // s of the uniform kind
      if (uniform) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) steps[i].load(strip_scales + i * quad_scales, wide, first);
      }
      strip_scales += arguments.step_scales;
      if (strip + arguments.ahead * Shape::kWarps < strips) {
        prefetch(arguments, 0);
        prefetch.step(arguments);
      }
      if (!last_strip && arguments.offsets) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          offsets[i].load(strip_scales + i * quad_scales + arguments.offset_scales, wide, first);
        }
      }
      for (int plane = 0; plane < bits; ++plane) {
        const bool last = plane == bits - 1, more = !last || !last_strip;
        codes += last ? arguments.last_plane_codes : kPlaneBytes;
        next_scales = last ? strip_scales : next_scales + term_scales;
        const float place =
            __int_as_float((127 + bits - 1 - plane) << 23);  // 2^(bits - 1 - plane), of the uniform kind
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          const Codes code = ahead[i];
          const Scales scale = ahead_scales[i];
#pragma unroll
          for (int row = 0; row < kLoadRows; ++row) {
            float* row_sums = sums + (i * kLoadRows + row) * kTokens;
            Tables::add_word(row_sums, code.row[row], uniform ? place : scale.of(row, wide, first), tables, lane_word);
          }
          if (more) {
            ahead[i].load(codes + i * kQuadBytes);
            if (!uniform) ahead_scales[i].load(next_scales + i * quad_scales, wide, first);
          }
        }
      }
      if (uniform) {
#pragma unroll
        for (int row = 0; row < Shape::kRows; ++row) {
          const float step = steps[row / kLoadRows].of(row % kLoadRows, wide, first);
#pragma unroll
          for (int token = 0; token < kTokens; ++token) sums[row * kTokens + token] *= step;
        }
      }
      if (Tables::kUnits == Units::kOfWord) {
#pragma unroll
        for (int i = 0; i < Shape::kSums; ++i) sums[i] *= units[i % kTokens];
      }
      spread_sums<Shape::kWords, Shape::kSums>(sums);
#pragma unroll
      for (int i = 0; i < Shape::kSums / Shape::kKept; ++i) {
        const int value = lane % Shape::kKept + i * Shape::kKept;
        const int row = strip * Shape::kStripRows + row_lane * Shape::kRows + value / kTokens;
        float* result = results + row * Shape::kResultStride + value % kTokens;
        const float sum = kOfToken ? sums[i] * units[i % kUnitsKept] : sums[i];
        if (word < Shape::kKept) *result = table == first_table ? sum : *result + sum;
      }
    }
  }

  __syncthreads();
  const int64_t first_row = int64_t(first_strip) * Shape::kStripRows;
  const int rows = static_cast<int>(min(int64_t(strips) * Shape::kStripRows, io.N - first_row));
  for (int token = 0; token < kTokens && first_token + token < io.M; ++token) {
    const int64_t m = first_token + token;
    for (int row = threadIdx.x; row < rows; row += Shape::kThreads) {
      const float sum = results[row * Shape::kResultStride + token] * scale_unit;
      if (arguments.partial == nullptr) {
        store_result(io.y, io.bias, io.dtype, io.N, m, first_row + row, sum);
      } else {
        arguments.partial[(blockIdx.z * io.M + m) * io.N + first_row + row] = sum;
      }
    }
  }
}

}  // namespace lutgemm::cuda
