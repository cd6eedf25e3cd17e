// Planes of signs on fp16 tensor cores: planning and launching for both kinds, and the kernels of the free one.
#include <algorithm>

#include "cuda/planes_plan.h"
#include "cuda/reduce.h"
#include "cuda/sign_planes.cuh"

namespace lutgemm::cuda {

BitPlanesPlan plan_sign_planes(const SignPlanesProblem& problem, const Gpu& gpu) {
  const BitPlanesProblem& p = problem.weight;
  BitPlanesPlan plan{};
  plan.terms = p.io.dtype == DType::kFloat32 && problem.accuracy > Accuracy::kAccurate ? 2 : 1;
  plan.tokens = int(std::min<int64_t>(p.io.M, kSignColumns / plan.terms));
  const int columns = plan.tokens * plan.terms, pairs = (columns + 1) / 2;
  plan.token_tiles = columns <= 8 ? 1 : 2;
  plan.fragment_words = columns * kColumnWords;
  plan.factor_floats = pairs * (2 + 4 * p.steps);
  plan.warp_floats = plan.token_tiles * kWarpSize * 4;
  cut_planes(p, gpu, "sign_planes", true, plan);
  return plan;
}

int64_t sign_planes_workspace(const SignPlanesProblem& problem, const Gpu& gpu) {
  const BitPlanesPlan plan = plan_sign_planes(problem, gpu);
  return prepared_bytes(problem.weight, plan) + split_workspace(problem.weight.io, plan.splits);
}

void sign_planes(const SignPlanesProblem& problem, const Gpu& gpu) {
  const BitPlanesProblem& p = problem.weight;
  const BitPlanesPlan plan = plan_sign_planes(problem, gpu);
  const PlanesArguments arguments = planes_arguments(p, plan);
  const int64_t token_blocks = ceil_div(p.io.M, plan.tokens);
  const LaunchShape shape{dim3(unsigned(plan.blocks), unsigned(plan.splits), unsigned(token_blocks)),
                          dim3(unsigned(plan.warps * kWarpSize)), plan.shared_bytes, gpu.stream, true};
  if (p.merged) {
    launch_sign_integers(arguments, shape);
  } else {
    launch_sign_planes<false>(arguments, shape);
  }
  if (arguments.partial != nullptr) reduce_splits(p.io, arguments.partial, plan.splits, gpu);
}

}  // namespace lutgemm::cuda
