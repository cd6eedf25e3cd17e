// BiQGEMM: tables of several tokens, so that a code that is read serves them all. The kernel is in lut.cuh.
//
//   M        2           3..4        5..8, and blocks of 8 beyond
//   tables   Half<4>     Half<8>     Half<16>            accuracy "accurate" and below
//            Float<8>    Float<16>   Float<16>, of 4     above, and with fp32 scales
#include "cuda/lut.cuh"
#include "cuda/lut_launch.cuh"

namespace lutgemm::cuda {
namespace {

// A multiprocessor: 128 registers a thread, 70 to 90 KB of shared memory a block.
constexpr int kBlocks = 2;

template <class Tables, class Scales, bool kUniform>
__global__ void __launch_bounds__(kLutThreads, kBlocks) biqgemm_kernel(LutArguments arguments) {
  lut_block<Tables, Scales, kUniform>(arguments);
}

template <class Tables>
LutKernel kernel_for(const LutProblem& problem) {
  return problem.uniform ? make_kernel<Tables>(biqgemm_kernel<Tables, NarrowScales, true>)
                         : make_kernel<Tables>(biqgemm_kernel<Tables, NarrowScales, false>);
}

LutKernel kernel_of(const LutProblem& problem) {
  const int64_t M = problem.io.M;
  if (problem.wide_scales) {  // rare: not worth kernels of their own with every table
    return M <= 2 ? make_kernel<FloatTables<8>>(biqgemm_kernel<FloatTables<8>, WideScales, false>)
                  : make_kernel<FloatTables<16>>(biqgemm_kernel<FloatTables<16>, WideScales, false>);
  }
  if (problem.accuracy > Accuracy::kAccurate) {
    return M <= 2 ? kernel_for<FloatTables<8>>(problem) : kernel_for<FloatTables<16>>(problem);
  }
  return M <= 2   ? kernel_for<HalfTables<4>>(problem)
         : M <= 4 ? kernel_for<HalfTables<8>>(problem)
                  : kernel_for<HalfTables<16>>(problem);
}

}  // namespace

int64_t biqgemm_workspace(const LutProblem& problem, const Gpu& gpu) {
  return lut_workspace(problem, kernel_of(problem), gpu);
}

void biqgemm(const LutProblem& problem, const Gpu& gpu) { launch_lut(kernel_of(problem), problem, gpu); }

}  // namespace lutgemm::cuda
