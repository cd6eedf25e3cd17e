// BiQGEMM, AVX-512: one row block, the groups of one tile, several tokens.
//
//   y[token][64 rows] += sum over groups, planes and slices of scale * table[token][slice][nibble of the code word]
//
// Registers: 4 index vectors (64 rows) shared by up to 4 tokens, 4 sums a token; each table is loaded from L1 once for
// the 4 vectors. Index loads and shifts are paid once for the tokens.
#include "isa.h"
#if LUTGEMM_X86
#include "lut_avx512.h"

LUTGEMM_TARGET_AVX512_BEGIN
namespace lutgemm::avx512 {
namespace {

constexpr int kTokensAtOnce = 4;

struct TileTask {
  const PackedBcq* weight;
  const uint8_t* group;
  const uint8_t* next;  // the same group of the next row block, prefetched
  int64_t words;
  const float* tables;  // of the group and the first token
  int64_t table_stride;
  const float* sums;
  int64_t sum_stride;
  float* y;
};

template <int kTokens>
inline void add_group(const TileTask& task) {
  const PackedBcq& weight = *task.weight;
  const GroupScales scales(weight, task.group);
  __m512 t[kTokens][kVectors];
  for (int m = 0; m < kTokens; ++m) {
    for (int r = 0; r < kVectors; ++r) t[m][r] = scales.start(r, task.sums[m * task.sum_stride]);
  }
  for (int b = 0; b < weight.bits; ++b) {
    __m512 dot[kTokens][kVectors];
    for (auto& token : dot) {
      for (auto& sum : token) sum = _mm512_setzero_ps();
    }
    for (int64_t w = 0; w < task.words; ++w) {
      const int64_t at = (w * weight.bits + b) * kRowBlock;
      const uint32_t* words = weight.codes(task.group) + at;
      const auto* ahead = reinterpret_cast<const char*>(weight.codes(task.next) + at);
      __m512i index[kVectors];
#pragma GCC unroll 4
      for (int r = 0; r < kVectors; ++r) {
        index[r] = load_indices(words, r);
        _mm_prefetch(ahead + r * 64, _MM_HINT_T0);
      }
#pragma GCC unroll 8
      for (int s = 0; s < kSlices; ++s) {
#pragma GCC unroll 4
        for (int m = 0; m < kTokens; ++m) {
          const __m512 table = _mm512_load_ps(task.tables + m * task.table_stride + (w * kSlices + s) * kLanes);
#pragma GCC unroll 4
          for (int r = 0; r < kVectors; ++r) {
            dot[m][r] = look_up_add(r, table, index[r], dot[m][r]);
          }
        }
        if (s + 1 < kSlices) {
#pragma GCC unroll 4
          for (int r = 0; r < kVectors; ++r) index[r] = _mm512_srli_epi32(index[r], 4);
        }
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < kTokens; ++m) {
#pragma GCC unroll 4
      for (int r = 0; r < kVectors; ++r) t[m][r] = scales.add_plane(b, r, dot[m][r], t[m][r]);
    }
  }
  for (int m = 0; m < kTokens; ++m) {
    for (int r = 0; r < kVectors; ++r) {
      float* y = task.y + m * kRowBlock + r * kLanes;
      _mm512_storeu_ps(y, scales.finish(r, t[m][r], _mm512_loadu_ps(y)));
    }
  }
}

void add_group(const TileTask& task, int64_t tokens) {
  switch (tokens) {
    case 1:
      return add_group<1>(task);
    case 2:
      return add_group<2>(task);
    case 3:
      return add_group<3>(task);
    default:
      return add_group<4>(task);
  }
}

}  // namespace

void biqgemm_block(const PackedBcq& weight, int64_t row_block, int64_t begin, int64_t end, int64_t tokens,
                   const float* tables, int64_t table_stride, const float* sums, int64_t sum_stride, float* y) {
  const int64_t next = row_block + 1 < weight.row_blocks ? row_block + 1 : row_block;
  for (int64_t g = begin; g < end; ++g) {
    prefetch_scales(weight, weight.group(next, g));
    for (int64_t m = 0; m < tokens; m += kTokensAtOnce) {
      const TileTask task{&weight,
                          weight.group(row_block, g),
                          weight.group(next, g),
                          weight.words_in_group(g),
                          tables + m * table_stride + (g - begin) * weight.words_per_group * kTableFloats,
                          table_stride,
                          sums + m * sum_stride + (g - begin),
                          sum_stride,
                          y + m * kRowBlock};
      add_group(task, tokens - m < kTokensAtOnce ? tokens - m : kTokensAtOnce);
    }
  }
}

}  // namespace lutgemm::avx512
LUTGEMM_TARGET_END
#endif
