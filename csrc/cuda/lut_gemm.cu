// LUT-GEMM: one token a block. The kernel is in lut.cuh.
//
// A multiprocessor runs one block of 16 warps: two of 8 would build the same tables twice, and one of 8 leaves issue
// slots empty. Strips of 8 rows occupy all warps where a block has 128 rows, as for N = K = 4096, and take at most 112
// registers with 16-bit tables, which leaves room for the blocks of reduce_splits to wait beside it.
#include "cuda/lut.cuh"
#include "cuda/lut_launch.cuh"

namespace lutgemm::cuda {
namespace {

constexpr int kWarps = 16, kStripRows = 8;
constexpr int kBlocks = 1;  // of a multiprocessor

template <class Tables, template <int> class Scales, bool kUniform>
__global__ void __launch_bounds__(Tables::kThreads, kBlocks) lut_gemm_kernel(LutArguments arguments) {
  lut_block<Tables, Scales, kUniform>(arguments);
}

template <class Tables>
LutKernel kernel_for(const LutProblem& problem) {
  if (problem.wide_scales) return make_kernel<Tables>(lut_gemm_kernel<Tables, WideScales, false>, kBlocks);
  return problem.uniform ? make_kernel<Tables>(lut_gemm_kernel<Tables, NarrowScales, true>, kBlocks)
                         : make_kernel<Tables>(lut_gemm_kernel<Tables, NarrowScales, false>, kBlocks);
}

LutKernel kernel_of(const LutProblem& problem) {
  return problem.accuracy == Accuracy::kExact ? kernel_for<FloatTables<4, kWarps, kStripRows>>(problem)
                                              : kernel_for<ShortTables<kWarps, kStripRows>>(problem);
}

}  // namespace

LutTables lut_gemm_tables(const LutProblem& problem) { return kernel_of(problem).tables; }

int64_t lut_gemm_workspace(const LutProblem& problem, const Gpu& gpu) {
  return lut_workspace(problem, kernel_of(problem), gpu);
}

void lut_gemm(const LutProblem& problem, const Gpu& gpu) { launch_lut(kernel_of(problem), problem, gpu); }

}  // namespace lutgemm::cuda
