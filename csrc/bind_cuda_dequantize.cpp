// Rows of W on the GPU, from the tensors of a record: every check that keeps the kernels inside them.
#include "bind_cuda.h"
#include "cuda/dequantize.h"

namespace lutgemm::cuda {
namespace {

DequantizeRows empty_rows(int64_t N, int64_t K, int64_t begin, int64_t end, ScalarType type, const Tensor& beside,
                          Tensor& out) {
  check_range("row_begin", begin, 0, N);
  check_range("row_end", end, begin, N);
  const DType dtype = float_dtype(type, "dtype");
  out = empty_like_x({end - begin, K}, type, beside);
  return DequantizeRows{begin, end, out.mutable_data_ptr(), dtype};
}

Tensor bcq_dequantize(const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& offsets,
                      const std::optional<Tensor>& zeros, int64_t K, int64_t group_size, bool uniform,
                      int64_t row_begin, int64_t row_end, ScalarType type) {
  const Call call(codes);
  check_range("K", K, 1, kMaxFeatures);
  check_range("group_size", group_size, 1, kMaxFeatures);
  check(group_size % 32 == 0 || group_size >= K, "group_size=", group_size, ": must be a multiple of 32, or K or more");
  check_tensor(codes, "codes", {-1, -1, ceil_div(K, 32)}, ScalarType::Int, codes);
  check_range("bits", codes.size(0), 1, 8);
  check_range("N", codes.size(1), 1, kMaxFeatures);
  check(uniform == zeros.has_value(), "zeros: the uniform kind needs them, the free kind has none");
  check(!(uniform && offsets), "offsets: the uniform kind has none");
  BcqWeight w{};
  w.N = codes.size(1), w.K = K, w.G = ceil_div(K, group_size), w.words = ceil_div(K, 32);
  w.group_size = group_size, w.bits = int(codes.size(0)), w.uniform = uniform;
  check_tensor(scales, "scales", {uniform ? 1 : w.bits, w.N, w.G}, codes);
  w.codes = static_cast<const uint32_t*>(codes.const_data_ptr());
  w.scales = scales.const_data_ptr();
  w.scale_dtype = float_dtype(scales, "scales");
  if (offsets) {
    check_tensor(*offsets, "offsets", {w.N, w.G}, codes);
    check(float_dtype(*offsets, "offsets") == w.scale_dtype, "offsets: must have the dtype of scales");
    w.offsets = offsets->const_data_ptr();
  }
  if (zeros) {
    check_tensor(*zeros, "zeros", {w.N, w.G}, codes);
    w.zeros_dtype = zeros->scalar_type() == ScalarType::Byte ? DType::kUInt8 : float_dtype(*zeros, "zeros");
    w.zeros = zeros->const_data_ptr();
  }
  Tensor out;
  dequantize_bcq(w, empty_rows(w.N, K, row_begin, row_end, type, codes, out), call.gpu);
  return out;
}

Tensor codebook_dequantize(const Tensor& codes, const Tensor& codebooks, const Tensor& scales, int64_t K,
                           int64_t group_size, int64_t row_begin, int64_t row_end, ScalarType type) {
  const Call call(codes);
  check_range("K", K, 1, kMaxFeatures);
  check_range("group_size", group_size, 1, kMaxFeatures);
  check_tensor(codebooks, "codebooks", {-1, -1, -1}, codes);
  const int64_t entries = codebooks.size(1), vec_len = codebooks.size(2);
  check_range("codebooks.shape[0] (num_codebooks)", codebooks.size(0), 1, 4);
  check(vec_len == 2 || vec_len == 4 || vec_len == 8 || vec_len == 16, "codebooks: vec_len=", vec_len,
        ": must be 2, 4, 8 or 16");
  check(entries >= 2 && entries <= 4096 && (entries & (entries - 1)) == 0, "codebooks: ", entries,
        " centroids: must be a power of two from 2 to 4096");
  check(group_size % vec_len == 0 || group_size >= K, "group_size=", group_size,
        ": must be a multiple of vec_len=", vec_len, " or at least K=", K);
  check(codes.dim() == 3, "codes: got shape ", shape_text(codes), ", expected [*, *, *]");
  CodebookWeight w{};
  w.N = codes.size(1), w.K = K, w.G = ceil_div(K, group_size), w.J = ceil_div(K, vec_len);
  w.group_size = group_size, w.num_codebooks = int(codebooks.size(0)), w.vec_len = int(vec_len);
  while ((int64_t(1) << w.codebook_bits) < entries) ++w.codebook_bits;
  check_range("N", w.N, 1, kMaxFeatures);
  const ScalarType code_type = w.codebook_bits <= 8 ? ScalarType::Byte : ScalarType::Short;
  check_tensor(codes, "codes", {w.num_codebooks, w.N, w.J}, code_type, codes);
  check_tensor(scales, "scales", {w.N, w.G}, codes);
  w.scale_dtype = float_dtype(scales, "scales");
  check(float_dtype(codebooks, "codebooks") == w.scale_dtype, "codebooks: must have the dtype of scales");
  w.codes = codes.const_data_ptr();
  w.codebooks = codebooks.const_data_ptr();
  w.scales = scales.const_data_ptr();
  Tensor out;
  dequantize_codebook(w, empty_rows(w.N, K, row_begin, row_end, type, codes, out), call.gpu);
  return out;
}

}  // namespace

LUTGEMM_GPU_OPS(m) {
  m.def(
      "_bcq_dequantize_cuda(Tensor codes, Tensor scales, Tensor? offsets, Tensor? zeros, int K, int group_size, "
      "bool uniform, int row_begin, int row_end, ScalarType dtype) -> Tensor");
  m.def(
      "_codebook_dequantize_cuda(Tensor codes, Tensor codebooks, Tensor scales, int K, int group_size, int row_begin, "
      "int row_end, ScalarType dtype) -> Tensor");
}

LUTGEMM_GPU_IMPL(m) {
  m.impl("_bcq_dequantize_cuda", TORCH_BOX(&bcq_dequantize));
  m.impl("_codebook_dequantize_cuda", TORCH_BOX(&codebook_dequantize));
}

}  // namespace lutgemm::cuda
