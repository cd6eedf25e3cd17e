// CodeGEMM for any CPU: the Psumbook of a tile, then one look-up per code. One token a pass.
#include <algorithm>

#include "codebook.h"
#include "convert.h"

namespace lutgemm {
namespace {

void build(const BuildArgs& a) {
  float* table = static_cast<float*>(a.tables);
  for (int e = 0; e < a.entries; ++e, table += a.table_entries) {
    const int64_t j = (a.first_entry + e) / a.num_codebooks, c = (a.first_entry + e) % a.num_codebooks;
    const float* codebook = a.codebooks + c * a.vec_len * a.table_entries;
    std::fill(table, table + a.table_entries, 0.0f);
    for (int d = 0; d < a.vec_len; ++d, codebook += a.table_entries) {
      const float x = a.x[j * a.vec_len + d];
      for (int i = 0; i < a.used_entries; ++i) table[i] += codebook[i] * x;
    }
  }
}

// 8 rows at a time: one sum alone would wait for the latency of every addition.
template <class Code>
void gather_codes(const GatherArgs& a) {
  constexpr int kRows = 8;
  for (int position = 0; position < kBlockRows; position += kRows) {
    float sum[kRows];
    for (int u = 0; u < kRows; ++u) sum[u] = a.first ? 0.0f : a.partial[row_of_position(position + u)];
    const Code* codes = reinterpret_cast<const Code*>(a.codes) + position;
    const float* table = static_cast<const float*>(a.tables);
    for (int e = 0; e < a.entries; ++e, codes += kBlockRows, table += a.table_entries) {
      for (int u = 0; u < kRows; ++u) sum[u] += table[codes[u] & (a.table_entries - 1)];
    }
    for (int u = 0; u < kRows; ++u) {
      const int row = row_of_position(position + u);
      if (a.last) {
        a.y[row] += load_float(a.scales, a.scale_dtype, row) * sum[u];
      } else {
        a.partial[row] = sum[u];
      }
    }
  }
}

void gather(const GatherArgs& a) { a.code_bytes == 1 ? gather_codes<uint8_t>(a) : gather_codes<uint16_t>(a); }

}  // namespace

const CodegemmKernel kCodegemmScalar{1, 16, 16, build, gather};

}  // namespace lutgemm
