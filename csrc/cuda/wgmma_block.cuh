// What kernels built on wgmma share: W made in A registers, tokens in a ring of stages in shared memory.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

// Kernels have a body where it is defined; elsewhere they are empty, and their launch bounds are one warp.
#if defined(LUTGEMM_EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LUTGEMM_HAS_WGMMA 1
#define LUTGEMM_WGMMA_BOUNDS(threads) __launch_bounds__(threads, 1)
#else
#define LUTGEMM_WGMMA_BOUNDS(threads) __launch_bounds__(32, 1)
#endif

namespace lutgemm::cuda {

// Whether the code that the device runs has that kernel's body, which takes more than a warp.
template <typename Kernel>
bool has_body([[maybe_unused]] Kernel kernel) {
#ifdef LUTGEMM_EMULATED
  return true;
#else
  cudaFuncAttributes attributes{};
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  return attributes.maxThreadsPerBlock > kWarpSize;
#endif
}

// The stage that comes next, and the parity of its barrier's phase.
struct Ring {
  int stages, stage = 0;
  unsigned phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == stages) stage = 0, phase ^= 1;
  }
};

// sums += A B by kSteps products, one group. tokens: fp16 [step of 16 k][half of the 16][token][8].
template <int kTokens, int kSteps>
__device__ __forceinline__ void multiply_steps(float (&sums)[kTokens / 2], const uint32_t (&a)[kSteps][4],
                                               const unsigned char* tokens) {
  const uint64_t b = wgmma_descriptor(tokens, kTokens * 16, 128);
  const auto high = static_cast<uint32_t>(b >> 32), low = static_cast<uint32_t>(b);
  hold_registers(sums);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    // 32 bytes a token, in units of 16. A sum within the lower half: a carry would take instructions.
    const uint64_t own = static_cast<uint64_t>(high) << 32 | (low + step * 2 * kTokens);
    wgmma_f16<kTokens>(sums, a[step], own);
  }
  wgmma_commit();
}

// The sums of a tile of 16 rows to shared memory, [token][row] with kPitch rows; `to`: the tile's first row of token 0.
template <int kTokens, int kPitch>
__device__ __forceinline__ void store_sums(const float (&sums)[kTokens / 2], float* to) {
  static_assert(kPitch % 32 == 4, "the tokens of a quad, 2 apart, in banks 8 apart");
  const int lane = threadIdx.x % kWarpSize;
  float* own = to + lane % 4 * 2 * kPitch + lane / 4;
#pragma unroll
  for (int i = 0; i < kTokens / 8; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) own[(8 * i + e % 2) * kPitch + 8 * (e / 2)] = sums[4 * i + e];
  }
}

}  // namespace lutgemm::cuda
