// BiQGEMM: tables of 2 or 4 tokens, which each code that is read serves together. The kernel is in lut.cuh.
#include "cuda/lut.cuh"
#include "cuda/lut_launch.cuh"

namespace lutgemm::cuda {
namespace {

constexpr LutTables kTwo{2, 8}, kFour{4, 16};

template <int kEntryBytes, class Scale, bool kUniform>
__global__ void __launch_bounds__(kLutThreads, kLutBlocks) biqgemm_kernel(LutArguments arguments) {
  lut_block<kEntryBytes, Scale, kUniform>(arguments);
}

const LutTables& tables_of(const LutProblem& problem) { return problem.io.M <= kTwo.tokens ? kTwo : kFour; }

template <int kEntryBytes>
auto kernel_of(const LutProblem& problem) {
  return problem.uniform
             ? (problem.wide_scales ? biqgemm_kernel<kEntryBytes, float, true> : biqgemm_kernel<kEntryBytes, __half, true>)
             : (problem.wide_scales ? biqgemm_kernel<kEntryBytes, float, false>
                                    : biqgemm_kernel<kEntryBytes, __half, false>);
}

}  // namespace

int64_t biqgemm_workspace(const LutProblem& problem, const Gpu& gpu) {
  return lut_workspace(problem, tables_of(problem), gpu);
}

void biqgemm(const LutProblem& problem, const Gpu& gpu) {
  const LutTables& tables = tables_of(problem);
  launch_lut(tables.tokens == 2 ? kernel_of<8>(problem) : kernel_of<16>(problem), problem, tables, gpu);
}

}  // namespace lutgemm::cuda
