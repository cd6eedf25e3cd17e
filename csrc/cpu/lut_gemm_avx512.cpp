// LUT-GEMM, AVX-512, one token:
//
//   y[64 rows] += sum over groups, planes and table slices of scale * table[slice][nibble of the code word]
//
// Registers of one code word position: 8 tables and 4 sums for each of up to 4 planes. Each table is loaded once for
// all those planes. More than 4 planes: the group's words are read again for the rest, from L1.
//
// Look-ups and shifts share two execution ports (Zen 4), which bound this loop. So of the 8 slices of a word, every
// second gets its indices by a load from the next byte in place of a shift (weights in cache: 11 % faster).
#include "isa.h"
#if LUTGEMM_X86
#include "lut_avx512.h"

LUTGEMM_TARGET_AVX512_BEGIN
namespace lutgemm::avx512 {
namespace {

constexpr int kPlanesAtOnce = 4;

// Codes are consumed in the order in which they lie, so a fixed distance serves planes, groups and row blocks alike.
// Into L2: into L1, 3 KiB ahead, 2 bits took 306 us in place of 244 (Zen 4, 4096 x 4096, weights in DRAM).
constexpr int64_t kPrefetchBytes = 8192;

struct GroupTask {
  const uint32_t* codes;  // [words][bits][64]
  int64_t words;
  int bits, first_plane;
  const float* tables;  // [words][8][16]
};

// dot[p][r] of planes first_plane .. first_plane + kPlanes - 1, then t[r] += scale * dot.
template <int kPlanes>
inline void add_planes(const GroupTask& task, const GroupScales& scales, __m512 (&t)[kVectors]) {
  __m512 dot[kPlanes][kVectors];
  for (auto& plane : dot) {
    for (auto& sum : plane) sum = _mm512_setzero_ps();
  }
  for (int64_t w = 0; w < task.words; ++w) {
    __m512 table[kSlices];
#pragma GCC unroll 8
    for (int s = 0; s < kSlices; ++s) table[s] = _mm512_load_ps(task.tables + (w * kSlices + s) * kLanes);
    const uint32_t* words = task.codes + (w * task.bits + task.first_plane) * kRowBlock;
#pragma GCC unroll 4
    for (int p = 0; p < kPlanes; ++p, words += kRowBlock) {
#pragma GCC unroll 4
      for (int r = 0; r < kVectors; ++r) {
        _mm_prefetch(reinterpret_cast<const char*>(words + r * kLanes) + kPrefetchBytes, _MM_HINT_T1);
      }
#pragma GCC unroll 4
      for (int octet = 0; octet < kSlices / 2; ++octet) {
#pragma GCC unroll 4
        for (int r = 0; r < kVectors; ++r) {
          const __m512i index = load_indices(words, r, octet);
          dot[p][r] = look_up_add(r, table[2 * octet], index, dot[p][r]);
          dot[p][r] = look_up_add(r, table[2 * octet + 1], _mm512_srli_epi32(index, 4), dot[p][r]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < kPlanes; ++p) {
#pragma GCC unroll 4
    for (int r = 0; r < kVectors; ++r) t[r] = scales.add_plane(task.first_plane + p, r, dot[p][r], t[r]);
  }
}

void add_planes(const GroupTask& task, int planes, const GroupScales& scales, __m512 (&t)[kVectors]) {
  switch (planes) {
    case 1:
      return add_planes<1>(task, scales, t);
    case 2:
      return add_planes<2>(task, scales, t);
    case 3:
      return add_planes<3>(task, scales, t);
    default:
      return add_planes<4>(task, scales, t);
  }
}

}  // namespace

void build_tables(const float* x, int64_t words, float* tables) {
  const __m512 sign[4] = {sign_of_bit(0), sign_of_bit(1), sign_of_bit(2), sign_of_bit(3)};
  for (int64_t slice = 0; slice < words * kSlices; ++slice) {
    __m512 term[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) term[i] = _mm512_xor_ps(_mm512_set1_ps(x[slice * 4 + i]), sign[i]);
    const __m512 low = _mm512_add_ps(term[0], term[1]), high = _mm512_add_ps(term[2], term[3]);
    _mm512_store_ps(tables + slice * kLanes, _mm512_add_ps(low, high));
  }
}

void lut_gemm_block(const PackedBcq& weight, int64_t row_block, const float* tables, const float* sums, float* y) {
  __m512 total[kVectors];
  for (int r = 0; r < kVectors; ++r) total[r] = _mm512_loadu_ps(y + r * kLanes);
  for (int64_t g = 0; g < weight.G; ++g) {
    const uint8_t* group = weight.group(row_block, g);
    const GroupScales scales(weight, group);
    prefetch_scales(weight, group + kPrefetchBytes);
    __m512 t[kVectors];
    for (int r = 0; r < kVectors; ++r) t[r] = scales.start(r, sums[g]);
    for (int b = 0; b < weight.bits; b += kPlanesAtOnce) {
      const int planes = weight.bits - b < kPlanesAtOnce ? weight.bits - b : kPlanesAtOnce;
      const GroupTask task{weight.codes(group), weight.words_in_group(g), weight.bits, b,
                           tables + g * weight.words_per_group * kTableFloats};
      add_planes(task, planes, scales, t);
    }
    for (int r = 0; r < kVectors; ++r) total[r] = scales.finish(r, t[r], total[r]);
  }
  for (int r = 0; r < kVectors; ++r) _mm512_storeu_ps(y + r * kLanes, total[r]);
}

}  // namespace lutgemm::avx512
LUTGEMM_TARGET_END
#endif
