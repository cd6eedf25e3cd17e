// The BCQ operators of the CPU: every argument checked, tensors -> params, work shared among threads.
#include <algorithm>

#include "bind_cpu.h"
#include "cpu/bcq.h"
#include "cpu/byte_kernels.h"
#include "cpu/tile_gemm.h"

namespace lutgemm::bind {
namespace {

struct BcqTensors {
  const Tensor &codes, &scales;
  const std::optional<Tensor>&offsets, &zeros;
};

BcqWeight bcq_weight(const BcqTensors& t, int64_t K, int64_t group_size, bool uniform) {
  check_range("K", K, 1, kMaxFeatures);
  check_range("group_size", group_size, 1, kMaxFeatures);
  check(group_size % 32 == 0 || group_size >= K, "group_size=", group_size, ": must be a multiple of 32, or K or more");
  check_tensor(t.codes, "codes", {-1, -1, (K + 31) / 32});
  check(t.codes.scalar_type() == ScalarType::Int, "codes: must be int32");
  BcqWeight w{};
  w.N = t.codes.size(1);
  w.K = K;
  w.G = (K + group_size - 1) / group_size;
  w.words = (K + 31) / 32;
  w.group_size = group_size;
  w.uniform = uniform;
  check_range("bits", t.codes.size(0), 1, kMaxBits);
  check_range("N", w.N, 1, kMaxFeatures);
  w.bits = int(t.codes.size(0));
  check_tensor(t.scales, "scales", {uniform ? 1 : w.bits, w.N, w.G});
  w.scale_dtype = float_dtype(t.scales, "scales");
  w.codes = static_cast<const uint32_t*>(t.codes.const_data_ptr());
  w.scales = t.scales.const_data_ptr();
  check(uniform == t.zeros.has_value(), "zeros: the uniform kind needs them, the free kind has none");
  check(!(uniform && t.offsets), "offsets: the uniform kind has none");
  if (t.offsets) {
    check_tensor(*t.offsets, "offsets", {w.N, w.G});
    check(float_dtype(*t.offsets, "offsets") == w.scale_dtype, "offsets: must have the dtype of scales");
    w.offsets = t.offsets->const_data_ptr();
  }
  if (t.zeros) {
    check_tensor(*t.zeros, "zeros", {w.N, w.G});
    w.zeros_dtype = t.zeros->scalar_type() == ScalarType::Byte ? DType::kUInt8 : float_dtype(*t.zeros, "zeros");
    w.zeros = t.zeros->const_data_ptr();
  }
  return w;
}

Tensor pack_bytes(const BcqWeight& weight, bool folded) {
  const PackedBytes layout = byte_layout(weight.N, weight.K, weight.group_size, weight.bits, weight.uniform,
                                         weight.offsets != nullptr, weight.scale_dtype, weight.zeros_dtype, folded);
  Tensor packed = empty_prepared(byte_layout_bytes(layout));
  auto* out = static_cast<uint8_t*>(packed.mutable_data_ptr());
  write_byte_header(layout, out);
  const int64_t chunk_lookups = layout.chunk_blocks * kByteRows * layout.slices * weight.bits;
  for_ranges(layout.chunks, chunk_lookups,
             [&](int64_t begin, int64_t end) { pack_byte_chunks(weight, layout, begin, end, out); });
  return packed;
}

Tensor bcq_pack_cpu(const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& offsets,
                    const std::optional<Tensor>& zeros, int64_t K, int64_t group_size, bool uniform, bool bytes,
                    bool folded) {
  const BcqWeight weight = bcq_weight({codes, scales, offsets, zeros}, K, group_size, uniform);
  if (bytes) return pack_bytes(weight, folded);
  const PackedBcq layout =
      packed_layout(weight.N, K, group_size, weight.bits, uniform, weight.offsets != nullptr, weight.scale_dtype);
  Tensor packed = empty_prepared(packed_bytes(layout));
  auto* out = static_cast<uint8_t*>(packed.mutable_data_ptr());
  write_packed_header(layout, out);
  for_ranges(layout.row_blocks, kRowBlock * weight.words * weight.bits,
             [&](int64_t begin, int64_t end) { pack_row_blocks(weight, layout, begin, end, out); });
  return packed;
}

void run_lut_gemm(const PackedBcq& weight, Isa isa, const Io& io) {
  TokenTables token = make_token_tables(weight, isa);
  const int64_t row_block_lookups = kRowBlock * weight.words * 8 * weight.bits;
  for (int64_t m = 0; m < io.M; ++m) {
    for_ranges(weight.words, 8 * 16,
               [&](int64_t begin, int64_t end) { prepare_words(weight, isa, io, m, begin, end, token); });
    prepare_sums(weight, token);
    for_ranges(weight.row_blocks, row_block_lookups,
               [&](int64_t begin, int64_t end) { lut_gemm_rows(weight, isa, io, m, token, begin, end); });
  }
}

void run_biqgemm(const PackedBcq& weight, Isa isa, const Io& io) {
  const int64_t lookups = kRowBlock * weight.words * 8 * weight.bits * io.M;
  for_ranges(weight.row_blocks, lookups,
             [&](int64_t begin, int64_t end) { biqgemm_rows(weight, isa, io, begin, end); });
}

// `tokens_at_once` at a time: tables of all of K, then the rows past them.
template <class Rows>
void run_byte_kernel(const PackedBytes& weight, Isa isa, Accuracy accuracy, bool words, const Io& io,
                     int64_t tokens_at_once, int64_t chunk_lookups, const Rows& rows) {
  for (int64_t m = 0; m < io.M; m += tokens_at_once) {
    const int64_t count = std::min(io.M - m, tokens_at_once);
    ByteTokens tokens = make_byte_tokens(weight, isa, accuracy, words, m, count);
    // Building a slice's table takes about as long as 512 look-ups of rows in it.
    for_ranges(weight.spans, kSpanSlices * 512 * count,
               [&](int64_t begin, int64_t end) { prepare_spans(weight, accuracy, words, io, begin, end, tokens); });
    for_ranges(weight.chunks, chunk_lookups * count, [&](int64_t begin, int64_t end) { rows(tokens, begin, end); });
  }
}

void run_bytes(const PackedBytes& weight, Isa isa, Accuracy accuracy, bool biqgemm, const Io& io) {
  const int64_t chunk_lookups = weight.chunk_blocks * kByteRows * weight.slices * weight.bits;
  if (uses_words(isa, accuracy, biqgemm)) {
    run_byte_kernel(
        weight, isa, accuracy, true, io, kWordTokens, chunk_lookups,
        [&](const ByteTokens& tokens, int64_t begin, int64_t end) { biqgemm_chunks(weight, io, tokens, begin, end); });
  } else {
    run_byte_kernel(weight, isa, accuracy, false, io, kByteTokens, chunk_lookups,
                    [&](const ByteTokens& tokens, int64_t begin, int64_t end) {
                      lut_gemm_chunks(weight, accuracy, io, tokens, begin, end);
                    });
  }
}

Tensor bytes_linear(const Tensor& x, const uint8_t* packed, int64_t bytes, const std::optional<Tensor>& bias, int64_t N,
                    bool biqgemm, Isa isa, Accuracy accuracy) {
  const ByteKernels* kernels = byte_kernels(isa);
  check(accuracy != Accuracy::kExact, "packed: it is laid out for integer tables, accuracy=3 (exact) was asked for");
  PackedBytes weight;
  const char* fault = parse_byte_layout(packed, bytes, &weight);
  check(fault == nullptr, "packed: ", fault ? fault : "", "; make it with lutgemm::_bcq_pack_cpu");
  check(kernels != nullptr && kernels->folded == weight.folded, "packed: its codes are ",
        weight.folded ? "folded, for isa=3 (avx512vbmi)" : "plain, for kernels that look up nibbles",
        "; isa=", int(isa), " was asked for");
  check(weight.N == N, "packed: it holds N=", weight.N, ", N=", N, " was asked for");
  Tensor y;
  const Io io = make_io(x, bias, y, weight.N, weight.K);
  if (io.M > 0) run_bytes(weight, isa, accuracy, biqgemm, io);
  return y;
}

Tensor bcq_linear_cpu(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t N, bool biqgemm,
                      int64_t isa_number, int64_t accuracy_number) {
  const Isa isa = requested_isa(isa_number);
  const Accuracy accuracy = requested_accuracy(accuracy_number);
  check_tensor(packed, "packed", {-1});
  check(packed.scalar_type() == ScalarType::Byte, "packed: must be uint8");
  const auto* data = static_cast<const uint8_t*>(packed.const_data_ptr());
  if (is_byte_layout(data, packed.numel())) {
    return bytes_linear(x, data, packed.numel(), bias, N, biqgemm, isa, accuracy);
  }
  PackedBcq weight;
  const char* fault = parse_packed(data, packed.numel(), &weight);
  check(fault == nullptr, "packed: ", fault ? fault : "", "; make it with lutgemm::_bcq_pack_cpu");
  check(weight.N == N, "packed: it holds N=", weight.N, ", N=", N, " was asked for");
  Tensor y;
  const Io io = make_io(x, bias, y, weight.N, weight.K);
  if (io.M == 0) return y;
  biqgemm ? run_biqgemm(weight, isa, io) : run_lut_gemm(weight, isa, io);
  return y;
}

// Tiles of W dequantized in cache, with the errors of "fast" or of "accurate".
Tensor bcq_tile_gemm_cpu(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t N,
                         int64_t accuracy_number) {
  const Accuracy accuracy = requested_accuracy(accuracy_number);
  check(accuracy <= Accuracy::kAccurate, "accuracy=", accuracy_number, ": must be 0 (fast) or 1 (accurate)");
  check_tensor(packed, "packed", {-1});
  check(packed.scalar_type() == ScalarType::Byte, "packed: must be uint8");
  PackedBytes weight;
  const char* fault = parse_byte_layout(static_cast<const uint8_t*>(packed.const_data_ptr()), packed.numel(), &weight);
  check(fault == nullptr, "packed: ", fault ? fault : "", "; make it with lutgemm::_bcq_pack_cpu");
  check(weight.folded, "packed: its codes are plain, this kernel reads folded ones");
  check(weight.N == N, "packed: it holds N=", weight.N, ", N=", N, " was asked for");
  check(cpu_isa() >= Isa(kLastIsa) && LUTGEMM_X86, "this CPU lacks what the kernel needs: avx512vbmi");
  Tensor y;
  const Io io = make_io(x, bias, y, weight.N, weight.K);
#if LUTGEMM_X86
  // In look-ups of 8 k, several of which take as long as these products of a token.
  const int64_t token_work = 4 * weight.chunk_blocks * kByteRows * weight.slices;
  for (int64_t m = 0; m < io.M; m += kTileTokens) {
    TileTokensX tokens = make_tile_tokens(weight, accuracy, m, std::min(io.M - m, kTileTokens));
    for_ranges(weight.spans, kSpanSlices * 8 * tokens.count,
               [&](int64_t begin, int64_t end) { prepare_tile_spans(weight, io, begin, end, tokens); });
    for_ranges(weight.chunks, token_work * tokens.count,
               [&](int64_t begin, int64_t end) { tile_gemm_chunks(weight, io, tokens, begin, end); });
  }
#endif
  return y;
}

Tensor bcq_dequantize_cpu(const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& offsets,
                          const std::optional<Tensor>& zeros, int64_t K, int64_t group_size, bool uniform,
                          int64_t row_begin, int64_t row_end, ScalarType scalar_type, int64_t isa_number) {
  const Isa isa = requested_isa(isa_number);
  const DType dtype = float_dtype(scalar_type, "dtype");
  const BcqWeight weight = bcq_weight({codes, scales, offsets, zeros}, K, group_size, uniform);
  check_range("row_begin", row_begin, 0, weight.N);
  check_range("row_end", row_end, row_begin, weight.N);
  Tensor out = empty_cpu({row_end - row_begin, K}, dtype);
  auto* data = static_cast<uint8_t*>(out.mutable_data_ptr());
  const int64_t row_bytes = K * int64_t(out.element_size());
  for_ranges(row_end - row_begin, K * weight.bits, [&](int64_t begin, int64_t end) {
    bcq_dequantize_rows(weight, isa, row_begin + begin, row_begin + end, dtype, data + begin * row_bytes);
  });
  return out;
}

int64_t best_cpu_isa() { return int64_t(cpu_isa()); }

}  // namespace
}  // namespace lutgemm::bind

STABLE_TORCH_LIBRARY_FRAGMENT(lutgemm, m) {
  m.def("_cpu_isa() -> int");
  m.def(
      "_bcq_pack_cpu(Tensor codes, Tensor scales, Tensor? offsets, Tensor? zeros, int K, int group_size, bool uniform, "
      "bool bytes, bool folded=True) -> Tensor");
  m.def("_bcq_linear_cpu(Tensor x, Tensor packed, Tensor? bias, int N, bool biqgemm, int isa, int accuracy) -> Tensor");
  m.def("_bcq_tile_gemm_cpu(Tensor x, Tensor packed, Tensor? bias, int N, int accuracy) -> Tensor");
  m.def(
      "_bcq_dequantize_cpu(Tensor codes, Tensor scales, Tensor? offsets, Tensor? zeros, int K, int group_size, "
      "bool uniform, int row_begin, int row_end, ScalarType dtype, int isa) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lutgemm, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&lutgemm::bind::best_cpu_isa));
}

STABLE_TORCH_LIBRARY_IMPL(lutgemm, CPU, m) {
  m.impl("_bcq_pack_cpu", TORCH_BOX(&lutgemm::bind::bcq_pack_cpu));
  m.impl("_bcq_linear_cpu", TORCH_BOX(&lutgemm::bind::bcq_linear_cpu));
  m.impl("_bcq_tile_gemm_cpu", TORCH_BOX(&lutgemm::bind::bcq_tile_gemm_cpu));
  m.impl("_bcq_dequantize_cpu", TORCH_BOX(&lutgemm::bind::bcq_dequantize_cpu));
}
