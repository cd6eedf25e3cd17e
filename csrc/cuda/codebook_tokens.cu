// What codebook_wgmma reads of x: fp16 in the order of its products, and a scale for each token (codebook_wgmma.cu).
#include "cuda/codebook_mma.cuh"
#include "cuda/codebook_wgmma.h"
#include "cuda/epilogue.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace lutgemm::cuda {
namespace {

using mma_parts::MmaArguments;

constexpr int kThreads = 256;

// One token by a block: its scale, and its inputs in the order of the products. Tokens past M are zeros.
__global__ void __launch_bounds__(kThreads)
    codebook_tokens_kernel(MmaArguments a, int block_tokens, int mmas, int steps, unsigned char* tokens,
                           float* token_scales) {
  LUTGEMM_SHARED(float, warp_max, [kThreads / kWarpSize]);
  const int64_t m = blockIdx.x;
  const bool there = m < a.io.M;
  const auto* row = static_cast<const unsigned char*>(a.io.x) + (there ? m : 0) * a.io.x_stride * 2;
  const int K = there ? static_cast<int>(a.io.K) : 0, width = 4 * mmas;
  const bool aligned = a.io.x_stride % 4 == 0 && (a.straight || a.group_size % 4 == 0);
  const auto load_four = [&](int k, int end, float (&v)[4]) {
    if (aligned && k + 4 <= end) {
      const uint2 words = load8(row + 2 * k);
#pragma unroll
      for (int d = 0; d < 4; ++d) {
        const auto bits = static_cast<unsigned short>((d < 2 ? words.x : words.y) >> 16 * (d % 2));
        v[d] = a.io.dtype == DType::kFloat16 ? __half2float(__ushort_as_half(bits))
                                             : __bfloat162float(__ushort_as_bfloat16(bits));
      }
    } else {
#pragma unroll
      for (int d = 0; d < 4; ++d) v[d] = k + d < end ? load_value(row, a.io.dtype, k + d) : 0.f;
    }
  };
  grid_dependency_wait();
  launch_dependents();
  float most = 0.f;
  for (int k = 4 * threadIdx.x; k < K; k += 4 * kThreads) {
    float v[4];
    load_four(k, K, v);
#pragma unroll
    for (int d = 0; d < 4; ++d) most = fmaxf(most, fabsf(v[d]));
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
  const float inverse = 1.f / __int_as_float(biased << 23);
  if (threadIdx.x == 0) token_scales[m] = __int_as_float(biased << 23);

  const int step_bytes = wgmma_step_bytes(block_tokens);
  unsigned char* to =
      tokens + m / block_tokens * steps * static_cast<int64_t>(mmas * step_bytes) + m % block_tokens * 16;
  for (int i = threadIdx.x; i < steps * mmas * 4; i += kThreads) {
    const int t = i % 4, k_step = i / 4, step = k_step / mmas;
    int k = step * 4 * width, end = K;
    if (!a.straight) {
      const int group = step / a.steps.steps_per_group;
      k = group * a.group_size + (step - group * a.steps.steps_per_group) * 4 * width;
      end = min(K, (group + 1) * a.group_size);
    }
    float v[4];
    load_four(k + t * width + (k_step - step * mmas) * 4, end, v);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t low = __half_as_ushort(__float2half_rn(v[2 * half] * inverse));
      const uint32_t high = __half_as_ushort(__float2half_rn(v[2 * half + 1] * inverse));
      *reinterpret_cast<uint32_t*>(to + k_step * static_cast<int64_t>(step_bytes) + half * (block_tokens * 16) +
                                   4 * t) = low | high << 16;
    }
  }
}

}  // namespace

void codebook_tokens(const CodebookMmaProblem& p, int token_blocks, int block_tokens, unsigned char* tokens,
                     float* token_scales, const Gpu& gpu) {
  const MmaArguments a = mma_parts::mma_arguments(p, 1);
  const LaunchShape shape{dim3(token_blocks * block_tokens), dim3(kThreads), 0, gpu.stream, true};
  const int steps = a.steps.chunks * kChunkItems / a.steps.items;
  launch(codebook_tokens_kernel, shape, a, block_tokens, a.steps.width / 4, steps, tokens, token_scales);
}

}  // namespace lutgemm::cuda
