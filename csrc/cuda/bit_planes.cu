// Planes of bits on int8 tensor cores: planning and launching for both kinds, and the kernels of the free one.
#include <algorithm>

#include "cuda/bit_planes.cuh"
#include "cuda/planes_plan.h"
#include "cuda/reduce.h"

namespace lutgemm::cuda {
BitPlanesPlan plan_bit_planes(const BitPlanesProblem& p, const Gpu& gpu) {
  BitPlanesPlan plan{};
  plan.token_tiles = p.io.M <= 4 ? 1 : p.io.M <= 8 ? 2 : 4;
  plan.tokens = int(std::min<int64_t>(p.io.M, 4 * plan.token_tiles));
  plan.terms = 1;  // both terms of a token are in its fragments
  plan.fragment_words = plan.tokens * kTokenWords;
  plan.factor_floats = plan.tokens * (1 + p.steps);
  plan.warp_floats = plan.token_tiles * kWarpSize * 2;
  cut_planes(p, gpu, "bit_planes", plan.token_tiles < 4, plan);
  return plan;
}

int64_t bit_planes_workspace(const BitPlanesProblem& p, const Gpu& gpu) {
  const BitPlanesPlan plan = plan_bit_planes(p, gpu);
  return prepared_bytes(p, plan) + split_workspace(p.io, plan.splits);
}

void bit_planes(const BitPlanesProblem& p, const Gpu& gpu) {
  const BitPlanesPlan plan = plan_bit_planes(p, gpu);
  const PlanesArguments arguments = planes_arguments(p, plan);
  const int64_t token_blocks = ceil_div(p.io.M, plan.tokens);
  const LaunchShape shape{dim3(unsigned(plan.blocks), unsigned(plan.splits), unsigned(token_blocks)),
                          dim3(unsigned(plan.warps * kWarpSize)), plan.shared_bytes, gpu.stream, true};
  if (p.merged) {
    launch_merged_planes(arguments, shape);
  } else {
    launch_bit_planes<false>(arguments, shape);
  }
  if (arguments.partial != nullptr) reduce_splits(p.io, arguments.partial, plan.splits, gpu);
}

}  // namespace lutgemm::cuda
