// BiQGEMM, AVX2: one row block, the groups of one tile, several tokens. 16 rows (2 vectors) and up to 4 tokens at once:
// indices and signs are made once for the tokens.
#include "isa.h"
#if LUTGEMM_X86
#include "lut_avx2.h"

LUTGEMM_TARGET_AVX2_BEGIN
namespace lutgemm::avx2 {
namespace {

constexpr int kTokensAtOnce = 4;
constexpr int kVectors = 2;
constexpr int kRows = kVectors * kLanes;

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
void add_group(const TileTask& task) {
  const PackedBcq& weight = *task.weight;
  const GroupScales scales(weight, task.group);
  for (int row = 0; row < kRowBlock; row += kRows) {
    __m256 t[kTokens][kVectors];
    for (int m = 0; m < kTokens; ++m) {
      for (int v = 0; v < kVectors; ++v) t[m][v] = scales.start(row + v * kLanes, task.sums[m * task.sum_stride]);
    }
    for (int b = 0; b < weight.bits; ++b) {
      __m256 dot[kTokens][kVectors];
      for (auto& token : dot) {
        for (auto& lane : token) lane = _mm256_setzero_ps();
      }
      for (int64_t w = 0; w < task.words; ++w) {
        const int64_t at = (w * weight.bits + b) * kRowBlock + row;
        _mm_prefetch(reinterpret_cast<const char*>(weight.codes(task.next) + at), _MM_HINT_T0);
        add_word<kTokens, kVectors>(weight.codes(task.group) + at, task.tables + w * kTableFloats, task.table_stride,
                                    dot);
      }
      for (int m = 0; m < kTokens; ++m) {
        for (int v = 0; v < kVectors; ++v) t[m][v] = scales.add_plane(b, row + v * kLanes, dot[m][v], t[m][v]);
      }
    }
    for (int m = 0; m < kTokens; ++m) {
      for (int v = 0; v < kVectors; ++v) {
        float* y = task.y + m * kRowBlock + row + v * kLanes;
        _mm256_storeu_ps(y, scales.finish(row + v * kLanes, t[m][v], _mm256_loadu_ps(y)));
      }
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

}  // namespace lutgemm::avx2
LUTGEMM_TARGET_END
#endif
