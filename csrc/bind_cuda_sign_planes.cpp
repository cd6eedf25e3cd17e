// BCQ on fp16 tensor cores with activations that are not rounded: every check that keeps the kernels inside their
// tensors.
#include "bind_cuda_planes.h"
#include "cuda/sign_planes.h"

namespace lutgemm::cuda {
namespace {

Tensor sign_planes_cuda(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t N, int64_t K,
                        int64_t bits, bool merged, bool wide, bool has_offsets, int64_t steps, int64_t accuracy) {
  const Call call(x);
  SignPlanesProblem p{checked_planes(x, packed, N, K, bits, merged, wide, has_offsets, steps),
                      requested_accuracy(accuracy)};
  Tensor y;
  p.weight.io = make_io(x, bias, y, N, K);
  if (p.weight.io.M == 0) return y;
  const Workspace workspace(sign_planes_workspace(p, call.gpu), x);
  p.weight.workspace = workspace.data;
  sign_planes(p, call.gpu);
  return y;
}

}  // namespace

LUTGEMM_GPU_OPS(m) {
  m.def(
      "_bcq_sign_planes_cuda(Tensor x, Tensor packed, Tensor? bias, int N, int K, int bits, bool merged, bool wide, "
      "bool has_offsets, int steps, int accuracy) -> Tensor");
}

LUTGEMM_GPU_IMPL(m) { m.impl("_bcq_sign_planes_cuda", TORCH_BOX(&sign_planes_cuda)); }

}  // namespace lutgemm::cuda
