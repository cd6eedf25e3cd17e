// BCQ on int8 tensor cores: every check that keeps the kernels inside their tensors.
#include "bind_cuda_planes.h"

namespace lutgemm::cuda {
namespace {

Tensor bit_planes_cuda(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t N, int64_t K,
                       int64_t bits, bool merged, bool wide, bool has_offsets, int64_t steps) {
  const Call call(x);
  BitPlanesProblem p = checked_planes(x, packed, N, K, bits, merged, wide, has_offsets, steps);
  Tensor y;
  p.io = make_io(x, bias, y, N, K);
  if (p.io.M == 0) return y;
  const Workspace workspace(bit_planes_workspace(p, call.gpu), x);
  p.workspace = workspace.data;
  bit_planes(p, call.gpu);
  return y;
}

}  // namespace

LUTGEMM_GPU_OPS(m) {
  m.def(
      "_bcq_bit_planes_cuda(Tensor x, Tensor packed, Tensor? bias, int N, int K, int bits, bool merged, bool wide, "
      "bool has_offsets, int steps) -> Tensor");
}

LUTGEMM_GPU_IMPL(m) { m.impl("_bcq_bit_planes_cuda", TORCH_BOX(&bit_planes_cuda)); }

}  // namespace lutgemm::cuda
