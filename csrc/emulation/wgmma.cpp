// Products of a warpgroup: 128 threads meet, the last one to come computes for all. Results are kept here and written
// to the threads' accumulators by the wait that ends their group; until then those hold NaN.
#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "emulation/block.h"
#include "emulation/clocks.h"
#include "emulation/float16.h"
#include "emulation/hopper.h"
#include "emulation/memory.h"
#include "emulation/sites.h"

namespace emulation {

namespace {

constexpr unsigned kThreads = 128, kRows = 64, kDepth = 16, kWarpsOfGroup = 4;
constexpr unsigned kMostWarpgroups = kMostThreads / kThreads;
constexpr uint32_t kUnderWay = 0x7fc0dead;  // NaN

// Accumulators of the whole warpgroup that products under way add to.
struct Accumulators {
  float* d[kThreads];
  unsigned tokens;
  uint64_t group;            // of the newest product
  unsigned delivered;        // threads
  std::vector<float> value;  // [kRows][tokens]
};

struct Call {
  float* d;
  const uint32_t* a;
  uint64_t b;
  Site site;
};

struct Warpgroup {
  unsigned arrived;
  unsigned tokens;
  bool bfloat16;
  Call calls[kThreads];
  std::vector<std::unique_ptr<Accumulators>> under_way;
};
Warpgroup warpgroups[kMostWarpgroups];

struct Progress {
  uint64_t committed;  // groups
  bool fenced;
};
Progress progress[kMostThreads];

Warpgroup& own_warpgroup(const char* name, Site site) {
  need_hopper(name);
  const unsigned index = block.current / kThreads;
  if ((index + 1) * kThreads > block.thread_count) {
    fail(std::string(name) + ": " + thread_name(block.current) + " is in no whole warpgroup of 128 threads, at " +
         describe_site(site));
  }
  return warpgroups[index];
}

float value16(uint32_t word, unsigned half, bool bfloat16) {
  const auto bits = static_cast<uint16_t>(word >> 16 * half);
  return bfloat16 ? bfloat16_value(bits) : half_value(bits);
}

// Row and column of D that d[i] of a thread is.
unsigned row_of(unsigned thread, unsigned i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
unsigned column_of(unsigned thread, unsigned i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// Core matrix of B: 8 tokens from 8 * `tile` on, 16 bytes each, of this half of K.
const unsigned char* core_matrix(uint64_t b, unsigned half, unsigned tile) {
  const auto field = [b](unsigned shift) { return static_cast<size_t>(b >> shift & 0x3fff) << 4; };
  const size_t offset = field(0) + half * field(16) + tile * field(32);
  if (offset + 128 > kArenaBytes) fail("wgmma: out of bounds, its descriptor leads out of shared memory");
  return arena + offset;
}

Accumulators& accumulators(Warpgroup& group) {
  const Call* calls = group.calls;
  for (const auto& known : group.under_way) {
    unsigned same = 0;
    for (unsigned t = 0; t < kThreads; ++t) same += known->d[t] == calls[t].d;
    if (same == kThreads && known->tokens == group.tokens) return *known;
    if (same != 0) {
      fail("wgmma: the accumulators are partly those of a product under way, at " + describe_site(calls[0].site));
    }
  }
  auto fresh = std::make_unique<Accumulators>();
  fresh->tokens = group.tokens;
  fresh->value.resize(kRows * group.tokens);
  for (unsigned t = 0; t < kThreads; ++t) {
    fresh->d[t] = calls[t].d;
    for (unsigned i = 0; i < group.tokens / 2; ++i) {
      fresh->value[row_of(t, i) * group.tokens + column_of(t, i)] = calls[t].d[i];
      std::memcpy(calls[t].d + i, &kUnderWay, sizeof(float));
    }
  }
  group.under_way.push_back(std::move(fresh));
  return *group.under_way.back();
}

void multiply(Warpgroup& group, Accumulators& d) {
  const unsigned tokens = group.tokens;
  float a[kRows][kDepth];
  static float b[kDepth][256];
  for (unsigned t = 0; t < kThreads; ++t) {
    for (unsigned i = 0; i < 8; ++i) {
      a[row_of(t, i)][t % 4 * 2 + i % 2 + i / 4 * 8] = value16(group.calls[t].a[i / 2], i % 2, group.bfloat16);
    }
  }
  for (unsigned n = 0; n < tokens; ++n) {
    for (unsigned half = 0; half < 2; ++half) {
      uint32_t words[4];
      std::memcpy(words, core_matrix(group.calls[0].b, half, n / 8) + n % 8 * 16, sizeof(words));
      for (unsigned k = 0; k < 8; ++k) b[half * 8 + k][n] = value16(words[k / 2], k % 2, group.bfloat16);
    }
  }
  for (unsigned m = 0; m < kRows; ++m) {
    float* row = d.value.data() + m * tokens;
    for (unsigned k = 0; k < kDepth; ++k) {
      for (unsigned n = 0; n < tokens; ++n) row[n] += a[m][k] * b[k][n];
    }
  }
}

void deliver(Accumulators& accumulators, unsigned thread, Site site) {
  float* d = accumulators.d[thread];
  for (unsigned i = 0; i < accumulators.tokens / 2; ++i) {
    if (std::memcmp(d + i, &kUnderWay, sizeof(float)) != 0) {
      fail("wgmma: " + thread_name(block.current) + " has written accumulators of a product under way, before " +
           describe_site(site));
    }
    d[i] = accumulators.value[row_of(thread, i) * accumulators.tokens + column_of(thread, i)];
  }
}

}  // namespace

uint32_t descriptor_address(const void* shared, uint32_t leading_bytes, uint32_t stride_bytes) {
  const auto address = reinterpret_cast<uintptr_t>(shared);
  if (!in_shared(address)) fail("wgmma_descriptor: the address is not in shared memory");
  const auto offset = static_cast<uint32_t>(address - reinterpret_cast<uintptr_t>(arena));
  if ((offset | leading_bytes | stride_bytes) % 16) fail("wgmma_descriptor: its numbers are multiples of 16");
  if ((leading_bytes | stride_bytes) >> 18) fail("wgmma_descriptor: its steps are less than 256 KB");
  return offset;
}

void wgmma_begin_block() {
  for (Warpgroup& group : warpgroups) {
    group.arrived = 0;
    group.under_way.clear();
  }
  for (Progress& thread : progress) thread = {0, false};
}

std::string wgmma_end_block() {
  for (const Warpgroup& group : warpgroups) {
    if (!group.under_way.empty()) return "wgmma not waited for: the block has ended with products under way";
  }
  return "";
}

void wgmma(bool bfloat16, unsigned tokens, float* d, const uint32_t* a, uint64_t b, Site site) {
  Warpgroup& group = own_warpgroup("wgmma", site);
  const unsigned own = block.current % kThreads, first_warp = block.current / kThreads * kWarpsOfGroup;
  if (!progress[block.current].fenced) {
    fail("wgmma: " + thread_name(block.current) + " has not called wgmma_fence() before the product at " +
         describe_site(site));
  }
  group.calls[own] = {d, a, b, site};
  group.tokens = tokens;
  group.bfloat16 = bfloat16;
  Thread& thread = current_thread();
  thread.waits_for = "wgmma";
  thread.site = site;
  thread.mask = ~0u;
  Warp& warp = current_warp();
  warp.ready &= ~(1u << block.current % kLanes);
  warp.in_collective |= 1u << block.current % kLanes;
  if (++group.arrived < kThreads) {
    yield();
    return;
  }
  group.arrived = 0;
  for (const Call& call : group.calls) {
    if (call.site.line != site.line || std::strcmp(call.site.file, site.file) != 0 || call.b != b) {
      fail("divergence: threads of one warpgroup are in wgmma at " + describe_site(call.site) + " and at " +
           describe_site(site) + ", or with different descriptors");
    }
  }
  const uint64_t committed = progress[block.current].committed;
  for (unsigned t = first_warp * kLanes; t < (first_warp + kWarpsOfGroup) * kLanes; ++t) {
    if (progress[t].committed != committed) {
      fail("divergence: " + thread_name(t) + " has called wgmma_commit() " + std::to_string(progress[t].committed) +
           " times before the product at " + describe_site(site) + ", " + thread_name(block.current) + " " +
           std::to_string(committed) + " times");
    }
  }
  Accumulators& sums = accumulators(group);
  sums.group = committed + 1;
  track();
  std::vector<Access> reads;
  for (unsigned tile = 0; tile < tokens / 8; ++tile) {
    for (unsigned half = 0; half < 2; ++half) {
      const auto address = reinterpret_cast<uintptr_t>(core_matrix(b, half, tile));
      reads.push_back({address, 128, false, false, __builtin_return_address(0)});
    }
  }
  tracked_product(reads, first_warp, static_cast<uint32_t>(sums.group));
  multiply(group, sums);
  for (unsigned w = first_warp; w < first_warp + kWarpsOfGroup; ++w) {
    count_flush(w);
    block.warps[w].in_collective = 0;
    block.warps[w].ready = ~0u;
  }
}

// ptxas would take it for a write of the registers, and serialise the products.
void hold_registers(const void* r, Site site) {
  for (const auto& sums : warpgroups[block.current / kThreads].under_way) {
    if (sums->d[block.current % kThreads] == r) {
      fail("wgmma: " + thread_name(block.current) + " calls hold_registers() on accumulators of a product under way, " +
           "at " + describe_site(site));
    }
  }
}

void wgmma_fence(Site site) {
  own_warpgroup("wgmma_fence", site);
  progress[block.current].fenced = true;
}

void wgmma_commit(Site site) {
  own_warpgroup("wgmma_commit", site);
  ++progress[block.current].committed;
}

void wgmma_wait(unsigned groups_left, Site site) {
  Warpgroup& group = own_warpgroup("wgmma_wait", site);
  Progress& own = progress[block.current];
  const unsigned thread = block.current % kThreads;
  const uint64_t done = own.committed - std::min<uint64_t>(own.committed, groups_left);
  sees(kProducts + block.current / kLanes, static_cast<uint32_t>(done));
  auto& under_way = group.under_way;
  for (size_t i = 0; i < under_way.size(); ++i) {
    Accumulators& sums = *under_way[i];
    if (sums.group > done || !sums.d[thread]) continue;
    deliver(sums, thread, site);
    sums.d[thread] = nullptr;
    own.fenced = false;
    if (++sums.delivered == kThreads) under_way.erase(under_way.begin() + static_cast<std::ptrdiff_t>(i--));
  }
}

}  // namespace emulation
