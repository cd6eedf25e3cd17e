// LUT-GEMM: one token a block. The kernel is in lut.cuh.
#include "cuda/lut.cuh"
#include "cuda/lut_launch.cuh"

namespace lutgemm::cuda {
namespace {

// Blocks of a multiprocessor. On Hopper 3 of 70 KB fit shared memory, and the commonest kind fits 80 registers; kinds
// that hold more scales would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <class Scales, bool kUniform>
constexpr int kBlocks = 2;
#else
template <class Scales, bool kUniform>
constexpr int kBlocks = Scales::kBytes == 2 && !kUniform ? 3 : 2;
#endif

template <class Tables, class Scales, bool kUniform>
__global__ void __launch_bounds__(kLutThreads, kBlocks<Scales, kUniform>) lut_gemm_kernel(LutArguments arguments) {
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
