// What every launcher takes besides its weight: activations, result, and the device. No torch and no CUDA header here,
// nor in the headers of the kernels, which bindings include.
//
//   y[M, N] = x[M, K] @ W[N, K].T + bias        M tokens, N out_features, K in_features
#pragma once

#include <cstdint>

#include "params.h"

// Functions that kernels call too.
#ifdef __CUDACC__
#define LUTGEMM_ANYWHERE __host__ __device__
#else
#define LUTGEMM_ANYWHERE
#endif

namespace lutgemm::cuda {

// Device pointers. Launchers fill all of y. M, N, K >= 1.
struct GpuIo {
  int64_t M, N, K;
  const void* x;  // [M, K], rows x_stride elements apart; x is 16-byte aligned, its other rows only if x_stride says so
  int64_t x_stride;  // >= K
  const void* bias;  // [N] of dtype, or null
  void* y;           // [M, N] contiguous
  DType dtype;       // of x, bias and y: float types
};

// The device of x, and torch's current stream there. It is the current device while a launcher runs.
struct Gpu {
  void* stream;    // cudaStream_t
  int index;       // device number
  int capability;  // 80, 90, ...: 10 * major + minor
  int sm_count;
  int shared_bytes;  // most dynamic shared memory that a block can opt in to
};

LUTGEMM_ANYWHERE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
LUTGEMM_ANYWHERE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace lutgemm::cuda
