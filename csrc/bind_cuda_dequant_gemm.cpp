// BCQ dequantized in registers for tensor cores: every check that keeps the kernels inside their tensors.
#include "bind_cuda_planes.h"
#include "cuda/dequant_gemm.h"

namespace lutgemm::cuda {
namespace {

// form: 0 takes the best of the device, 1 mma.sync, 2 wgmma, or fails.
Tensor dequant_gemm_cuda(const Tensor& x, const Tensor& packed, const Tensor& row_facts,
                         const std::optional<Tensor>& bias, int64_t N, int64_t K, int64_t bits, bool merged, bool wide,
                         bool has_offsets, int64_t steps, int64_t form) {
  const Call call(x);
  DequantGemmProblem p{};
  p.weight = checked_planes(x, packed, N, K, bits, merged, wide, has_offsets, steps);
  const int64_t rows = p.weight.tiles * kPlanesTileRows;
  check_tensor(row_facts, "row_facts", {2, rows}, ScalarType::Float, x);
  p.row_scales = static_cast<const float*>(row_facts.const_data_ptr());
  p.row_sums = p.row_scales + rows;
  check_range("form", form, 0, 2);
  p.form = static_cast<GemmForm>(form);
  Tensor y;
  p.weight.io = make_io(x, bias, y, N, K);
  if (p.weight.io.M == 0) return y;
  const Workspace workspace(dequant_gemm_workspace(p, call.gpu), x);
  p.weight.workspace = workspace.data;
  dequant_gemm(p, call.gpu);
  return y;
}

#ifdef LUTGEMM_EMULATED
// For tests: int64 [wgmma, tokens, stages, row_blocks, splits, token_blocks, split_chunks, shared_bytes] of x [M, K].
Tensor plan(const Tensor& x, int64_t N, int64_t bits, bool wide, int64_t steps, int64_t sm_count, int64_t capability) {
  DequantGemmProblem p{};
  p.weight.io.M = x.size(0), p.weight.io.N = N, p.weight.io.K = x.size(1);
  p.weight.tiles = ceil_div(N, kPlanesTileRows), p.weight.chunks = ceil_div(x.size(1), kPlanesChunk);
  p.weight.bits = int(bits), p.weight.wide = wide, p.weight.has_offsets = true, p.weight.steps = int(steps);
  const DequantGemmPlan made = plan_dequant_gemm(p, Gpu{nullptr, 0, int(capability), int(sm_count), 227 << 10});
  Tensor out = empty_like_x({8}, ScalarType::Long, x);
  int64_t* to = static_cast<int64_t*>(out.mutable_data_ptr());
  to[0] = made.wgmma, to[1] = made.tokens, to[2] = made.stages, to[3] = made.row_blocks, to[4] = made.splits;
  to[5] = made.token_blocks, to[6] = made.split_chunks, to[7] = int64_t(made.shared_bytes);
  return out;
}
#endif

}  // namespace

LUTGEMM_GPU_OPS(m) {
  m.def(
      "_bcq_dequant_gemm_cuda(Tensor x, Tensor packed, Tensor row_facts, Tensor? bias, int N, int K, int bits, "
      "bool merged, bool wide, bool has_offsets, int steps, int form=0) -> Tensor");
#ifdef LUTGEMM_EMULATED
  m.def("_dequant_gemm_plan(Tensor x, int N, int bits, bool wide, int steps, int sm_count, int capability) -> Tensor");
#endif
}

LUTGEMM_GPU_IMPL(m) {
  m.impl("_bcq_dequant_gemm_cuda", TORCH_BOX(&dequant_gemm_cuda));
#ifdef LUTGEMM_EMULATED
  m.impl("_dequant_gemm_plan", TORCH_BOX(&plan));
#endif
}

}  // namespace lutgemm::cuda
