// LUT-GEMM: one token a block, fp32 tables. The kernel is in lut.cuh.
#include "cuda/lut.cuh"
#include "cuda/lut_launch.cuh"

namespace lutgemm::cuda {
namespace {

constexpr LutTables kTables{1, 4};

template <class Scale, bool kUniform>
__global__ void __launch_bounds__(kLutThreads, kLutBlocks) lut_gemm_kernel(LutArguments arguments) {
  lut_block<4, Scale, kUniform>(arguments);
}

}  // namespace

int64_t lut_gemm_workspace(const LutProblem& problem, const Gpu& gpu) { return lut_workspace(problem, kTables, gpu); }

void lut_gemm(const LutProblem& problem, const Gpu& gpu) {
  const auto kernel = problem.uniform ? (problem.wide_scales ? lut_gemm_kernel<float, true> : lut_gemm_kernel<__half, true>)
                                      : (problem.wide_scales ? lut_gemm_kernel<float, false> : lut_gemm_kernel<__half, false>);
  launch_lut(kernel, problem, kTables, gpu);
}

}  // namespace lutgemm::cuda
