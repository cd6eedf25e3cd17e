// LUT-GEMM and BiQGEMM on the GPU: every check that keeps the kernels inside their tensors.
#include <algorithm>
#include <iterator>

#include "bind_cuda.h"
#include "cuda/lut.h"

namespace lutgemm::cuda {
namespace {

// Fills in the weight of a problem whose io is set.
void set_weight(LutProblem& p, const Tensor& codes, const Tensor& scales, const Tensor& scale_unit, int64_t group_size,
                bool uniform, const Tensor& x) {
  const int64_t K = p.io.K, tiles = ceil_div(p.io.N, kTileRows), units = ceil_div(K, kUnitInputs);
  check_range("group_size", group_size, 1, kMaxFeatures);
  check(group_size % kWordInputs == 0 || group_size >= K, "group_size=", group_size,
        ": must be a multiple of 32, or K or more");
  check_tensor(codes, "codes", {tiles, units, -1, kPlaneWords}, ScalarType::Int, x);
  check_range("bits", codes.size(2), 1, 8);
  check_tensor(scales, "scales", {tiles, units, -1, 4, -1, 4}, x);
  const DType scale_dtype = float_dtype(scales, "scales");
  check(scale_dtype != DType::kBFloat16, "scales: must be float16 or float32");
  check(!uniform || scale_dtype == DType::kFloat16, "scales: must be float16 in the uniform form");
  check_tensor(scale_unit, "scale_unit", {1}, ScalarType::Float, x);
  const int64_t terms = scales.size(2), slots = scales.size(4), planes = codes.size(2);
  check(uniform ? terms == 2 : terms == planes || terms == planes + 1, "scales: ", terms, " terms for ", planes,
        " planes");
  for (int64_t unit = 0; unit < units; ++unit) {
    const int64_t first = unit * kUnitInputs, last = std::min(first + kUnitInputs, K) - 1;
    check(last / group_size - first / group_size < slots, "scales: unit ", unit, " touches more than ", slots,
          " groups");
  }
  p.codes = static_cast<const uint32_t*>(codes.const_data_ptr());
  p.scales = scales.const_data_ptr();
  p.scale_unit = static_cast<const float*>(scale_unit.const_data_ptr());
  p.group_size = group_size;
  p.bits = int(planes), p.slots = int(slots);
  p.uniform = uniform, p.offsets = uniform || terms > planes, p.wide_scales = scale_dtype == DType::kFloat32;
}

template <int64_t (*workspace_of)(const LutProblem&, const Gpu&), void (*launcher)(const LutProblem&, const Gpu&)>
Tensor lut_linear(const Tensor& x, const Tensor& codes, const Tensor& scales, const Tensor& scale_unit,
                  const std::optional<Tensor>& bias, int64_t N, int64_t group_size, bool uniform, int64_t accuracy) {
  const Call call(x);
  check(x.dim() == 2, "x: got shape ", shape_text(x), ", expected [M, K]");
  Tensor y;
  LutProblem problem{};
  problem.io = make_io(x, bias, y, N, x.size(1));
  problem.accuracy = requested_accuracy(accuracy);
  set_weight(problem, codes, scales, scale_unit, group_size, uniform, x);
  if (problem.io.M == 0) return y;
  const Workspace workspace(workspace_of(problem, call.gpu), x);
  problem.workspace = workspace.data;
  launcher(problem, call.gpu);
  return y;
}

#ifdef LUTGEMM_EMULATED
// For tests: int64 [row_blocks, strips_per_block, splits, tables_per_split, token_blocks, resident, tokens, inputs,
// strip_rows, bytes of shared memory of a block].
Tensor plan(const Tensor& x, int64_t N, int64_t bits, bool biqgemm, int64_t accuracy, int64_t sm_count,
            int64_t shared_bytes) {
  LutProblem problem{};
  problem.io.M = x.size(0), problem.io.N = N, problem.io.K = x.size(1);
  problem.accuracy = requested_accuracy(accuracy);
  Gpu gpu{};
  gpu.sm_count = int(sm_count), gpu.shared_bytes = int(shared_bytes);
  const LutTables tables = biqgemm ? biqgemm_tables(problem) : lut_gemm_tables(problem);
  const LutPlan made = plan_lut(problem.io, int(bits), tables, gpu);
  const int64_t facts[] = {made.row_blocks,   made.strips_per_block,
                           made.splits,       made.tables_per_split,
                           made.token_blocks, made.resident,
                           tables.tokens,     tables.inputs,
                           tables.strip_rows, tables.shared_bytes(made.strips_per_block)};
  Tensor out = empty_like_x({int64_t(std::size(facts))}, ScalarType::Long, x);
  std::copy(std::begin(facts), std::end(facts), static_cast<int64_t*>(out.mutable_data_ptr()));
  return out;
}
#endif

}  // namespace

LUTGEMM_GPU_OPS(m) {
  m.def(
      "_bcq_lut_gemm_cuda(Tensor x, Tensor codes, Tensor scales, Tensor scale_unit, Tensor? bias, int N, "
      "int group_size, bool uniform, int accuracy) -> Tensor");
  m.def(
      "_bcq_biqgemm_cuda(Tensor x, Tensor codes, Tensor scales, Tensor scale_unit, Tensor? bias, int N, "
      "int group_size, bool uniform, int accuracy) -> Tensor");
#ifdef LUTGEMM_EMULATED
  m.def("_lut_plan(Tensor x, int N, int bits, bool biqgemm, int accuracy, int sm_count, int shared_bytes) -> Tensor");
#endif
}

LUTGEMM_GPU_IMPL(m) {
  m.impl("_bcq_lut_gemm_cuda", TORCH_BOX((&lut_linear<lut_gemm_workspace, lut_gemm>)));
  m.impl("_bcq_biqgemm_cuda", TORCH_BOX((&lut_linear<biqgemm_workspace, biqgemm>)));
#ifdef LUTGEMM_EMULATED
  m.impl("_lut_plan", TORCH_BOX(&plan));
#endif
}

}  // namespace lutgemm::cuda
