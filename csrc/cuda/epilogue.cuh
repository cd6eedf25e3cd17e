// Activations in, results out: one float type of run time <-> fp32. The switch is uniform over a grid.
#pragma once

#include "cuda/device.cuh"
#include "params.h"

namespace lutgemm::cuda {

__device__ __forceinline__ float as_float(float value) { return value; }
__device__ __forceinline__ float as_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float as_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// Element `index` of an array of float type `dtype`.
__device__ __forceinline__ float load_value(const void* array, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat16:
      return __half2float(static_cast<const __half*>(array)[index]);
    case DType::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(array)[index]);
    default:
      return static_cast<const float*>(array)[index];
  }
}

// Rounds to nearest, once.
__device__ __forceinline__ void store_value(void* array, DType dtype, int64_t index, float value) {
  switch (dtype) {
    case DType::kFloat16:
      static_cast<__half*>(array)[index] = __float2half_rn(value);
      return;
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(array)[index] = __float2bfloat16_rn(value);
      return;
    default:
      static_cast<float*>(array)[index] = value;
  }
}

// y[m, n] = sum + bias[n]; bias may be null.
__device__ __forceinline__ void store_result(void* y, const void* bias, DType dtype, int64_t N, int64_t m, int64_t n,
                                             float sum) {
  if (bias != nullptr) sum += load_value(bias, dtype, n);
  store_value(y, dtype, m * N + n, sum);
}

}  // namespace lutgemm::cuda
