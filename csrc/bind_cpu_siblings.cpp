// The BCQ operator for sibling layers, which read the same x: q, k and v of an attention, gate and up. Tables are built
// once and then serve the rows of each layer, as they would in a call of its own: results are the same bits.
#include <algorithm>
#include <vector>

#include "bind_cpu.h"
#include "cpu/bcq.h"
#include "cpu/byte_kernels.h"

namespace lutgemm::bind {
namespace {

// One layer each: its prepared weight, and where its result goes.
template <class Weight>
struct Sibling {
  Weight weight;
  Io io;
};
template <class Weight>
using Siblings = std::vector<Sibling<Weight>>;

// f(sibling, begin, end) over the items of all siblings as one range, shared among threads as `for_ranges` does.
// items(weight): how many a sibling has. lookups: of all of them. ranges_each: as for `for_ranges`.
template <class Weight, class Items, class F>
void for_siblings(const Siblings<Weight>& siblings, int64_t lookups, const Items& items, int64_t ranges_each,
                  const F& f) {
  int64_t total = 0;
  for (const auto& sibling : siblings) total += items(sibling.weight);
  for_ranges(
      total, total > 0 ? lookups / total : 0,
      [&](int64_t begin, int64_t end) {
        int64_t first = 0;
        for (const auto& sibling : siblings) {
          const int64_t count = items(sibling.weight);
          const int64_t from = std::max(begin - first, int64_t(0)), to = std::min(end - first, count);
          if (from < to) f(sibling, from, to);
          first += count;
        }
      },
      ranges_each);
}

template <class Weight>
int64_t all_lookups(const Siblings<Weight>& siblings, int64_t row) {
  int64_t lookups = 0;
  for (const auto& sibling : siblings) lookups += sibling.weight.row_blocks * row * sibling.weight.bits;
  return lookups;
}

// A chunk is 10 us of work or more, and two in a range leave one thread waiting where there are a dozen in all.
constexpr int64_t kChunkRanges = 16;

void run(const Siblings<PackedBytes>& siblings, Isa isa, Accuracy accuracy, bool biqgemm) {
  const PackedBytes& first = siblings[0].weight;
  const Io& io = siblings[0].io;
  const bool words = uses_words(isa, accuracy, biqgemm);
  const int64_t tokens_at_once = words ? kWordTokens : kByteTokens;
  const int64_t lookups = all_lookups(siblings, kByteRows * first.slices);
  for (int64_t m = 0; m < io.M; m += tokens_at_once) {
    const int64_t count = std::min(io.M - m, tokens_at_once);
    ByteTokens tokens = make_byte_tokens(first, isa, accuracy, words, m, count);
    for_ranges(first.spans, kSpanSlices * 512 * count,
               [&](int64_t begin, int64_t end) { prepare_spans(first, accuracy, words, io, begin, end, tokens); });
    for_siblings(
        siblings, lookups * count, [](const PackedBytes& weight) { return weight.chunks; }, kChunkRanges,
        [&](const Sibling<PackedBytes>& s, int64_t begin, int64_t end) {
          words ? biqgemm_chunks(s.weight, s.io, tokens, begin, end)
                : lut_gemm_chunks(s.weight, accuracy, s.io, tokens, begin, end);
        });
  }
}

void run(const Siblings<PackedBcq>& siblings, Isa isa, Accuracy, bool biqgemm) {
  const PackedBcq& first = siblings[0].weight;
  const Io& io = siblings[0].io;
  const int64_t lookups = all_lookups(siblings, kRowBlock * first.words * 8);
  const auto row_blocks = [](const PackedBcq& weight) { return weight.row_blocks; };
  if (biqgemm) {
    for_siblings(siblings, lookups * io.M, row_blocks, 4, [&](const Sibling<PackedBcq>& s, int64_t begin, int64_t end) {
      biqgemm_rows(s.weight, isa, s.io, begin, end);
    });
    return;
  }
  TokenTables token = make_token_tables(first, isa);
  for (int64_t m = 0; m < io.M; ++m) {
    for_ranges(first.words, 8 * 16,
               [&](int64_t begin, int64_t end) { prepare_words(first, isa, io, m, begin, end, token); });
    prepare_sums(first, token);
    for_siblings(siblings, lookups, row_blocks, 4, [&](const Sibling<PackedBcq>& s, int64_t begin, int64_t end) {
      lut_gemm_rows(s.weight, isa, s.io, m, token, begin, end);
    });
  }
}

const char* parse(const uint8_t* data, int64_t bytes, PackedBytes* weight) {
  return parse_byte_layout(data, bytes, weight);
}
const char* parse(const uint8_t* data, int64_t bytes, PackedBcq* weight) { return parse_packed(data, bytes, weight); }

void check_kernels(const PackedBytes& weight, Isa isa, Accuracy accuracy) {
  const ByteKernels* kernels = byte_kernels(isa);
  check(accuracy != Accuracy::kExact, "packed: it is laid out for integer tables, accuracy=3 (exact) was asked for");
  check(kernels != nullptr && kernels->folded == weight.folded, "packed: its codes are ",
        weight.folded ? "folded, for isa=3 (avx512vbmi)" : "plain, for kernels that look up nibbles",
        "; isa=", int(isa), " was asked for");
}
void check_kernels(const PackedBcq&, Isa, Accuracy) {}

template <class Weight>
std::vector<Tensor> siblings_linear(const Tensor& x, const std::vector<Tensor>& packed,
                                    const std::vector<Tensor>& biases, Isa isa, Accuracy accuracy, bool biqgemm) {
  std::vector<Tensor> results(packed.size());
  Siblings<Weight> siblings(packed.size());
  for (size_t i = 0; i < packed.size(); ++i) {
    Weight& weight = siblings[i].weight;
    const char* fault = parse(static_cast<const uint8_t*>(packed[i].const_data_ptr()), packed[i].numel(), &weight);
    check(fault == nullptr, "packed: ", fault ? fault : "", "; make it with lutgemm::_bcq_pack_cpu");
    check_kernels(weight, isa, accuracy);
    const Weight& first = siblings[0].weight;
    check(weight.K == first.K && weight.group_size == first.group_size,
          "packed: siblings must have one K and group_size");
    const std::optional<Tensor> bias = biases.empty() ? std::nullopt : std::optional<Tensor>(biases[i]);
    siblings[i].io = make_io(x, bias, results[i], weight.N, weight.K);
  }
  if (siblings[0].io.M > 0) run(siblings, isa, accuracy, biqgemm);
  return results;
}

std::vector<Tensor> bcq_linear_siblings_cpu(const Tensor& x, const std::vector<Tensor>& packed,
                                            const std::vector<Tensor>& biases, bool biqgemm, int64_t isa_number,
                                            int64_t accuracy_number) {
  const Isa isa = requested_isa(isa_number);
  const Accuracy accuracy = requested_accuracy(accuracy_number);
  check(!packed.empty(), "packed: there must be a weight at least");
  check(biases.empty() || biases.size() == packed.size(), "biases: one of each weight, or none at all");
  int bytes = 0;
  for (const Tensor& weight : packed) {
    check_tensor(weight, "packed", {-1});
    check(weight.scalar_type() == ScalarType::Byte, "packed: must be uint8");
    bytes += is_byte_layout(static_cast<const uint8_t*>(weight.const_data_ptr()), weight.numel());
  }
  check(bytes == 0 || bytes == int(packed.size()), "packed: siblings must be laid out alike");
  return bytes ? siblings_linear<PackedBytes>(x, packed, biases, isa, accuracy, biqgemm)
               : siblings_linear<PackedBcq>(x, packed, biases, isa, accuracy, biqgemm);
}

}  // namespace
}  // namespace lutgemm::bind

STABLE_TORCH_LIBRARY_FRAGMENT(lutgemm, m) {
  m.def(
      "_bcq_linear_siblings_cpu(Tensor x, Tensor[] packed, Tensor[] biases, bool biqgemm, int isa, "
      "int accuracy) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(lutgemm, CPU, m) {
  m.impl("_bcq_linear_siblings_cpu", TORCH_BOX(&lutgemm::bind::bcq_linear_siblings_cpu));
}
