// lut_gemm and biqgemm over byte_layout.h: tables for some tokens, then the chunks of rows past them, span by span.
#include <algorithm>
#include <cstring>
#include <limits>

#include "byte_kernels.h"
#include "convert.h"
#include "isa.h"

namespace lutgemm {
namespace {

constexpr int64_t kWordTableBytes = kSpanWordLookUps * kWordEntries * int64_t(sizeof(int16_t));

// Chunks whose y stays in L2 from span to span: 4096 rows of kWordTokens tokens.
constexpr int64_t kChunksAtOnce = 8;

// biqgemm leaves the order of memory at the end of a chunk, so its prefetches follow the order of use. 8 to 16 KiB
// ahead into L2 is where they were best; into L1 the same prefetches took 1.3 times as long on Zen 4.
constexpr int64_t kPrefetchBytes = 12 << 10;

}  // namespace

float inverse_step(float range, float bound, float* step) {
  const bool usable = bound > std::numeric_limits<float>::min() * 65536.0f && bound < std::numeric_limits<float>::max();
  *step = usable ? bound / range : bound * 0.0f;
  return usable ? range / bound : 0.0f;
}

const ByteKernels* byte_kernels([[maybe_unused]] Isa isa) {
#if LUTGEMM_X86
  static const ByteKernels vbmi_kernels{true,
                                        byte_table_bytes,
                                        vbmi::span_sums,
                                        vbmi::build_byte_tables,
                                        vbmi::add_byte_span,
                                        avx512::build_word_tables,
                                        vbmi::add_word_span};
  static const ByteKernels avx512_kernels{false,
                                          nibble_table_bytes,
                                          avx2::nibble_span_sums,
                                          avx2::build_nibble_tables,
                                          avx512::add_nibble_span,
                                          avx512::build_word_tables,
                                          avx512::add_word_span};
  static const ByteKernels avx2_kernels{
      false,  nibble_table_bytes, avx2::nibble_span_sums, avx2::build_nibble_tables, avx2::add_nibble_span, nullptr,
      nullptr};
  if (isa >= Isa::kAvx512Vbmi) return &vbmi_kernels;
  if (isa == Isa::kAvx512) return &avx512_kernels;
  if (isa == Isa::kAvx2) return &avx2_kernels;
#elif LUTGEMM_ARM64
  static const ByteKernels neon_kernels{
      false,  nibble_table_bytes, neon::nibble_span_sums, neon::build_nibble_tables, neon::add_nibble_span, nullptr,
      nullptr};
  if (isa >= Isa::kNeon) return &neon_kernels;
#endif
  return nullptr;
}

ByteTokens make_byte_tokens(const PackedBytes& weight, Isa isa, Accuracy accuracy, bool words, int64_t first,
                            int64_t count) {
  ByteTokens t;
  t.isa = isa;
  t.first = first;
  t.count = count;
  t.table_stride = words ? kWordTableBytes : kSpanSlices * byte_kernels(isa)->table_bytes(accuracy);
  const int64_t all = weight.spans * count, table_bytes = all * t.table_stride;
  thread_local ThreadScratch kept;
  t.tables = kept.get(table_bytes + 2 * all * int64_t(sizeof(float)), t.large);
  t.steps = reinterpret_cast<float*>(t.tables + table_bytes);
  t.sums = t.steps + all;
  return t;
}

void prepare_spans(const PackedBytes& weight, Accuracy accuracy, bool words, const Io& io, int64_t begin, int64_t end,
                   ByteTokens& tokens) {
  const ByteKernels& kernels = *byte_kernels(tokens.isa);
  alignas(64) float x[kWordTableFeatures + 32];
  for (int64_t s = begin; s < end; ++s) {
    const Span span = span_at(weight, s);
    const int64_t first = span.slice * 8, count = std::min(weight.K - first, span.slices * 8);
    for (int64_t m = 0; m < tokens.count; ++m) {
      const int64_t at = s * tokens.count + m;
      const auto* source =
          static_cast<const uint8_t*>(io.x) + ((tokens.first + m) * weight.K + first) * dtype_bytes(io.dtype);
      load_floats(tokens.isa, io.dtype, source, count, x);
      std::memset(x + count, 0, sizeof x - size_t(count) * sizeof(float));
      const SpanSums sums = kernels.span_sums(x, span.slices);
      tokens.sums[at] = sums.sum;
      uint8_t* tables = tokens.tables + at * tokens.table_stride;
      if (words) {
        kernels.build_words(x, span.slices, sums, reinterpret_cast<int16_t*>(tables), &tokens.steps[at]);
      } else {
        kernels.build_tables(accuracy, x, span.slices, sums, tables, &tokens.steps[at]);
      }
    }
  }
}

void lut_gemm_chunks(const PackedBytes& weight, Accuracy accuracy, const Io& io, const ByteTokens& tokens,
                     int64_t begin, int64_t end) {
  const ByteKernels& kernels = *byte_kernels(tokens.isa);
  alignas(64) float y[kByteTokens][kMostChunkBlocks * kByteRows];
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t blocks = weight.blocks_in(chunk);
    std::memset(y, 0, sizeof y[0] * size_t(tokens.count));
    for (int64_t s = 0; s < weight.spans; ++s) {
      const Span span = span_at(weight, s);
      for (int64_t block = 0; block < blocks; block += 2) {
        ByteTask task{};
        task.weight = &weight;
        task.blocks = block + 1 < blocks ? 2 : 1;
        task.slices = span.slices;
        for (int i = 0; i < task.blocks; ++i) task.pieces[i] = piece_at(weight, span, chunk, block + i);
        for (int64_t m = 0; m < tokens.count; ++m) {
          const int64_t at = s * tokens.count + m;
          task.tables = tokens.tables + at * tokens.table_stride;
          task.step = tokens.steps[at];
          task.sum = tokens.sums[at];
          task.y = y[m] + block * kByteRows;
          kernels.add_span(accuracy, task);
        }
      }
    }
    for (int64_t m = 0; m < tokens.count; ++m) {
      for (int64_t block = 0; block < blocks; ++block) {
        write_row_block(weight.N, tokens.isa, io, tokens.first + m, chunk * weight.chunk_blocks + block,
                        y[m] + block * kByteRows);
      }
    }
  }
}

void biqgemm_chunks(const PackedBytes& weight, const Io& io, const ByteTokens& tokens, int64_t begin, int64_t end) {
  const ByteKernels& kernels = *byte_kernels(tokens.isa);
  const int64_t most = std::min(end - begin, kChunksAtOnce), block_floats = tokens.count * kByteRows;
  thread_local ThreadScratch kept;
  Scratch<uint8_t> large;
  auto* y =
      reinterpret_cast<float*>(kept.get(most * weight.chunk_blocks * block_floats * int64_t(sizeof(float)), large));
  for (int64_t first = begin; first < end; first += kChunksAtOnce) {
    const int64_t stop = std::min(end, first + kChunksAtOnce);
    std::memset(y, 0, size_t((stop - first) * weight.chunk_blocks * block_floats) * sizeof(float));
    const int64_t blocks = std::min(stop * weight.chunk_blocks, weight.row_blocks) - first * weight.chunk_blocks;
    for (int64_t s = 0; s < weight.spans; ++s) {
      const Span span = span_at(weight, s), next = span_at(weight, std::min(s + 1, weight.spans - 1));
      const int64_t at = s * tokens.count;
      const auto piece_of = [&](const Span& in, int64_t block) {
        return piece_at(weight, in, first + block / weight.chunk_blocks, block % weight.chunk_blocks);
      };
      const int64_t distance = std::min(blocks, std::max<int64_t>(1, kPrefetchBytes / span.bytes));
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t soon = block + distance;
        const Piece ahead = soon < blocks ? piece_of(span, soon) : piece_of(next, soon - blocks);
        const uint8_t* ahead_start = span.starts_group ? ahead.scales : ahead.codes;
        kernels.add_words({&weight, piece_of(span, block), ahead_start, span.bytes, span.slices, tokens.count,
                           reinterpret_cast<const int16_t*>(tokens.tables_of(s)), tokens.steps + at, tokens.sums + at,
                           y + block * block_floats});
      }
    }
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t m = 0; m < tokens.count; ++m) {
        write_row_block(weight.N, tokens.isa, io, tokens.first + m, first * weight.chunk_blocks + block,
                        y + block * block_floats + m * kByteRows);
      }
    }
  }
}

}  // namespace lutgemm
