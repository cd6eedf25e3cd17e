// CodeGEMM with one vector lane per token: a table holds, for each centroid, its products with all tokens of the pass,
// so one code fetches them all with one load. Included inside a target region, hence in an unnamed namespace and with
// no include guard; its own includes, and the intrinsics, must have been seen before the region.
//
//   table[entry][centroid][token]     partial, y [row][token]
//
// `Lanes` names a vector of fp32: type, kWidth, load, store, set1, zero, add, fma.
#include "codebook.h"
#include "convert.h"

namespace lutgemm {
namespace {

template <class Lanes>
void build_lanes(const BuildArgs& a) {
  constexpr int kUnroll = 8;  // FMA latency times FMAs a cycle
  float* table = static_cast<float*>(a.tables);
  for (int e = 0; e < a.entries; ++e, table += a.table_entries * Lanes::kWidth) {
    const int64_t j = (a.first_entry + e) / a.num_codebooks, c = (a.first_entry + e) % a.num_codebooks;
    const float* codebook = a.codebooks + c * a.vec_len * a.table_entries;
    const float* x = a.x + j * a.vec_len * Lanes::kWidth;
    int i = 0;
    for (; i + kUnroll <= a.used_entries; i += kUnroll) {
      typename Lanes::type sum[kUnroll];
      for (int u = 0; u < kUnroll; ++u) sum[u] = Lanes::zero();
      for (int d = 0; d < a.vec_len; ++d) {
        const auto xd = Lanes::load(x + d * Lanes::kWidth);
        const float* centroids = codebook + d * a.table_entries + i;
        for (int u = 0; u < kUnroll; ++u) sum[u] = Lanes::fma(Lanes::set1(centroids[u]), xd, sum[u]);
      }
      for (int u = 0; u < kUnroll; ++u) Lanes::store(table + (i + u) * Lanes::kWidth, sum[u]);
    }
    for (; i < a.used_entries; ++i) {
      auto sum = Lanes::zero();
      for (int d = 0; d < a.vec_len; ++d) {
        sum = Lanes::fma(Lanes::set1(codebook[d * a.table_entries + i]), Lanes::load(x + d * Lanes::kWidth), sum);
      }
      Lanes::store(table + i * Lanes::kWidth, sum);
    }
  }
}

void prefetch_next(const GatherArgs& a) {
  for (int i = 0; i < a.entries * kBlockRows * a.code_bytes; i += 64) __builtin_prefetch(a.next_codes + i);
}

// Index u of the 8 codes that start at `codes`.
template <class Code>
struct Codes8 {
  uint64_t words[sizeof(Code)];

  explicit Codes8(const uint8_t* codes) { __builtin_memcpy(words, codes, sizeof words); }
  size_t operator[](int u) const {
    constexpr int kPerWord = 8 / sizeof(Code);
    return Code(words[u / kPerWord] >> (u % kPerWord * 8 * sizeof(Code)));
  }
};

template <class Lanes, class Code>
void gather_lanes_of(const GatherArgs& a) {
  const size_t mask = size_t(a.table_entries - 1);
  prefetch_next(a);
  for (int position = 0; position < kBlockRows; position += 8) {
    const int rows[2] = {row_of_position(position), row_of_position(position + 4)};
    typename Lanes::type sum[8];
    for (int u = 0; u < 8; ++u) {
      sum[u] = a.first ? Lanes::zero() : Lanes::load(a.partial + (rows[u / 4] + u % 4) * Lanes::kWidth);
    }
    const uint8_t* codes = a.codes + position * sizeof(Code);
    const float* table = static_cast<const float*>(a.tables);
    for (int e = 0; e < a.entries; ++e) {
      const Codes8<Code> index(codes);
      for (int u = 0; u < 8; ++u) {
        const size_t i = sizeof(Code) == 1 ? index[u] : index[u] & mask;
        sum[u] = Lanes::add(sum[u], Lanes::load(table + i * Lanes::kWidth));
      }
      codes += kBlockRows * sizeof(Code);
      table += a.table_entries * Lanes::kWidth;
    }
    for (int u = 0; u < 8; ++u) {
      const int row = rows[u / 4] + u % 4;
      if (a.last) {
        float* y = a.y + row * Lanes::kWidth;
        const auto scale = Lanes::set1(load_float(a.scales, a.scale_dtype, row));
        Lanes::store(y, Lanes::fma(scale, sum[u], Lanes::load(y)));
      } else {
        Lanes::store(a.partial + row * Lanes::kWidth, sum[u]);
      }
    }
  }
}

template <class Lanes>
void gather_lanes(const GatherArgs& a) {
  a.code_bytes == 1 ? gather_lanes_of<Lanes, uint8_t>(a) : gather_lanes_of<Lanes, uint16_t>(a);
}

}  // namespace
}  // namespace lutgemm
