// Kernels for codebook weights on the GPU: every check that keeps them inside the tensors of their layouts, which
// lutgemm/backends/gpu_layouts/codebook.py makes.
#include "bind_cuda.h"
#include "cuda/codebook_mma.h"
#include "cuda/codegemm.h"

namespace lutgemm::cuda {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;

// ends: the row behind the last of each of several siblings, or none for one weight.
Siblings check_siblings(const IntHeaderOnlyArrayRef& ends, int64_t N) {
  Siblings siblings;
  if (ends.empty()) return siblings;
  check(ends.size() <= size_t(kMostSiblings), "ends: got ", ends.size(), " of them, expected up to ", kMostSiblings);
  siblings.count = int(ends.size());
  int64_t before = 0;
  for (int i = 0; i < siblings.count; ++i) {
    const bool fits = i + 1 < siblings.count ? ends[i] < N && ends[i] % kSiblingRows == 0 : ends[i] == N;
    check(fits && ends[i] > before, "ends[", i, "]=", ends[i], ": must be ascending multiples of ", kSiblingRows,
          ", and the last one N=", N);
    siblings.ends[i] = before = ends[i];
  }
  return siblings;
}

// codebooks [siblings * num_codebooks, 2^codebook_bits, vec_len]; returns codebook_bits.
int check_codebooks(const Tensor& codebooks, int siblings, int64_t most_codebooks, int64_t most_bits, int64_t K,
                    int64_t group_size, const Tensor& x) {
  check_tensor(codebooks, "codebooks", {-1, -1, -1}, x);
  const int64_t entries = codebooks.size(1), vec_len = codebooks.size(2);
  check_range("K", K, 1, kMaxFeatures);
  check_range("group_size", group_size, 1, kMaxFeatures);
  check(codebooks.size(0) % siblings == 0, "codebooks: got ", codebooks.size(0), " for ", siblings, " siblings");
  check_range("codebooks.shape[0] (num_codebooks)", codebooks.size(0) / siblings, 1, most_codebooks);
  check(vec_len == 2 || vec_len == 4 || vec_len == 8 || vec_len == 16, "codebooks: vec_len=", vec_len,
        ": must be 2, 4, 8 or 16");
  check(entries >= 2 && entries <= int64_t(1) << most_bits && (entries & (entries - 1)) == 0, "codebooks: ", entries,
        " centroids: must be a power of two from 2 to ", int64_t(1) << most_bits);
  check(group_size % vec_len == 0 || group_size >= K, "group_size=", group_size,
        ": must be a multiple of vec_len=", vec_len, " or at least K=", K);
  int bits = 0;
  while ((int64_t(1) << bits) < entries) ++bits;
  return bits;
}

Tensor codegemm_op(const Tensor& x, const Tensor& codes, const Tensor& scales, const Tensor& codebooks,
                   const Tensor& norms, const std::optional<Tensor>& bias, int64_t N, int64_t group_size,
                   int64_t accuracy, IntHeaderOnlyArrayRef ends) {
  const Call call(x);
  check(x.dim() == 2, "x: got shape ", shape_text(x), ", expected [M, K]");
  check_range("N", N, 1, kMaxFeatures);
  const int64_t K = x.size(1);
  CodegemmProblem p{};
  p.siblings = check_siblings(ends, N);
  p.codebook_bits = check_codebooks(codebooks, p.siblings.count, 4, 12, K, group_size, x);
  p.num_codebooks = int(codebooks.size(0)) / p.siblings.count, p.vec_len = int(codebooks.size(2)),
  p.group_size = group_size;
  p.accuracy = requested_accuracy(accuracy);
  const CodegemmUnits units = codegemm_units(K, group_size, p.num_codebooks, p.vec_len);
  const int64_t rows = round_up(N, kChunkRows);
  if (p.codebook_bits > 8) {
    check_tensor(codes, "codes", {units.units, rows, kUnitColumns}, ScalarType::Short, x);
  } else {
    check_tensor(codes, "codes", {ceil_div(units.units, 32), rows / 4, 32, 4, kUnitColumns}, ScalarType::Byte, x);
  }
  p.float_scales = scales.scalar_type() == ScalarType::Float;
  check(p.float_scales || (p.codebook_bits <= 8 && p.num_codebooks != 3),
        "scales: codes of more than 8 bits, and 3 codebooks, take fp32 scales");
  check_tensor(scales, "scales", {units.groups, rows}, p.float_scales ? ScalarType::Float : ScalarType::Half, x);
  check_tensor(codebooks, "codebooks", {-1, -1, -1}, p.float_scales ? ScalarType::Float : ScalarType::Half, x);
  check(p.float_scales || p.codebook_bits >= 3, "codebooks: fp16 ones must have at least 8 centroids");
  check_tensor(norms, "norms", {p.siblings.count * (2 * p.num_codebooks + 1)}, ScalarType::Float, x);
  p.codes = codes.const_data_ptr();
  p.scales = scales.const_data_ptr();
  p.codebooks = codebooks.const_data_ptr();
  p.norms = static_cast<const float*>(norms.const_data_ptr());
  Tensor y;
  p.io = make_io(x, bias, y, N, K);
  if (p.io.M == 0) return y;
  const Workspace workspace(codegemm_workspace(p, call.gpu), x);
  p.workspace = workspace.data;
  codegemm(p, call.gpu);
  return y;
}

Tensor codebook_mma_op(const Tensor& x, const Tensor& codes, const Tensor& scales, const Tensor& tables,
                       const std::optional<Tensor>& half_tables, const Tensor& units, const std::optional<Tensor>& bias,
                       int64_t N, int64_t group_size, IntHeaderOnlyArrayRef ends) {
  const Call call(x);
  check(x.dim() == 2, "x: got shape ", shape_text(x), ", expected [M, K]");
  check(x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16,
        "x: must be float16 or bfloat16");
  check_range("N", N, 1, kMaxFeatures);
  const int64_t K = x.size(1);
  CodebookMmaProblem p{};
  p.siblings = check_siblings(ends, N);
  p.codebook_bits = check_codebooks(tables, p.siblings.count, 12, 8, K, group_size, x);
  p.planes = int(tables.size(0)) / p.siblings.count, p.vec_len = int(tables.size(2)), p.group_size = group_size;
  const MmaSteps steps = mma_steps(K, group_size, p.planes, p.vec_len);
  const int64_t tiles = ceil_div(N, kMmaTileRows);
  check_tensor(codes, "codes", {2 * tiles, steps.chunks, 32, kChunkItems, 2}, ScalarType::Byte, x);
  p.float_scales = scales.scalar_type() == ScalarType::Float;
  check_tensor(scales, "scales", {tiles, steps.groups, 4, 4, 2}, p.float_scales ? ScalarType::Float : ScalarType::Half,
               x);
  check_tensor(tables, "tables", {-1, -1, -1}, x.scalar_type(), x);
  check_tensor(units, "units", {3 * p.siblings.count}, ScalarType::Float, x);
  p.codes = codes.const_data_ptr();
  p.scales = scales.const_data_ptr();
  p.tables = tables.const_data_ptr();
  p.units = static_cast<const float*>(units.const_data_ptr());
  if (half_tables) {
    check_tensor(*half_tables, "half_tables", {tables.size(0), tables.size(1), tables.size(2)}, ScalarType::Half, x);
    p.half_tables = half_tables->const_data_ptr();
  }
  Tensor y;
  p.io = make_io(x, bias, y, N, K);
  if (p.io.M == 0) return y;
  const Workspace workspace(codebook_mma_workspace(p, call.gpu), x);
  p.workspace = workspace.data;
  codebook_mma(p, call.gpu);
  return y;
}

#ifdef LUTGEMM_EMULATED
// How the kernels would cut x times a weight [N, K], for tests: launches nothing. Tensors of int64.
Tensor numbers(std::initializer_list<int64_t> values) {
  const int64_t count = int64_t(values.size());
  Tensor out = torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(&count, 1), ScalarType::Long, std::nullopt,
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU));
  std::copy(values.begin(), values.end(), static_cast<int64_t*>(out.mutable_data_ptr()));
  return out;
}

// [word, tokens of a pass, splits, row_blocks, shared bytes, workspace bytes]
Tensor codegemm_plan_op(const Tensor& x, int64_t N, int64_t group_size, int64_t num_codebooks, int64_t vec_len,
                        int64_t codebook_bits, int64_t accuracy, bool float_scales, int64_t sm_count,
                        int64_t shared_limit) {
  CodegemmProblem p{};
  p.io.M = x.size(0), p.io.N = N, p.io.K = x.size(1);
  p.group_size = group_size, p.num_codebooks = int(num_codebooks), p.vec_len = int(vec_len);
  p.codebook_bits = int(codebook_bits), p.accuracy = requested_accuracy(accuracy), p.float_scales = float_scales;
  Gpu gpu{};
  gpu.sm_count = int(sm_count), gpu.shared_bytes = int(shared_limit);
  const CodegemmPlan plan = plan_codegemm(p, gpu);
  return numbers(
      {int64_t(plan.word), plan.tokens, plan.splits, plan.row_blocks, plan.shared_bytes, codegemm_workspace(p, gpu)});
}

// [octets, splits, split_chunks, chunks, blocks, copies, table bytes, x bytes, sum bytes]
Tensor codebook_mma_plan_op(const Tensor& x, int64_t N, int64_t group_size, int64_t planes, int64_t vec_len,
                            int64_t codebook_bits, int64_t sm_count, int64_t shared_limit) {
  CodebookMmaProblem p{};
  p.io.M = x.size(0), p.io.N = N, p.io.K = x.size(1);
  p.group_size = group_size, p.planes = int(planes), p.vec_len = int(vec_len), p.codebook_bits = int(codebook_bits);
  const CodebookMmaPlan plan = plan_codebook_mma(p, int(sm_count), int(shared_limit));
  const MmaSteps steps = mma_steps(p.io.K, group_size, p.planes, p.vec_len);
  return numbers({plan.octets, plan.splits, plan.split_chunks, steps.chunks, plan.blocks, plan.copies, plan.table_bytes,
                  plan.x_bytes, plan.sum_bytes});
}

// [token_blocks, row_blocks, splits, split_chunks, chunks, stage_chunks, copies, table bytes, stage bytes]
Tensor codebook_gemm_plan_op(const Tensor& x, int64_t N, int64_t group_size, int64_t planes, int64_t vec_len,
                             int64_t codebook_bits, int64_t sm_count, int64_t shared_limit) {
  CodebookMmaProblem p{};
  p.io.M = x.size(0), p.io.N = N, p.io.K = x.size(1);
  p.group_size = group_size, p.planes = int(planes), p.vec_len = int(vec_len), p.codebook_bits = int(codebook_bits);
  const CodebookGemmPlan plan = plan_codebook_gemm(p, int(sm_count), int(shared_limit));
  const MmaSteps steps = mma_steps(p.io.K, p.group_size, p.planes, p.vec_len);
  return numbers({plan.token_blocks, plan.row_blocks, plan.splits, plan.split_chunks, steps.chunks, plan.stage_chunks,
                  plan.copies, plan.table_bytes, plan.stage_bytes});
}
#endif

}  // namespace

LUTGEMM_GPU_OPS(m) {
  m.def(
      "_codebook_codegemm_cuda(Tensor x, Tensor codes, Tensor scales, Tensor codebooks, Tensor norms, Tensor? bias, "
      "int N, int group_size, int accuracy, int[] ends=[]) -> Tensor");
  m.def(
      "_codebook_codebook_mma_cuda(Tensor x, Tensor codes, Tensor scales, Tensor tables, Tensor? half_tables, "
      "Tensor units, Tensor? bias, int N, int group_size, int[] ends=[]) -> Tensor");
#ifdef LUTGEMM_EMULATED
  m.def(
      "_codegemm_plan(Tensor x, int N, int group_size, int num_codebooks, int vec_len, int codebook_bits, "
      "int accuracy, bool float_scales, int sm_count, int shared_limit) -> Tensor");
  m.def(
      "_codebook_mma_plan(Tensor x, int N, int group_size, int planes, int vec_len, int codebook_bits, int sm_count, "
      "int shared_limit) -> Tensor");
  m.def(
      "_codebook_gemm_plan(Tensor x, int N, int group_size, int planes, int vec_len, int codebook_bits, int sm_count, "
      "int shared_limit) -> Tensor");
#endif
}

LUTGEMM_GPU_IMPL(m) {
  m.impl("_codebook_codegemm_cuda", TORCH_BOX(&codegemm_op));
  m.impl("_codebook_codebook_mma_cuda", TORCH_BOX(&codebook_mma_op));
#ifdef LUTGEMM_EMULATED
  m.impl("_codegemm_plan", TORCH_BOX(&codegemm_plan_op));
  m.impl("_codebook_mma_plan", TORCH_BOX(&codebook_mma_plan_op));
  m.impl("_codebook_gemm_plan", TORCH_BOX(&codebook_gemm_plan_op));
#endif
}

}  // namespace lutgemm::cuda
