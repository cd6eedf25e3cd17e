// Launching the kernels of lut.cuh. Host code.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/lut.cuh"
#include "cuda/reduce.h"

namespace lutgemm::cuda {

struct LutKernel {
  void (*function)(LutArguments);
  LutTables tables;
  int result_stride;  // fp32 values of a row
};

template <class Tables>
LutKernel make_kernel(void (*function)(LutArguments)) {
  return LutKernel{function, LutTables{Tables::kTokens, Tables::kEntryBytes}, Tables::kResultStride};
}

inline LutPlan plan_of(const LutProblem& problem, const LutKernel& kernel, const Gpu& gpu) {
  return plan_lut(problem.io.M, problem.io.N, problem.io.K, problem.bits, kernel.tables, gpu.sm_count);
}

inline int64_t lut_workspace(const LutProblem& problem, const LutKernel& kernel, const Gpu& gpu) {
  return split_workspace(problem.io, plan_of(problem, kernel, gpu).splits);
}

inline LutArguments arguments_of(const LutProblem& problem, const LutKernel& kernel, const LutPlan& plan) {
  const int64_t units = ceil_div(problem.io.K, kUnitInputs), group_words = ceil_div(problem.group_size, kWordInputs);
  LutArguments a{};
  a.io = problem.io;
  a.codes = problem.codes, a.scales = static_cast<const char*>(problem.scales), a.scale_unit = problem.scale_unit;
  a.partial = plan.splits > 1 ? static_cast<float*>(problem.workspace) : nullptr;
  a.bits = problem.bits, a.offsets = problem.offsets;
  a.terms = problem.uniform ? 2 : problem.bits + problem.offsets;
  a.quad_scales = problem.slots * 4 * (problem.wide_scales ? 4 : 2);
  a.tile_codes = units * problem.bits * kPlaneWords;
  a.tile_scales = units * a.terms * 4 * a.quad_scales;
  a.group_inverse = (uint64_t(1) << kInverseBits) / static_cast<uint64_t>(group_words) + 1;
  a.all_tiles = static_cast<int>(ceil_div(problem.io.N, kTileRows));
  a.all_tables = static_cast<int>(ceil_div(problem.io.K, kernel.tables.inputs()));
  a.tiles_of_block = static_cast<int>(plan.tiles_per_block),
  a.tables_of_split = static_cast<int>(plan.tables_per_split);
  return a;
}

inline void launch_lut(const LutKernel& kernel, const LutProblem& problem, const Gpu& gpu) {
  const LutPlan plan = plan_of(problem, kernel, gpu);
  const LutArguments arguments = arguments_of(problem, kernel, plan);
  const size_t results = plan.tiles_per_block * kTileRows * kernel.result_stride * sizeof(float);
  const dim3 grid(static_cast<unsigned>(plan.token_blocks), static_cast<unsigned>(plan.row_blocks),
                  static_cast<unsigned>(plan.splits));
  launch(kernel.function, LaunchShape{grid, dim3(kLutThreads), kTableBytes + results, gpu.stream, true}, arguments);
  if (arguments.partial != nullptr) reduce_splits(problem.io, arguments.partial, plan.splits, gpu);
}

}  // namespace lutgemm::cuda
