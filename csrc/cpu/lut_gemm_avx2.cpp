// LUT-GEMM, AVX2, one token: 32 rows (4 vectors) of one plane at a time, all code words of a group.
#include "isa.h"
#if LUTGEMM_X86
#include "lut_avx2.h"

LUTGEMM_TARGET_AVX2_BEGIN
namespace lutgemm::avx2 {
namespace {

constexpr int kVectors = 4;
constexpr int kRows = kVectors * kLanes;

// Codes are consumed in the order in which they lie, so a fixed distance serves planes, groups and row blocks alike.
// From 2 to 8 KiB it mattered by 5 % (Zen 4, weights in DRAM); without, such weights took 1.3 times as long.
constexpr int64_t kPrefetchBytes = 3072;

// Rows row .. row + 31 of a row block, one group: y += its terms.
void add_group(const PackedBcq& weight, const uint8_t* group, int64_t words, int row, const float* tables, float sum,
               float* y) {
  const GroupScales scales(weight, group);
  __m256 t[kVectors];
  for (int v = 0; v < kVectors; ++v) t[v] = scales.start(row + v * kLanes, sum);
  for (int b = 0; b < weight.bits; ++b) {
    __m256 dot[1][kVectors];
    for (auto& lane : dot[0]) lane = _mm256_setzero_ps();
    for (int64_t w = 0; w < words; ++w) {
      const uint32_t* codes = weight.codes(group) + (w * weight.bits + b) * kRowBlock + row;
      _mm_prefetch(reinterpret_cast<const char*>(codes) + kPrefetchBytes, _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(codes) + kPrefetchBytes + 64, _MM_HINT_T0);
      add_word<1, kVectors>(codes, tables + w * kTableFloats, 0, dot);
    }
    for (int v = 0; v < kVectors; ++v) t[v] = scales.add_plane(b, row + v * kLanes, dot[0][v], t[v]);
  }
  for (int v = 0; v < kVectors; ++v) {
    float* out = y + row + v * kLanes;
    _mm256_storeu_ps(out, scales.finish(row + v * kLanes, t[v], _mm256_loadu_ps(out)));
  }
}

// Sign bits that turn x_i into +-x_i of half-table entry e: bit i of e set means +.
inline __m256 signs_of_bit(int bit) {
  const __m256i entry = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i plus = _mm256_slli_epi32(entry, 31 - bit);
  return _mm256_castsi256_ps(_mm256_andnot_si256(plus, _mm256_set1_epi32(int(0x80000000u))));
}

}  // namespace

void build_tables(const float* x, int64_t words, float* tables) {
  const __m256 sign[3] = {signs_of_bit(0), signs_of_bit(1), signs_of_bit(2)};
  for (int64_t slice = 0; slice < words * kSlices; ++slice) {
    __m256 term[3];
    for (int i = 0; i < 3; ++i) term[i] = _mm256_xor_ps(_mm256_set1_ps(x[slice * 4 + i]), sign[i]);
    const __m256 low = _mm256_add_ps(term[0], term[1]);
    const __m256 high = _mm256_add_ps(term[2], _mm256_set1_ps(x[slice * 4 + 3]));
    _mm256_store_ps(tables + slice * kLanes, _mm256_add_ps(low, high));
  }
}

void lut_gemm_block(const PackedBcq& weight, int64_t row_block, const float* tables, const float* sums, float* y) {
  for (int64_t g = 0; g < weight.G; ++g) {
    prefetch_scales(weight, weight.group(row_block, g) + kPrefetchBytes);
    for (int row = 0; row < kRowBlock; row += kRows) {
      add_group(weight, weight.group(row_block, g), weight.words_in_group(g), row,
                tables + g * weight.words_per_group * kTableFloats, sums[g], y);
    }
  }
}

}  // namespace lutgemm::avx2
LUTGEMM_TARGET_END
#endif
