// LUT-GEMM as its paper has it (ICLR 2024, section 3), for comparison only: mu = 8, full tables in fp16, one token.
//
//   y[n] += sum over planes b of scales[b, g, n] * sum over the tile's slices j of table[j][byte j of codes[w, b, n]]
//         + offsets[g, n] * sum of the tile's x
//
//   codes    [K/32, bits, N] uint32: N innermost, so that a warp reads 128 bytes
//   scales   [K/group_size, bits, N] fp16, offsets [K/group_size, N] fp16 or null
//   grid     (N / 2048, K / 32) blocks of 256 threads: a block makes 4 tables for 32 activations, its threads look up
//            8 rows each, and every tile of K adds its part to y by fp16 atomics; y is set to zero before
//
// K is a multiple of 32, group_size a multiple of 32 that divides K, N even.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kThreads = 256, kRows = 2048, kTile = 32, kSlices = kTile / 8;

__global__ void __launch_bounds__(kThreads)
    textbook_lut_gemm(const __half* x, const uint32_t* codes, const __half* scales, const __half* offsets, __half* y,
                      int N, int bits, int words_per_group) {
  __shared__ __half tables[kSlices][256];
  const int word = blockIdx.y, group = word / words_per_group;
  // 64 threads a table: each makes entry `first` of the low 6 activations, and from it those of the top 2.
  const int slice = threadIdx.x / 64, first = threadIdx.x % 64;
  const __half* slice_x = x + word * kTile + slice * 8;
  __half low = __float2half(0.0f);
  for (int i = 0; i < 6; ++i) low = (first >> i & 1) ? __hadd(low, slice_x[i]) : __hsub(low, slice_x[i]);
  for (int top = 0; top < 4; ++top) {
    __half entry = (top & 1) ? __hadd(low, slice_x[6]) : __hsub(low, slice_x[6]);
    entry = (top & 2) ? __hadd(entry, slice_x[7]) : __hsub(entry, slice_x[7]);
    tables[slice][top * 64 + first] = entry;
  }
  __syncthreads();
  const __half sum = __hadd(__hadd(tables[0][255], tables[1][255]), __hadd(tables[2][255], tables[3][255]));
  const int begin = blockIdx.x * kRows, end = min(N, begin + kRows);
  for (int n = begin + 2 * threadIdx.x; n < end; n += 2 * kThreads) {
    __half2 total = __float2half2_rn(0.0f);
    if (offsets) total = __hmul2(*reinterpret_cast<const __half2*>(offsets + size_t(group) * N + n), __half2half2(sum));
    for (int b = 0; b < bits; ++b) {
      const uint2 code = *reinterpret_cast<const uint2*>(codes + (size_t(word) * bits + b) * N + n);
      __half left = __float2half(0.0f), right = left;
      for (int j = 0; j < kSlices; ++j) {
        left = __hadd(left, tables[j][code.x >> (8 * j) & 255]);
        right = __hadd(right, tables[j][code.y >> (8 * j) & 255]);
      }
      const __half2 scale = *reinterpret_cast<const __half2*>(scales + (size_t(group) * bits + b) * N + n);
      total = __hfma2(scale, __halves2half2(left, right), total);
    }
    atomicAdd(reinterpret_cast<__half2*>(y + n), total);
  }
}

}  // namespace

// 0, or a cudaError_t.
extern "C" int lutgemm_textbook(const void* x, const void* codes, const void* scales, const void* offsets, void* y,
                                int N, int K, int bits, int group_size, void* stream) {
  auto* s = static_cast<cudaStream_t>(stream);
  const dim3 grid((N + kRows - 1) / kRows, K / kTile);
  if (cudaError_t error = cudaMemsetAsync(y, 0, size_t(N) * sizeof(__half), s); error != cudaSuccess) return error;
  textbook_lut_gemm<<<grid, kThreads, 0, s>>>(static_cast<const __half*>(x), static_cast<const uint32_t*>(codes),
                                              static_cast<const __half*>(scales), static_cast<const __half*>(offsets),
                                              static_cast<__half*>(y), N, bits, group_size / kTile);
  return cudaGetLastError();
}
