// What codebook_wgmma reads of x: fp16 in the order of its products, and a scale for each token (codebook_wgmma.cu).
#include "cuda/codebook_mma.cuh"
#include "cuda/codebook_wgmma.h"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace lutgemm::cuda {
namespace {

using mma_parts::MmaArguments;

constexpr int kThreads = 256;

constexpr int kAtOnce = 4;  // loads of a thread under way together: each waits for L2, some 250 clocks

__device__ __forceinline__ float value_of(DType dtype, uint2 words, int i) {
  const auto bits = static_cast<unsigned short>((i < 2 ? words.x : words.y) >> 16 * (i % 2));
  return dtype == DType::kFloat16 ? __half2float(__ushort_as_half(bits)) : __bfloat162float(__ushort_as_bfloat16(bits));
}

// One token by a block: its scale, and its inputs in the order of the products. Tokens past M are zeros. A step has
// 2^mma_bits products.
__global__ void __launch_bounds__(kThreads)
    codebook_tokens_kernel(MmaArguments a, int block_tokens, int mma_bits, int steps, unsigned char* tokens,
                           float* token_scales) {
  LUTGEMM_SHARED(float, warp_max, [kThreads / kWarpSize]);
  const int m = blockIdx.x, width = 4 << mma_bits;
  const bool there = m < a.io.M;
  const auto* row = static_cast<const uint16_t*>(a.io.x) + (there ? m : 0) * a.io.x_stride;
  const int K = there ? static_cast<int>(a.io.K) : 0;
  const bool aligned = a.io.x_stride % 4 == 0 && (a.straight || a.group_size % 4 == 0);
  const auto load_four = [&](int k, int end) {
    if (aligned && k + 4 <= end) return load8(row + k);
    uint32_t v[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (k + i < end) v[i] = row[k + i];
    }
    return make_uint2(v[0] | v[1] << 16, v[2] | v[3] << 16);
  };
  grid_dependency_wait();
  launch_dependents();
  float most = 0.f;
#pragma unroll 1
  for (int first = 4 * threadIdx.x; first < K; first += 4 * kThreads * kAtOnce) {
    uint2 words[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) words[i] = load_four(first + 4 * kThreads * i, K);
#pragma unroll
    for (int i = 0; i < 4 * kAtOnce; ++i) most = fmaxf(most, fabsf(value_of(a.io.dtype, words[i / 4], i % 4)));
  }
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    most = fmaxf(most, __shfl_xor_sync(kFullMask, most, distance));
  }
  if (threadIdx.x % kWarpSize == 0) warp_max[threadIdx.x / kWarpSize] = most;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kThreads / kWarpSize; ++warp) most = fmaxf(most, warp_max[warp]);
  // 2^(exponent of most - 14): the largest becomes 2^14 .. 2^15. 1 for zeros, what is almost zero, and infinities.
  const int exponent = __float_as_int(most) >> 23 & 0xff;
  const int biased = exponent <= 15 || exponent == 255 ? 127 : exponent - 14;
  const float inverse = __int_as_float((254 - biased) << 23);
  if (threadIdx.x == 0) token_scales[m] = __int_as_float(biased << 23);

  const int64_t step_bytes = wgmma_step_bytes(block_tokens);
  const int pieces = (steps << mma_bits) * 4;
  unsigned char* to = tokens + m / block_tokens * (step_bytes * steps << mma_bits) + m % block_tokens * 16;
#pragma unroll 1
  for (int first = threadIdx.x; first < pieces; first += kThreads * kAtOnce) {
    uint2 words[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int piece = first + kThreads * i, t = piece % 4, k_step = piece / 4, step = k_step >> mma_bits;
      int k = step * 4 * width, end = K;
      if (!a.straight) {
        const int group = step / a.steps.steps_per_group;
        k = group * a.group_size + (step - group * a.steps.steps_per_group) * 4 * width;
        end = min(K, (group + 1) * a.group_size);
      }
      words[i] = load_four(k + t * width + (k_step - (step << mma_bits)) * 4, end);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int piece = first + kThreads * i, t = piece % 4, k_step = piece / 4;
      if (piece >= pieces) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t low = __half_as_ushort(__float2half_rn(value_of(a.io.dtype, words[i], 2 * half) * inverse));
        const uint32_t high = __half_as_ushort(__float2half_rn(value_of(a.io.dtype, words[i], 2 * half + 1) * inverse));
        *reinterpret_cast<uint32_t*>(to + k_step * step_bytes + half * (block_tokens * 16) + 4 * t) = low | high << 16;
      }
    }
  }
}

}  // namespace

void codebook_tokens(const CodebookMmaProblem& p, int token_blocks, int block_tokens, unsigned char* tokens,
                     float* token_scales, const Gpu& gpu) {
  const MmaArguments a = mma_parts::mma_arguments(p, 1);
  const LaunchShape shape{dim3(token_blocks * block_tokens), dim3(kThreads), 0, gpu.stream, true};
  const int steps = a.steps.chunks * kChunkItems / a.steps.items;
  const int mma_bits = a.steps.width / 8;  // width is 4 or 8
  launch(codebook_tokens_kernel, shape, a, block_tokens, mma_bits, steps, tokens, token_scales);
}

}  // namespace lutgemm::cuda
