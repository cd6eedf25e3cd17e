// CodeGEMM with AVX2: one token by scalar-indexed loads (8 rows in flight), 4 or 8 tokens by one vector load per code.
#include "isa.h"

#if LUTGEMM_X86
#include <immintrin.h>

#include "codebook.h"
#include "convert.h"

LUTGEMM_TARGET_AVX2_BEGIN
#include "codegemm_lanes.h"

namespace lutgemm {
namespace {

struct Lanes4 {
  using type = __m128;
  static constexpr int kWidth = 4;
  static type load(const float* p) { return _mm_loadu_ps(p); }
  static void store(float* p, type v) { _mm_storeu_ps(p, v); }
  static type set1(float v) { return _mm_set1_ps(v); }
  static type zero() { return _mm_setzero_ps(); }
  static type add(type a, type b) { return _mm_add_ps(a, b); }
  static type fma(type a, type b, type c) { return _mm_fmadd_ps(a, b, c); }
};

struct Lanes8 {
  using type = __m256;
  static constexpr int kWidth = 8;
  static type load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, type v) { _mm256_storeu_ps(p, v); }
  static type set1(float v) { return _mm256_set1_ps(v); }
  static type zero() { return _mm256_setzero_ps(); }
  static type add(type a, type b) { return _mm256_add_ps(a, b); }
  static type fma(type a, type b, type c) { return _mm256_fmadd_ps(a, b, c); }
};

void build_one(const BuildArgs& a) {
  constexpr int kUnroll = 4;
  float* table = static_cast<float*>(a.tables);
  for (int e = 0; e < a.entries; ++e, table += a.table_entries) {
    const int64_t j = (a.first_entry + e) / a.num_codebooks, c = (a.first_entry + e) % a.num_codebooks;
    const float* codebook = a.codebooks + c * a.vec_len * a.table_entries;
    const float* x = a.x + j * a.vec_len;
    for (int i = 0; i < a.used_entries; i += 8 * kUnroll) {  // past used_entries the codebook is zeros
      __m256 sum[kUnroll];
      for (__m256& s : sum) s = _mm256_setzero_ps();
      for (int d = 0; d < a.vec_len; ++d) {
        const __m256 xd = _mm256_set1_ps(x[d]);
        const float* centroids = codebook + d * a.table_entries + i;
        for (int u = 0; u < kUnroll; ++u) sum[u] = _mm256_fmadd_ps(_mm256_loadu_ps(centroids + 8 * u), xd, sum[u]);
      }
      for (int u = 0; u < kUnroll; ++u) _mm256_storeu_ps(table + i + 8 * u, sum[u]);
    }
  }
}

__m128 load_scales4(const GatherArgs& a, int row) {
  if (a.scale_dtype == DType::kFloat32) return _mm_loadu_ps(static_cast<const float*>(a.scales) + row);
  const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(a.scales) + row));
  if (a.scale_dtype == DType::kFloat16) return _mm_cvtph_ps(raw);
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(raw), 16));
}

template <class Code>
void gather_one_of(const GatherArgs& a) {
  const size_t mask = size_t(a.table_entries - 1);
  prefetch_next(a);
  for (int position = 0; position < kBlockRows; position += 8) {
    const int rows[2] = {row_of_position(position), row_of_position(position + 4)};
    float sum[8];
    for (int u = 0; u < 8; ++u) sum[u] = a.first ? 0.0f : a.partial[rows[u / 4] + u % 4];
    const uint8_t* codes = a.codes + position * sizeof(Code);
    const float* table = static_cast<const float*>(a.tables);
    for (int e = 0; e < a.entries; ++e) {
      const Codes8<Code> index(codes);
      for (int u = 0; u < 8; ++u) {
        const size_t i = sizeof(Code) == 1 ? index[u] : index[u] & mask;
        sum[u] += table[i];
      }
      codes += kBlockRows * sizeof(Code);
      table += a.table_entries;
    }
    for (int h = 0; h < 2; ++h) {
      const float* s = sum + 4 * h;
      const __m128 four = _mm_setr_ps(s[0], s[1], s[2], s[3]);
      if (a.last) {
        float* y = a.y + rows[h];
        _mm_storeu_ps(y, _mm_fmadd_ps(load_scales4(a, rows[h]), four, _mm_loadu_ps(y)));
      } else {
        _mm_storeu_ps(a.partial + rows[h], four);
      }
    }
  }
}

void gather_one(const GatherArgs& a) { a.code_bytes == 1 ? gather_one_of<uint8_t>(a) : gather_one_of<uint16_t>(a); }

}  // namespace

const CodegemmKernel kCodegemmAvx2{1, 16, 16, build_one, gather_one};
const CodegemmKernel kCodegemmAvx2x4{4, 8, 8, build_lanes<Lanes4>, gather_lanes<Lanes4>};
const CodegemmKernel kCodegemmAvx2x8{8, 8, 8, build_lanes<Lanes8>, gather_lanes<Lanes8>};

}  // namespace lutgemm

LUTGEMM_TARGET_END
#endif
