// BiQGEMM: tables of several tokens, so that a code that is read serves them all. The kernel is in lut.cuh.
//
//   M        2           3..4        5..8        9..16, and blocks of 16 or 8 beyond
//   tables   Half<4>     Half<8>     Half<16>    Half<32>      accuracy "accurate" and below
//            Float<8>    Float<16>   Float<32>   Float<64>     above, and with fp32 scales
#include "cuda/lut.cuh"
#include "cuda/lut_launch.cuh"

namespace lutgemm::cuda {
namespace {

// Registers of a multiprocessor hold 16 warps: a block of 16 with strips of 8 rows, as in lut_gemm, or where a strip of
// 8 would leave a lane less than 4 rows, two blocks of 8, of which one looks up while the other builds its next tables.
constexpr int kSmWarps = 16;

template <int kBytes>
using HalfTables16 = HalfTables<kBytes, kSmWarps, 8>;
using PairTables = FloatTables<8, kSmWarps, 8>;

template <class Tables, template <int> class Scales, bool kUniform>
__global__ void __launch_bounds__(Tables::kThreads, kSmWarps / Tables::kWarps) biqgemm_kernel(LutArguments arguments) {
  lut_block<Tables, Scales, kUniform>(arguments);
}

template <class Tables, template <int> class Scales, bool kUniform>
LutKernel kernel() {
  return make_kernel<Tables>(biqgemm_kernel<Tables, Scales, kUniform>, kSmWarps / Tables::kWarps);
}

template <class Tables>
LutKernel narrow_kernel(const LutProblem& problem) {
  return problem.uniform ? kernel<Tables, NarrowScales, true>() : kernel<Tables, NarrowScales, false>();
}

template <class Tables>
LutKernel float_kernel(const LutProblem& problem) {
  return problem.wide_scales ? kernel<Tables, WideScales, false>() : narrow_kernel<Tables>(problem);
}

LutKernel kernel_of(const LutProblem& problem) {
  const int64_t M = problem.io.M;
  // A pass for 16 tokens costs as much as two for 8: not worth it where the second would be left out.
  const bool sixteen = ceil_div(M, 16) * 2 == ceil_div(M, 8);
  if (problem.wide_scales || problem.accuracy > Accuracy::kAccurate) {
    if (M <= 2) return float_kernel<PairTables>(problem);
    if (M <= 4) return float_kernel<FloatTables<16>>(problem);
    return sixteen ? kernel<FloatTables<64>, AnyScales, false>() : kernel<FloatTables<32>, AnyScales, false>();
  }
  if (M <= 2) return narrow_kernel<HalfTables16<4>>(problem);
  if (M <= 4) return narrow_kernel<HalfTables16<8>>(problem);
  return sixteen ? kernel<HalfTables<32>, AnyScales, false>() : narrow_kernel<HalfTables<16>>(problem);
}

}  // namespace

LutTables biqgemm_tables(const LutProblem& problem) { return kernel_of(problem).tables; }

int64_t biqgemm_workspace(const LutProblem& problem, const Gpu& gpu) {
  return lut_workspace(problem, kernel_of(problem), gpu);
}

void biqgemm(const LutProblem& problem, const Gpu& gpu) { launch_lut(kernel_of(problem), problem, gpu); }

}  // namespace lutgemm::cuda
