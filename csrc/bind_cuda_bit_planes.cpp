// BCQ on int8 tensor cores: every check that keeps the kernels inside their tensors.
#include "bind_cuda.h"
#include "cuda/bit_planes.h"

namespace lutgemm::cuda {
namespace {

Tensor bit_planes_cuda(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t N, int64_t K,
                       int64_t bits, bool merged, bool wide, bool has_offsets, int64_t steps) {
  const Call call(x);
  check_range("N", N, 1, kMaxFeatures);
  check_range("K", K, 1, kMaxFeatures);
  check_range("bits", bits, 1, 8);
  check(steps == 1 || steps == 2 || steps == 4, "steps=", steps, ": must be 1, 2 or 4");
  check(!(merged && has_offsets), "has_offsets: the uniform kind has none");
  BitPlanesProblem p{};
  p.tiles = ceil_div(N, kPlanesTileRows), p.chunks = ceil_div(K, kPlanesChunk);
  p.bits = int(bits), p.merged = merged, p.wide = wide, p.has_offsets = has_offsets, p.steps = int(steps);
  check_tensor(packed, "packed", {p.tiles, p.chunks, p.unit_words()}, ScalarType::Int, x);
  p.packed = static_cast<const uint32_t*>(packed.const_data_ptr());
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
