// Launching the kernels of lut.cuh. Host code.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/lut.cuh"
#include "cuda/reduce.h"

namespace lutgemm::cuda {

struct LutKernel {
  void (*function)(LutArguments);
  LutTables tables;
};

template <class Tables>
LutKernel make_kernel(void (*function)(LutArguments)) {
  return LutKernel{function, LutTables{Tables::kTokens, Tables::kEntryBytes}};
}

inline LutPlan plan_of(const LutProblem& problem, const LutKernel& kernel, const Gpu& gpu) {
  return plan_lut(problem.io.M, problem.io.N, problem.io.K, problem.bits, kernel.tables, gpu.sm_count);
}

inline int64_t lut_workspace(const LutProblem& problem, const LutKernel& kernel, const Gpu& gpu) {
  return split_workspace(problem.io, plan_of(problem, kernel, gpu).splits);
}

inline void launch_lut(const LutKernel& kernel, const LutProblem& problem, const Gpu& gpu) {
  const LutPlan plan = plan_of(problem, kernel, gpu);
  float* partial = plan.splits > 1 ? static_cast<float*>(problem.workspace) : nullptr;
  const size_t results = plan.tiles_per_block * kTileRows * kernel.tables.tokens * sizeof(float);
  const dim3 grid(static_cast<unsigned>(plan.row_blocks * plan.token_blocks), static_cast<unsigned>(plan.splits));
  launch(kernel.function, LaunchShape{grid, dim3(kLutThreads), kTableBytes + results, gpu.stream, true},
         LutArguments{problem, plan, partial});
  if (partial != nullptr) reduce_splits(problem.io, partial, plan.splits, gpu);
}

}  // namespace lutgemm::cuda
