// Where work goes that is started now: what fused siblings must have in common, whose results are made in one call.
#include "bind_cuda.h"

#ifndef LUTGEMM_EMULATED
#include <cuda_runtime_api.h>
#endif

namespace lutgemm::cuda {
namespace {

// The current stream of x's device, as a number from 0 up; while it is being captured, the capture: -1, -2, ...
int64_t gpu_place(const Tensor& x) {
  const Call call(x);
#ifdef LUTGEMM_EMULATED
  return 0;
#else
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  const cudaError_t error = cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(call.gpu.stream), &status, &id);
  check(error == cudaSuccess, "CUDA: cudaStreamGetCaptureInfo failed: ", cudaGetErrorString(error));
  if (status != cudaStreamCaptureStatusNone) return -1 - int64_t(id);
  return int64_t(reinterpret_cast<uintptr_t>(call.gpu.stream));
#endif
}

}  // namespace

LUTGEMM_GPU_OPS(m) { m.def("_gpu_place(Tensor x) -> int"); }

LUTGEMM_GPU_IMPL(m) { m.impl("_gpu_place", TORCH_BOX(&gpu_place)); }

}  // namespace lutgemm::cuda
