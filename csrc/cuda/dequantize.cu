// Dense rows of W from the stored tensors, bound by the writing of W.
//
//   BCQ        W[n, k] = offsets[n, g] + sum over b of scales[b, n, g] * sign(b, n, k)
//     uniform  W[n, k] = s[n, g] * ((c - zeros[n, g]) + sum over b of 2^(bits-2-b) * sign(b, n, k)), c = (2^bits - 1) /
//     2
//   codebook   W[n, k] = scales[n, g] * sum over c of codebooks[c, codes[c, n, k / v], k % v]
//
// in fp32, each operation rounded in the order of SPEC.md, so that the bits are those of every other backend.
//
// BCQ: a warp makes 1024 weights of a row. Four lanes share a 16-byte load of each plane (128 weights) and make one
// byte (8 weights) of each of its 4 words: the 4 stores of a lane, 16 bytes of 16-bit weights each, fill whole sectors.
//
//   lane 4q + t:   uint4 codes[b][32 * segment + 4q .. +3]   ->   byte t of word 0, of word 1, of word 2, of word 3
//
// Codebook: a thread makes 8 weights; all codebooks lie in shared memory where they fit.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cuda/dequantize.h"
#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace lutgemm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kRun = 8;                // weights of a store: 16 bytes of a 16-bit type
constexpr int kWarpWeights = 1024;     // 32 words of a row, 4 to each group of 4 lanes
constexpr int kBlocksPerSm = 8;        // of the codebook kernel: 2048 threads, so that tables are loaded once a block
constexpr int kTableLimit = 24 << 10;  // bytes of codebooks in shared memory: 8 such blocks in the 228 KB of sm_90

__device__ inline float load_float(const void* data, int64_t index, DType dtype) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[index];
  if (dtype == DType::kFloat16) return __half2float(static_cast<const __half*>(data)[index]);
  if (dtype == DType::kBFloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[index]);
  return float(static_cast<const uint8_t*>(data)[index]);
}

__device__ inline void convert(float value, float& out) { out = value; }
__device__ inline void convert(float value, __half& out) { out = __float2half_rn(value); }
__device__ inline void convert(float value, __nv_bfloat16& out) { out = __float2bfloat16_rn(value); }

// kRun weights to out[0 ..], the first `count` of them; `whole`: out is aligned to 16 bytes.
template <class Out>
__device__ inline void store_run(const float (&values)[kRun], Out* out, int count, bool whole) {
  Out converted[kRun];
#pragma unroll
  for (int i = 0; i < kRun; ++i) convert(values[i], converted[i]);
  if (whole && count >= kRun) {
    constexpr int kStores = int(sizeof(converted) / sizeof(uint4));
    uint4 packed[kStores];
    memcpy(packed, converted, sizeof(converted));
#pragma unroll
    for (int i = 0; i < kStores; ++i) store16(reinterpret_cast<uint4*>(out) + i, packed[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (i < count) out[i] = converted[i];
    }
  }
}

// Words w .. w + 3 of a row of codes; those past its end as zeros.
__device__ inline void load_words(const uint32_t* row, int64_t w, int64_t words, bool whole, uint32_t (&out)[4]) {
  if (whole) {
    const uint4 four = load_stream16(row + w);
    out[0] = four.x, out[1] = four.y, out[2] = four.z, out[3] = four.w;
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) out[j] = w + j < words ? row[w + j] : 0;
  }
}

// Scale of each plane, first term and factor of a group: W = factor * (first + sum over b of scale[b] * sign).
struct Group {
  float scale[8];
  float first, factor;
};

__device__ inline void load_group(const BcqWeight& w, int64_t row, int64_t g, Group& group) {
  group.first = 0.0f;
  group.factor = 1.0f;
  const int64_t at = row * w.G + g, plane = w.N * w.G;
  if (w.uniform) {
    group.factor = load_float(w.scales, at, w.scale_dtype);
    group.first = 0.5f * float((1 << w.bits) - 1) - load_float(w.zeros, at, w.zeros_dtype);
  } else if (w.offsets != nullptr) {
    group.first = load_float(w.offsets, at, w.scale_dtype);
  }
#pragma unroll
  for (int b = 0; b < 8; ++b) {
    if (b < w.bits) {
      group.scale[b] =
          w.uniform ? 0.25f * float(1 << (w.bits - b)) : load_float(w.scales, b * plane + at, w.scale_dtype);
    }
  }
}

template <class Out>
__global__ void __launch_bounds__(kThreads)
    dequantize_bcq_kernel(BcqWeight w, int64_t row_begin, int64_t rows, Out* out) {
  const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize;
  const int64_t r = int64_t(blockIdx.x) * kWarps + warp, row = row_begin + r;
  const int64_t first_word = int64_t(blockIdx.y) * (kWarpWeights / 32) + 4 * (lane / 4);
  if (r >= rows || first_word >= w.words) return;

  uint32_t codes[8][4];
#pragma unroll
  for (int b = 0; b < 8; ++b) {
    if (b < w.bits) load_words(w.codes + (b * w.N + row) * w.words, first_word, w.words, w.words % 4 == 0, codes[b]);
  }
  const bool whole = w.K * int64_t(sizeof(Out)) % 16 == 0;
  const int shift = 8 * (lane % 4);
  const uint32_t K = uint32_t(w.K), group_size = uint32_t(w.group_size);
  Group group;
  uint32_t loaded = ~0u;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint32_t k = uint32_t(first_word + j) * 32 + shift;
    if (k >= K) break;
    const uint32_t g = k / group_size;
    if (g != loaded) load_group(w, row, g, group);
    loaded = g;
    float values[kRun];
#pragma unroll
    for (int i = 0; i < kRun; ++i) values[i] = group.first;
#pragma unroll
    for (int b = 0; b < 8; ++b) {
      if (b < w.bits) {
        const uint32_t minus = ~(codes[b][j] >> shift);
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          values[i] += __uint_as_float(__float_as_uint(group.scale[b]) ^ ((minus << (31 - i)) & 0x80000000u));
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) values[i] *= group.factor;
    store_run(values, out + r * w.K + k, int(min(K - k, uint32_t(kRun))), whole);
  }
}

// kCount adjacent elements of a centroid, at a multiple of their size.
template <int kCount>
__device__ inline void load_centroid(const unsigned char* table, int64_t element, DType dtype, float (&out)[kCount]) {
  if (dtype == DType::kFloat32) {
    const unsigned char* at = table + 4 * element;
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const uint2 two = load8(at + 4 * i);
      out[i] = __uint_as_float(two.x), out[i + 1] = __uint_as_float(two.y);
    }
    return;
  }
  const unsigned char* at = table + 2 * element;
  uint32_t pairs[kCount / 2];
  if constexpr (kCount == 8) {
    const uint4 four = load16(at);
    pairs[0] = four.x, pairs[1] = four.y, pairs[2] = four.z, pairs[3] = four.w;
  } else if constexpr (kCount == 4) {
    const uint2 two = load8(at);
    pairs[0] = two.x, pairs[1] = two.y;
  } else {
    pairs[0] = *reinterpret_cast<const uint32_t*>(at);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const uint32_t half = i % 2 ? pairs[i / 2] >> 16 : pairs[i / 2] & 0xffffu;
    out[i] = dtype == DType::kBFloat16 ? __uint_as_float(half << 16)
                                       : __half2float(__ushort_as_half(static_cast<unsigned short>(half)));
  }
}

// Weights k .. k + 7 of every gridDim.x-th row. kPiece: as many of them as share a code.
template <int kPiece, class Out>
__device__ inline void codebook_column(const CodebookWeight& w, const unsigned char* table, uint32_t k,
                                       int64_t row_begin, int64_t rows, Out* out) {
  constexpr int kPieces = kRun / kPiece;
  const uint32_t K = uint32_t(w.K), long_vector = w.vec_len == 16;
  const int64_t entries = int64_t(1) << w.codebook_bits;
  const bool whole = K * sizeof(Out) % 16 == 0;
  uint32_t groups[kPieces];
#pragma unroll
  for (int p = 0; p < kPieces; ++p) groups[p] = (k + p * kPiece) / uint32_t(w.group_size);

  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const int64_t row = row_begin + r;
    float values[kRun] = {};
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const uint32_t at = k + p * kPiece;
      if (at >= K) break;
      float sum[kPiece];
      for (int c = 0; c < w.num_codebooks; ++c) {
        const int64_t place = (c * w.N + row) * w.J + (at / kPiece >> long_vector);
        const int64_t stored = w.codebook_bits <= 8 ? int64_t(static_cast<const uint8_t*>(w.codes)[place])
                                                    : int64_t(static_cast<const int16_t*>(w.codes)[place]);
        const int64_t code = stored & (entries - 1);  // stays inside the table whatever is stored
        const int64_t inside = long_vector ? at % 16 : 0;
        float centroid[kPiece];
        load_centroid(table, (c * entries + code) * w.vec_len + inside, w.scale_dtype, centroid);
#pragma unroll
        for (int i = 0; i < kPiece; ++i) sum[i] = c == 0 ? centroid[i] : sum[i] + centroid[i];
      }
      const float scale = load_float(w.scales, row * w.G + groups[p], w.scale_dtype);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) values[p * kPiece + i] = sum[i] * scale;
    }
    store_run(values, out + r * w.K + k, int(min(K - k, uint32_t(kRun))), whole);
  }
}

template <class Out>
__device__ inline void codebook_columns(const CodebookWeight& w, const unsigned char* table, int64_t row_begin,
                                        int64_t rows, Out* out) {
  const uint32_t k = (blockIdx.y * kThreads + threadIdx.x) * kRun;
  if (k >= uint32_t(w.K)) return;
  if (w.vec_len == 2) {
    codebook_column<2>(w, table, k, row_begin, rows, out);
  } else if (w.vec_len == 4) {
    codebook_column<4>(w, table, k, row_begin, rows, out);
  } else {
    codebook_column<8>(w, table, k, row_begin, rows, out);
  }
}

template <class Out>
__global__ void __launch_bounds__(kThreads)
    dequantize_codebook_kernel(CodebookWeight w, int64_t row_begin, int64_t rows, int table_bytes, Out* out) {
  if (table_bytes > 0) {
    uint32_t* table = reinterpret_cast<uint32_t*>(dynamic_shared());
    for (int i = int(threadIdx.x); i < table_bytes / 4; i += kThreads) {
      table[i] = static_cast<const uint32_t*>(w.codebooks)[i];
    }
    __syncthreads();
    codebook_columns(w, dynamic_shared(), row_begin, rows, out);
  } else {
    codebook_columns(w, static_cast<const unsigned char*>(w.codebooks), row_begin, rows, out);
  }
}

// f(typed null pointer) for the type that holds `dtype`.
template <class F>
void with_type(DType dtype, const F& f) {
  if (dtype == DType::kFloat32) return f(static_cast<float*>(nullptr));
  if (dtype == DType::kFloat16) return f(static_cast<__half*>(nullptr));
  f(static_cast<__nv_bfloat16*>(nullptr));
}

}  // namespace

// Grids: x rows, y runs of weights along K (at most 2^24 / 1024).
void dequantize_bcq(const BcqWeight& weight, const DequantizeRows& rows, const Gpu& gpu) {
  const int64_t count = rows.row_end - rows.row_begin;
  if (count == 0) return;
  const dim3 grid(unsigned(ceil_div(count, kWarps)), unsigned(ceil_div(weight.K, kWarpWeights)));
  with_type(rows.dtype, [&](auto* type) {
    launch(dequantize_bcq_kernel<std::remove_pointer_t<decltype(type)>>,
           LaunchShape{grid, dim3(kThreads), 0, gpu.stream}, weight, rows.row_begin, count,
           static_cast<decltype(type)>(rows.out));
  });
}

void dequantize_codebook(const CodebookWeight& weight, const DequantizeRows& rows, const Gpu& gpu) {
  const int64_t count = rows.row_end - rows.row_begin;
  if (count == 0) return;
  const int64_t segments = ceil_div(weight.K, kThreads * kRun);
  const dim3 grid(unsigned(std::min(count, ceil_div(kBlocksPerSm * gpu.sm_count, segments))), unsigned(segments));
  const int64_t bytes = (int64_t(weight.num_codebooks) << weight.codebook_bits) * weight.vec_len *
                        (weight.scale_dtype == DType::kFloat32 ? 4 : 2);
  const int table_bytes = bytes <= kTableLimit ? int(bytes) : 0;
  with_type(rows.dtype, [&](auto* type) {
    launch(dequantize_codebook_kernel<std::remove_pointer_t<decltype(type)>>,
           LaunchShape{grid, dim3(kThreads), size_t(table_bytes), gpu.stream}, weight, rows.row_begin, count,
           table_bytes, static_cast<decltype(type)>(rows.out));
  });
}

}  // namespace lutgemm::cuda
