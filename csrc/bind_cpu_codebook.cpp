// Codebook operators on the CPU: every check that keeps a kernel inside its tensors, then parallel loops over rows.
#include <algorithm>

#include "bind_cpu.h"
#include "cpu/codebook.h"

namespace lutgemm {
namespace {

using bind::check;
using bind::check_range;
using bind::check_tensor;
using bind::Tensor;

// Codes [num_codebooks, N, J], codebooks [num_codebooks, 2^codebook_bits, vec_len], scales [N, G] -> the weight.
CodebookWeight make_weight(const Tensor& codes, const Tensor& codebooks, const Tensor& scales, int64_t K,
                           int64_t group_size) {
  check_tensor(codes, "codes", {-1, -1, -1});
  check_tensor(codebooks, "codebooks", {-1, -1, -1});
  check_range("K", K, 1, kMaxFeatures);
  check_range("group_size", group_size, 1, kMaxFeatures);

  CodebookWeight w{};
  w.num_codebooks = int(std::min<int64_t>(codes.size(0), 5));
  check_range("codes.shape[0] (num_codebooks)", codes.size(0), 1, 4);
  w.N = codes.size(1);
  check_range("codes.shape[1] (N)", w.N, 1, kMaxFeatures);
  w.K = K;
  const int64_t entries = codebooks.size(1), vec_len = codebooks.size(2);
  check(vec_len == 2 || vec_len == 4 || vec_len == 8 || vec_len == 16, "codebooks: vec_len=", vec_len,
        ": must be 2, 4, 8 or 16");
  w.vec_len = int(vec_len);
  check(entries >= 2 && entries <= 4096 && (entries & (entries - 1)) == 0, "codebooks: ", entries,
        " centroids: must be a power of two from 2 to 4096");
  while ((int64_t(1) << w.codebook_bits) < entries) ++w.codebook_bits;
  check(group_size % vec_len == 0 || group_size >= K, "group_size=", group_size,
        ": must be a multiple of vec_len=", vec_len, " or at least K=", K);
  w.group_size = group_size;
  w.J = (K + vec_len - 1) / vec_len;
  w.G = (K + group_size - 1) / group_size;

  check_tensor(codes, "codes", {w.num_codebooks, w.N, w.J});
  check_tensor(codebooks, "codebooks", {w.num_codebooks, entries, vec_len});
  check_tensor(scales, "scales", {w.N, w.G});
  const auto code_type = w.codebook_bits <= 8 ? bind::ScalarType::Byte : bind::ScalarType::Short;
  check(codes.scalar_type() == code_type, "codes: must be ", w.codebook_bits <= 8 ? "uint8" : "int16", " for ", entries,
        " centroids");
  w.scale_dtype = bind::float_dtype(scales, "scales");
  check(bind::float_dtype(codebooks, "codebooks") == w.scale_dtype, "codebooks: must have the dtype of scales");
  w.codes = codes.const_data_ptr();
  w.codebooks = codebooks.const_data_ptr();
  w.scales = scales.const_data_ptr();
  return w;
}

// Of one block of rows and one token.
int64_t block_lookups(const PackedLayout& p) { return kBlockRows * p.J * p.num_codebooks; }

Tensor pack_weight(const CodebookWeight& w, const PackedLayout& p) {
  Tensor packed = bind::empty_prepared(p.total_bytes());
  void* data = packed.mutable_data_ptr();
  pack_codebooks(w, p, data);
  bind::for_ranges(p.blocks, block_lookups(p),
                   [&](int64_t begin, int64_t end) { pack_blocks(w, p, begin, end, data); });
  return packed;
}

Tensor pack_op(const Tensor& codes, const Tensor& codebooks, const Tensor& scales, int64_t K, int64_t group_size) {
  const CodebookWeight w = make_weight(codes, codebooks, scales, K, group_size);
  return pack_weight(w, packed_layout(w));
}

Tensor linear_op(const Tensor& x, const Tensor& codes, const Tensor& codebooks, const Tensor& scales,
                 const std::optional<Tensor>& bias, const std::optional<Tensor>& packed, int64_t group_size,
                 int64_t isa_number, int64_t accuracy_number) {
  check(x.dim() > 0, "x: got shape [], expected [..., K]");
  const Isa isa = bind::requested_isa(isa_number);
  const Accuracy accuracy = bind::requested_accuracy(accuracy_number);
  const CodebookWeight w = make_weight(codes, codebooks, scales, x.size(x.dim() - 1), group_size);
  const PackedLayout p = packed_layout(w);
  Tensor y;
  const Io io = bind::make_io(x, bias, y, w.N, w.K);
  if (io.M == 0) return y;
  if (packed) {
    check_tensor(*packed, "packed", {-1});
    check(packed->scalar_type() == bind::ScalarType::Byte, "packed: must be uint8");
    const char* mismatch = packed_mismatch(p, packed->const_data_ptr(), packed->size(0));
    check(reinterpret_cast<uintptr_t>(packed->const_data_ptr()) % alignof(float) == 0,
          "packed: starts at an odd address; make it with _codebook_pack_cpu");
    check(mismatch == nullptr, "packed: ", mismatch ? mismatch : "", "; make it with _codebook_pack_cpu");
  }
  const Tensor own = packed ? *packed : pack_weight(w, p);
  const void* data = own.const_data_ptr();
  // Every range makes all tables, so a thread gets one.
  bind::for_ranges(
      p.blocks, block_lookups(p) * io.M,
      [&](int64_t begin, int64_t end) { codegemm(p, data, io, isa, accuracy, begin, end); }, 1);
  return y;
}

Tensor dequantize_op(const Tensor& codes, const Tensor& codebooks, const Tensor& scales, int64_t K, int64_t group_size,
                     int64_t row_begin, int64_t row_end, bind::ScalarType scalar_type, int64_t isa_number) {
  const Isa isa = bind::requested_isa(isa_number);
  const CodebookWeight w = make_weight(codes, codebooks, scales, K, group_size);
  check_range("row_begin", row_begin, 0, w.N);
  check_range("row_end", row_end, row_begin, w.N);
  const DType dtype = bind::float_dtype(scalar_type, "dtype");
  Tensor out = bind::empty_cpu({row_end - row_begin, K}, dtype);
  char* data = static_cast<char*>(out.mutable_data_ptr());
  const int64_t row_bytes = K * (dtype == DType::kFloat32 ? 4 : 2);
  bind::for_ranges(row_end - row_begin, 8 * K, [&](int64_t begin, int64_t end) {
    codebook_dequantize(w, isa, row_begin + begin, row_begin + end, dtype, data + begin * row_bytes);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lutgemm, m) {
  m.def("_codebook_pack_cpu(Tensor codes, Tensor codebooks, Tensor scales, int K, int group_size) -> Tensor");
  m.def(
      "_codebook_linear_cpu(Tensor x, Tensor codes, Tensor codebooks, Tensor scales, Tensor? bias, Tensor? packed, "
      "int group_size, int isa, int accuracy) -> Tensor");
  m.def(
      "_codebook_dequantize_cpu(Tensor codes, Tensor codebooks, Tensor scales, int K, int group_size, int row_begin, "
      "int row_end, ScalarType dtype, int isa) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lutgemm, CPU, m) {
  m.impl("_codebook_pack_cpu", TORCH_BOX(&pack_op));
  m.impl("_codebook_linear_cpu", TORCH_BOX(&linear_op));
  m.impl("_codebook_dequantize_cpu", TORCH_BOX(&dequantize_op));
}

}  // namespace lutgemm
