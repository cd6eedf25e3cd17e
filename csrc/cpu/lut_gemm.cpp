// LUT-GEMM (ICLR 2024), section 3: one token at a time. The tables of all of K are built once; then the rows stream
// past them, codes and scales read strictly in the order in which they lie.
#include <cstring>

#include "bcq.h"
#include "convert.h"

namespace lutgemm {

TokenTables make_token_tables(const PackedBcq& weight, Isa isa) {
  return TokenTables{make_scratch<float>(weight.words * 32),
                     make_scratch<float>(weight.words * lut_kernels(isa).table_floats), make_scratch<float>(weight.G)};
}

void prepare_words(const PackedBcq& weight, Isa isa, const Io& io, int64_t m, int64_t begin, int64_t end,
                   TokenTables& token) {
  const LutKernels& kernels = lut_kernels(isa);
  const int64_t first = begin * 32, stop = end * 32 < weight.K ? end * 32 : weight.K;
  float* x = token.x.get() + first;
  const auto* source = static_cast<const uint8_t*>(io.x) + (m * weight.K + first) * dtype_bytes(io.dtype);
  load_floats(isa, io.dtype, source, stop - first, x);
  std::memset(x + (stop - first), 0, size_t(end * 32 - stop) * sizeof(float));
  kernels.build_tables(x, end - begin, token.tables.get() + begin * kernels.table_floats);
}

void prepare_sums(const PackedBcq& weight, TokenTables& token) {
  for (int64_t g = 0; g < weight.G; ++g) {
    token.sums[size_t(g)] = group_sum(token.x.get() + g * weight.words_per_group * 32, weight.words_in_group(g));
  }
}

void lut_gemm_rows(const PackedBcq& weight, Isa isa, const Io& io, int64_t m, const TokenTables& token, int64_t begin,
                   int64_t end) {
  const LutKernels& kernels = lut_kernels(isa);
  for (int64_t block = begin; block < end; ++block) {
    alignas(64) float y[kRowBlock] = {};
    kernels.lut_gemm_block(weight, block, token.tables.get(), token.sums.get(), y);
    write_row_block(weight.N, isa, io, m, block, y);
  }
}

}  // namespace lutgemm
