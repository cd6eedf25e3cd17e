// BCQ dequantized in registers for tensor cores: every check that keeps the kernels inside their tensors.
#include "bind_cuda_planes.h"
#include "cuda/dequant_gemm.h"

namespace lutgemm::cuda {
namespace {

Tensor dequant_gemm_cuda(const Tensor& x, const Tensor& packed, const Tensor& row_scales,
                         const std::optional<Tensor>& bias, int64_t N, int64_t K, int64_t bits, bool merged, bool wide,
                         bool has_offsets, int64_t steps) {
  const Call call(x);
  DequantGemmProblem p{};
  p.weight = checked_planes(x, packed, N, K, bits, merged, wide, has_offsets, steps);
  check_tensor(row_scales, "row_scales", {p.weight.tiles * kPlanesTileRows}, ScalarType::Float, x);
  p.row_scales = static_cast<const float*>(row_scales.const_data_ptr());
  Tensor y;
  p.weight.io = make_io(x, bias, y, N, K);
  if (p.weight.io.M == 0) return y;
  const Workspace workspace(dequant_gemm_workspace(p, call.gpu), x);
  p.weight.workspace = workspace.data;
  dequant_gemm(p, call.gpu);
  return y;
}

}  // namespace

LUTGEMM_GPU_OPS(m) {
  m.def(
      "_bcq_dequant_gemm_cuda(Tensor x, Tensor packed, Tensor row_scales, Tensor? bias, int N, int K, int bits, "
      "bool merged, bool wide, bool has_offsets, int steps) -> Tensor");
}

LUTGEMM_GPU_IMPL(m) { m.impl("_bcq_dequant_gemm_cuda", TORCH_BOX(&dequant_gemm_cuda)); }

}  // namespace lutgemm::cuda
