// Tiles of W times some tokens: activations rounded once, then the chunks of rows, span by span.
#include "tile_gemm.h"

#include <algorithm>
#include <cstring>

#include "bcq.h"
#include "convert.h"
#include "isa.h"

namespace lutgemm {

TileTokensX make_tile_tokens(const PackedBytes& weight, Accuracy accuracy, int64_t first, int64_t count) {
  TileTokensX t;
  const bool fast = accuracy == Accuracy::kFast;
  t.accuracy = accuracy;
  t.first = first;
  t.count = count;
  t.q_bytes = kTileFeatures * int64_t(fast ? sizeof(int8_t) : sizeof(int16_t));
  t.q_steps = fast ? kFastSteps : 1;
  const int64_t all = weight.spans * count;
  thread_local ThreadScratch kept;
  t.q = kept.get(all * (t.q_bytes + (t.q_steps + 1) * int64_t(sizeof(float))), t.large);
  t.steps = reinterpret_cast<float*>(t.q + all * t.q_bytes);
  t.sums = t.steps + all * t.q_steps;
  return t;
}

#if LUTGEMM_X86
namespace {

constexpr int64_t kPrefetchBytes = 12 << 10;

}  // namespace

void prepare_tile_spans(const PackedBytes& weight, const Io& io, int64_t begin, int64_t end, TileTokensX& tokens) {
  alignas(64) float x[kTileFeatures];
  const auto round = tokens.accuracy == Accuracy::kFast ? vbmi::round_to_bytes : vbmi::round_to_words;
  for (int64_t s = begin; s < end; ++s) {
    const Span span = span_at(weight, s);
    const int64_t first = span.slice * 8, count = std::min(weight.K - first, span.slices * 8);
    for (int64_t m = 0; m < tokens.count; ++m) {
      const int64_t at = s * tokens.count + m;
      const auto* source =
          static_cast<const uint8_t*>(io.x) + ((tokens.first + m) * weight.K + first) * dtype_bytes(io.dtype);
      load_floats(Isa::kAvx512Vbmi, io.dtype, source, count, x);
      std::memset(x + count, 0, sizeof x - size_t(count) * sizeof(float));
      round(weight.uniform, x, tokens.q + at * tokens.q_bytes, tokens.steps + at * tokens.q_steps, &tokens.sums[at]);
    }
  }
}

void tile_gemm_chunks(const PackedBytes& weight, const Io& io, const TileTokensX& tokens, int64_t begin, int64_t end) {
  const int64_t block_floats = tokens.count * kByteRows;
  const auto add_tile = tokens.accuracy == Accuracy::kFast ? vbmi::add_tile_of_bytes : vbmi::add_tile_of_words;
  thread_local ThreadScratch kept;
  Scratch<uint8_t> large;
  auto* y = reinterpret_cast<float*>(kept.get(weight.chunk_blocks * block_floats * int64_t(sizeof(float)), large));
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t blocks = weight.blocks_in(chunk);
    std::memset(y, 0, size_t(blocks * block_floats) * sizeof(float));
    for (int64_t s = 0; s < weight.spans; ++s) {
      const Span span = span_at(weight, s);
      const int64_t at = s * tokens.count;
      for (int64_t block = 0; block < blocks; ++block) {
        const Piece piece = piece_at(weight, span, chunk, block);
        const uint8_t* start = span.starts_group ? piece.scales : piece.codes;
        add_tile({&weight, piece.scales, piece.codes, start + kPrefetchBytes, span.bytes, span.slices, tokens.count,
                  tokens.q + at * tokens.q_bytes, tokens.steps + at * tokens.q_steps, tokens.sums + at,
                  y + block * block_floats});
      }
    }
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t m = 0; m < tokens.count; ++m) {
        write_row_block(weight.N, Isa::kAvx512Vbmi, io, tokens.first + m, chunk * weight.chunk_blocks + block,
                        y + block * block_floats + m * kByteRows);
      }
    }
  }
}
#endif

}  // namespace lutgemm
