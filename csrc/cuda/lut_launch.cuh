// Launching the kernels of lut.cuh. Host code.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/lut.cuh"
#include "cuda/reduce.h"

namespace lutgemm::cuda {

inline LutPlan plan_of(const LutProblem& problem, const LutTables& tables, const Gpu& gpu) {
  return plan_lut(problem.io.M, problem.io.N, problem.io.K, problem.bits, tables, gpu.sm_count);
}

inline int64_t lut_workspace(const LutProblem& problem, const LutTables& tables, const Gpu& gpu) {
  return split_workspace(problem.io, plan_of(problem, tables, gpu).splits);
}

inline void launch_lut(void (*kernel)(LutArguments), const LutProblem& problem, const LutTables& tables, const Gpu& gpu) {
  const LutPlan plan = plan_of(problem, tables, gpu);
  float* partial = plan.splits > 1 ? static_cast<float*>(problem.workspace) : nullptr;
  const size_t results = plan.tiles_per_block * kTileRows * tables.tokens * sizeof(float);
  const dim3 grid(static_cast<unsigned>(plan.row_blocks * plan.token_blocks), static_cast<unsigned>(plan.splits));
  launch(kernel, LaunchShape{grid, dim3(kLutThreads), kTableBytes + results, gpu.stream, true},
         LutArguments{problem, plan, partial});
  if (partial != nullptr) reduce_splits(problem.io, partial, plan.splits, gpu);
}

}  // namespace lutgemm::cuda
