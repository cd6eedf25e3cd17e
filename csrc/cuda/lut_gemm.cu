// LUT-GEMM: one token a block. The kernel is in lut.cuh.
#include "cuda/lut.cuh"
#include "cuda/lut_launch.cuh"

namespace lutgemm::cuda {
namespace {

// A multiprocessor: 128 registers a thread, 70 to 90 KB of shared memory a block.
constexpr int kBlocks = 2;

template <class Tables, class Scales, bool kUniform>
__global__ void __launch_bounds__(kLutThreads, kBlocks) lut_gemm_kernel(LutArguments arguments) {
  lut_block<Tables, Scales, kUniform>(arguments);
}

template <class Tables>
LutKernel kernel_for(const LutProblem& problem) {
  if (problem.wide_scales) return make_kernel<Tables>(lut_gemm_kernel<Tables, WideScales, false>);
  return problem.uniform ? make_kernel<Tables>(lut_gemm_kernel<Tables, NarrowScales, true>)
                         : make_kernel<Tables>(lut_gemm_kernel<Tables, NarrowScales, false>);
}

LutKernel kernel_of(const LutProblem& problem) {
  return problem.accuracy == Accuracy::kExact ? kernel_for<FloatTables<4>>(problem) : kernel_for<ShortTables>(problem);
}

}  // namespace

int64_t lut_gemm_workspace(const LutProblem& problem, const Gpu& gpu) {
  return lut_workspace(problem, kernel_of(problem), gpu);
}

void lut_gemm(const LutProblem& problem, const Gpu& gpu) { launch_lut(kernel_of(problem), problem, gpu); }

}  // namespace lutgemm::cuda
