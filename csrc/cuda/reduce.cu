// The second kernel of a split K: see reduce.h.
//
//   thread  ->  one column of y: neighbouring threads read neighbouring partial sums of each split
#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/reduce.h"

namespace lutgemm::cuda {
namespace {

constexpr int kThreads = 128;         // small blocks spread the 4096 elements of a narrow layer over 32 multiprocessors
constexpr int64_t kMostRows = 65535;  // of a grid
constexpr int kAtOnce = 8;            // loads under way together: a split has its sums in L2, some 250 clocks away

__global__ void __launch_bounds__(kThreads) reduce_splits_kernel(GpuIo io, const float* partial, int64_t splits) {
  const int64_t n = blockIdx.x * int64_t(kThreads) + threadIdx.x;
  // Before the wait: what follows starts copying its codes, and waits for this kernel, which ends behind its own wait.
  launch_dependents();
  grid_dependency_wait();
  if (n >= io.N) return;
  const int64_t elements = io.M * io.N;
  for (int64_t m = blockIdx.y; m < io.M; m += gridDim.y) {
    const float* own = partial + m * io.N + n;
    float sum = 0;
    for (int64_t split = 0; split < splits; split += kAtOnce) {
      float values[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) values[i] = split + i < splits ? own[(split + i) * elements] : 0.0f;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) sum += values[i];
    }
    store_result(io.y, io.bias, io.dtype, io.N, m, n, sum);
  }
}

}  // namespace

void reduce_splits(const GpuIo& io, const float* partial, int64_t splits, const Gpu& gpu) {
  const dim3 grid(static_cast<unsigned>(ceil_div(io.N, kThreads)), static_cast<unsigned>(std::min(io.M, kMostRows)));
  const LaunchShape shape{grid, dim3(kThreads), 0, gpu.stream, true};
  launch(reduce_splits_kernel, shape, io, partial, splits);
}

}  // namespace lutgemm::cuda
