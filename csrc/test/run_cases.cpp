// Runs the CPU kernels on cases from a file, without torch: for instruction sets of other machines, under an emulator.
//
//   run_cases CASES RESULTS
//
// CASES is a list of { int64 [kFields]; x, bias, codes, scales, extra: each int64 bytes, then so many bytes }, RESULTS
// a list of { int64 bytes; y }. extra: offsets or zeros of a BCQ weight, codebooks of a codebook weight. Little-endian.
// Fields and enumerations are trusted: tests/test_neon.py writes them.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <vector>

#include "../cpu/bcq.h"
#include "../cpu/byte_kernels.h"
#include "../cpu/codebook.h"
#include "../cpu/convert.h"
#include "../cpu/isa.h"

namespace lutgemm {
namespace {

enum Field {
  kKernel,
  kM,
  kN,
  kK,
  kGroupSize,
  kBits,  // or codebook_bits
  kUniform,
  kHasOffsets,
  kNumCodebooks,
  kVecLen,
  kXType,
  kScaleType,
  kZerosType,
  kIsa,
  kAccuracy,
  kFields
};
enum Kernel { kLutGemm, kBiqgemm, kDequantizeBcq, kCodegemm, kDequantizeCodebook };

// Bytes at an address that no vector is aligned to by chance.
struct Blob {
  std::vector<uint8_t> bytes;

  const void* data() const { return bytes.empty() ? nullptr : bytes.data(); }
};

struct Case {
  int64_t field[kFields];
  Blob x, bias, codes, scales, extra;

  DType dtype(Field f) const { return DType(field[f]); }
};

bool read(std::ifstream& in, void* to, int64_t bytes) {
  return bool(in.read(static_cast<char*>(to), std::streamsize(bytes)));
}

void read_blob(std::ifstream& in, Blob& blob) {
  int64_t bytes = 0;
  if (!read(in, &bytes, sizeof bytes)) throw std::runtime_error("the file of cases ends within a case");
  blob.bytes.resize(size_t(bytes));
  if (!read(in, blob.bytes.data(), bytes)) throw std::runtime_error("the file of cases ends within a case");
}

BcqWeight bcq_weight(const Case& c) {
  const int64_t K = c.field[kK], group_size = c.field[kGroupSize];
  BcqWeight w{};
  w.N = c.field[kN];
  w.K = K;
  w.G = (K + group_size - 1) / group_size;
  w.words = (K + 31) / 32;
  w.group_size = group_size;
  w.bits = int(c.field[kBits]);
  w.uniform = c.field[kUniform] != 0;
  w.codes = static_cast<const uint32_t*>(c.codes.data());
  w.scales = c.scales.data();
  w.scale_dtype = c.dtype(kScaleType);
  if (c.field[kHasOffsets]) w.offsets = c.extra.data();
  if (w.uniform) w.zeros = c.extra.data();
  w.zeros_dtype = c.dtype(kZerosType);
  return w;
}

CodebookWeight codebook_weight(const Case& c) {
  const int64_t K = c.field[kK], group_size = c.field[kGroupSize];
  CodebookWeight w{};
  w.N = c.field[kN];
  w.K = K;
  w.group_size = group_size;
  w.num_codebooks = int(c.field[kNumCodebooks]);
  w.vec_len = int(c.field[kVecLen]);
  w.codebook_bits = int(c.field[kBits]);
  w.G = (K + group_size - 1) / group_size;
  w.J = (K + w.vec_len - 1) / w.vec_len;
  w.codes = c.codes.data();
  w.codebooks = c.extra.data();
  w.scales = c.scales.data();
  w.scale_dtype = c.dtype(kScaleType);
  return w;
}

void run_bytes(const BcqWeight& w, Isa isa, Accuracy accuracy, bool biqgemm, const Io& io) {
  const bool folded = byte_kernels(isa)->folded;
  const PackedBytes layout = byte_layout(w.N, w.K, w.group_size, w.bits, w.uniform, w.offsets != nullptr, w.scale_dtype,
                                         w.zeros_dtype, folded);
  const int64_t bytes = byte_layout_bytes(layout);
  const Scratch<uint8_t> packed = make_scratch<uint8_t>(bytes);
  write_byte_header(layout, packed.get());
  pack_byte_chunks(w, layout, 0, layout.chunks, packed.get());
  PackedBytes weight;
  if (const char* fault = parse_byte_layout(packed.get(), bytes, &weight)) throw std::runtime_error(fault);
  const bool words = uses_words(isa, accuracy, biqgemm);
  const int64_t most = words ? kWordTokens : kByteTokens;
  for (int64_t m = 0; m < io.M; m += most) {
    ByteTokens tokens = make_byte_tokens(weight, isa, accuracy, words, m, io.M - m < most ? io.M - m : most);
    prepare_spans(weight, accuracy, words, io, 0, weight.spans, tokens);
    if (words) {
      biqgemm_chunks(weight, io, tokens, 0, weight.chunks);
    } else {
      lut_gemm_chunks(weight, accuracy, io, tokens, 0, weight.chunks);
    }
  }
}

void run_words(const BcqWeight& w, Isa isa, bool biqgemm, const Io& io) {
  const PackedBcq layout =
      packed_layout(w.N, w.K, w.group_size, w.bits, w.uniform, w.offsets != nullptr, w.scale_dtype);
  const int64_t bytes = packed_bytes(layout);
  const Scratch<uint8_t> packed = make_scratch<uint8_t>(bytes);
  write_packed_header(layout, packed.get());
  pack_row_blocks(w, layout, 0, layout.row_blocks, packed.get());
  PackedBcq weight;
  if (const char* fault = parse_packed(packed.get(), bytes, &weight)) throw std::runtime_error(fault);
  if (biqgemm) return biqgemm_rows(weight, isa, io, 0, weight.row_blocks);
  TokenTables token = make_token_tables(weight, isa);
  for (int64_t m = 0; m < io.M; ++m) {
    prepare_words(weight, isa, io, m, 0, weight.words, token);
    prepare_sums(weight, token);
    lut_gemm_rows(weight, isa, io, m, token, 0, weight.row_blocks);
  }
}

void run_codegemm(const CodebookWeight& w, Isa isa, Accuracy accuracy, const Io& io) {
  const PackedLayout p = packed_layout(w);
  const Scratch<uint8_t> packed = make_scratch<uint8_t>(p.total_bytes());
  pack_codebooks(w, p, packed.get());
  pack_blocks(w, p, 0, p.blocks, packed.get());
  if (const char* fault = packed_mismatch(p, packed.get(), p.total_bytes())) throw std::runtime_error(fault);
  codegemm(p, packed.get(), io, isa, accuracy, 0, p.blocks);
}

std::vector<uint8_t> run(const Case& c) {
  const Isa isa = Isa(c.field[kIsa]);
  const Accuracy accuracy = Accuracy(c.field[kAccuracy]);
  const Kernel kernel = Kernel(c.field[kKernel]);
  const bool dequantize = kernel == kDequantizeBcq || kernel == kDequantizeCodebook;
  const int64_t count = dequantize ? c.field[kN] * c.field[kK] : c.field[kM] * c.field[kN];
  std::vector<uint8_t> y(size_t(count * dtype_bytes(c.dtype(kXType))), 0xFF);  // NaN
  const Io io{c.field[kM], c.x.data(), c.bias.data(), y.data(), c.dtype(kXType)};
  if (count == 0) return y;
  switch (kernel) {
    case kDequantizeBcq:
      bcq_dequantize_rows(bcq_weight(c), isa, 0, c.field[kN], io.dtype, y.data());
      break;
    case kDequantizeCodebook:
      codebook_dequantize(codebook_weight(c), isa, 0, c.field[kN], io.dtype, y.data());
      break;
    case kCodegemm:
      run_codegemm(codebook_weight(c), isa, accuracy, io);
      break;
    default:
      if (accuracy == Accuracy::kExact || byte_kernels(isa) == nullptr) {
        run_words(bcq_weight(c), isa, kernel == kBiqgemm, io);
      } else {
        run_bytes(bcq_weight(c), isa, accuracy, kernel == kBiqgemm, io);
      }
  }
  return y;
}

int run_file(const char* cases, const char* results) {
  std::ifstream in(cases, std::ios::binary);
  std::ofstream out(results, std::ios::binary);
  if (!in || !out) throw std::runtime_error("cannot open the files");
  Case c;
  int done = 0;
  for (; read(in, c.field, sizeof c.field); ++done) {
    for (Blob* blob : {&c.x, &c.bias, &c.codes, &c.scales, &c.extra}) read_blob(in, *blob);
    const std::vector<uint8_t> y = run(c);
    const int64_t bytes = int64_t(y.size());
    out.write(reinterpret_cast<const char*>(&bytes), sizeof bytes);
    out.write(reinterpret_cast<const char*>(y.data()), std::streamsize(bytes));
  }
  if (!out.flush()) throw std::runtime_error("cannot write the results");
  return done;
}

}  // namespace
}  // namespace lutgemm

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: run_cases CASES RESULTS\n");
    return 2;
  }
  try {
    std::printf("%d cases, isa %d\n", lutgemm::run_file(argv[1], argv[2]), int(lutgemm::cpu_isa()));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "run_cases: %s\n", error.what());
    return 1;
  }
  return 0;
}
