// Launching the kernels of lut.cuh. Host code.
#pragma once

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/lut.cuh"
#include "cuda/reduce.h"

namespace lutgemm::cuda {

struct LutKernel {
  void (*function)(LutArguments);
  LutTables tables;
};

// most_blocks: of a multiprocessor, as the kernel's launch bounds promise.
template <class Tables>
LutKernel make_kernel(void (*function)(LutArguments), int most_blocks) {
  using Shape = typename Tables::Shape;
  return LutKernel{function,
                   LutTables{Shape::kTokens, Shape::kInputs, Shape::kWarps, Shape::kStripRows,
                             Shape::kResultStride * int(sizeof(float)), int(sizeof(StagedX<Shape>)), most_blocks}};
}

inline LutPlan plan_of(const LutProblem& problem, const LutKernel& kernel, const Gpu& gpu) {
  return plan_lut(problem.io, problem.bits, kernel.tables, gpu);
}

inline int64_t lut_workspace(const LutProblem& problem, const LutKernel& kernel, const Gpu& gpu) {
  return split_workspace(problem.io, plan_of(problem, kernel, gpu).splits);
}

// Memory is 0.65 us away, in which a multiprocessor of an H100 takes 16 KB and one of an H200 24 KB; and while tables
// are built, some 1500 clocks, it should not fall idle.
constexpr int64_t kAheadBytes = 48 * 1024;  // of codes, of a multiprocessor
constexpr int64_t kMostAhead = 4;

inline int strips_ahead(const LutTables& tables, const LutPlan& plan, int bits) {
  const int64_t strip = plan.resident * tables.warps * tables.strip_rows * tables.inputs * bits / 8;
  return static_cast<int>(std::min(kMostAhead, ceil_div(kAheadBytes, strip)));
}

inline LutArguments arguments_of(const LutProblem& problem, const LutTables& tables, const LutPlan& plan) {
  const int64_t units = ceil_div(problem.io.K, kUnitInputs), group_words = ceil_div(problem.group_size, kWordInputs);
  LutArguments a{};
  a.io = problem.io;
  a.codes = reinterpret_cast<const char*>(problem.codes), a.scales = static_cast<const char*>(problem.scales),
  a.scale_unit = problem.scale_unit;
  a.partial = plan.splits > 1 ? static_cast<float*>(problem.workspace) : nullptr;
  a.bits = problem.bits, a.offsets = problem.offsets;
  a.uniform = problem.uniform, a.wide_scales = problem.wide_scales;
  a.ahead = strips_ahead(tables, plan, problem.bits);
  a.terms = problem.uniform ? 2 : problem.bits + problem.offsets;
  a.quad_scales = problem.slots * 4 * (problem.wide_scales ? 4 : 2);
  a.tile_codes = static_cast<int>(units * problem.bits * kPlaneBytes);
  a.tile_scales = static_cast<int>(units * a.terms * 4 * a.quad_scales);
  const int64_t step_tiles = int64_t(tables.warps) * tables.strip_rows / kTileRows;
  a.step_codes = step_tiles * a.tile_codes, a.step_scales = step_tiles * a.tile_scales;
  a.last_plane_codes = a.step_codes - (problem.bits - 1) * kPlaneBytes;
  a.offset_scales = (a.terms - 1) * 4 * a.quad_scales;
  a.group_inverse = (uint64_t(1) << kInverseBits) / static_cast<uint64_t>(group_words) + 1;
  a.all_strips = static_cast<int>(ceil_div(problem.io.N, tables.strip_rows));
  a.all_tables = static_cast<int>(ceil_div(problem.io.K, tables.inputs));
  a.strips_of_block = static_cast<int>(plan.strips_per_block);
  a.tables_of_split = static_cast<int>(plan.tables_per_split);
  return a;
}

inline void launch_lut(const LutKernel& kernel, const LutProblem& problem, const Gpu& gpu) {
  const LutPlan plan = plan_of(problem, kernel, gpu);
  const LutArguments arguments = arguments_of(problem, kernel.tables, plan);
  const size_t dynamic = size_t(kernel.tables.shared_bytes(plan.strips_per_block) - kernel.tables.static_bytes);
  const dim3 grid(static_cast<unsigned>(plan.token_blocks), static_cast<unsigned>(plan.row_blocks),
                  static_cast<unsigned>(plan.splits));
  launch(kernel.function, LaunchShape{grid, dim3(unsigned(kernel.tables.warps * kWarpSize)), dynamic, gpu.stream, true},
         arguments);
  if (arguments.partial != nullptr) reduce_splits(problem.io, arguments.partial, plan.splits, gpu);
}

}  // namespace lutgemm::cuda
