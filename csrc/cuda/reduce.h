// K split over blocks: each split writes fp32 partial sums, and a second small kernel adds them in order.
//
//   partial [splits, M, N] fp32, in the caller's workspace      y[m, n] = sum over s of partial[s, m, n] + bias[n]
//
// The order of the additions is fixed, so a result has the same bits in every run.
#pragma once

#include <cstdint>

#include "cuda/problem.h"

namespace lutgemm::cuda {

// Bytes of `partial`; none for one split, which writes y itself.
constexpr int64_t split_workspace(const GpuIo& io, int64_t splits) {
  return splits > 1 ? splits * io.M * io.N * int64_t(sizeof(float)) : 0;
}

// Launched as a dependent of the kernel that fills `partial`: launch it right after that one, in the same stream. That
// kernel may call launch_dependents() at any point behind its own grid_dependency_wait().
void reduce_splits(const GpuIo& io, const float* partial, int64_t splits, const Gpu& gpu);

}  // namespace lutgemm::cuda
