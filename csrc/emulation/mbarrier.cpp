// Barriers in shared memory and the bulk copies that they count.
//
// A copy arrives as late as possible: when a thread waits for the phase that it belongs to. Until then the bytes are
// poisoned and in flight.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "emulation/block.h"
#include "emulation/clocks.h"
#include "emulation/hopper.h"
#include "emulation/memory.h"
#include "emulation/shadow.h"
#include "emulation/sites.h"

namespace emulation {

namespace {

constexpr unsigned kMostArrivals = (1u << 20) - 1, kMostBytes = (1u << 20) - 1;
constexpr int kPoison = 0xff;

struct Barrier {
  size_t offset;    // in shared memory
  uint32_t copies;  // the actor of clocks.h
  unsigned arrivals, missing;
  unsigned first_thread;  // that initialised it
  uint32_t ready;         // its clock at mbarrier_init_fence(), 0 before
  unsigned phase = 0;
  uint64_t expected = 0, arrived = 0;  // bytes in this phase
  std::vector<PendingCopy> under_way = {};
  std::vector<unsigned> waiting = {};      // threads, for this phase
  Knowledge gathered = {}, released = {};  // of arrivals in this phase and before, of complete phases
};
std::vector<Barrier> barriers;

[[noreturn]] void fail_at(const std::string& message, Site site) {
  fail(message + ", " + thread_name(block.current) + " at " + describe_site(site));
}

size_t offset_of(const void* shared) { return static_cast<size_t>(static_cast<const unsigned char*>(shared) - arena); }

size_t barrier_offset(const void* barrier, Site site) {
  need_hopper("mbarrier");
  const auto address = reinterpret_cast<uintptr_t>(barrier);
  if (!in_shared(address)) fail_at("mbarrier: the address is not in shared memory", site);
  if (address % 8) fail_at("mbarrier: misaligned, its address is no multiple of 8", site);
  return offset_of(barrier);
}

Barrier* find(size_t offset) {
  for (Barrier& barrier : barriers) {
    if (barrier.offset == offset) return &barrier;
  }
  return nullptr;
}

// For use by the current thread; `by_copies`: also by the copy engine.
Barrier& initialised(const void* address, bool by_copies, Site site) {
  const size_t offset = barrier_offset(address, site);
  Barrier* barrier = find(offset);
  if (!barrier) fail_at("mbarrier: not initialised, " + describe_shared(offset), site);
  const bool own = barrier->first_thread == block.current;
  if (barrier->ready == 0 && tracking && (by_copies || !own)) {
    fail_at("mbarrier: used before " + thread_name(barrier->first_thread) +
                " has called mbarrier_init_fence() after its initialisation, " + describe_shared(offset),
            site);
  }
  if (!own && !has_seen(kFirstThread + barrier->first_thread, barrier->ready)) {
    fail_at("mbarrier: nothing orders this behind its initialisation by " + thread_name(barrier->first_thread) + ", " +
                describe_shared(offset),
            site);
  }
  return *barrier;
}

// Ends the phase if nothing is missing; copies under way arrive if someone waits for them.
void advance(Barrier& barrier, bool someone_waits, Site site) {
  if (someone_waits || !barrier.waiting.empty()) {
    for (const PendingCopy& copy : barrier.under_way) {
      std::memcpy(copy.shared, copy.global, copy.bytes);
      barrier.arrived += copy.bytes;
    }
    barrier.under_way.clear();
  }
  if (barrier.missing || !barrier.under_way.empty() || barrier.arrived < barrier.expected) return;
  if (barrier.arrived > barrier.expected) {
    fail_at("mbarrier: bulk copies of " + std::to_string(barrier.arrived) + " bytes in a phase that expects " +
                std::to_string(barrier.expected) + ", " + describe_shared(barrier.offset),
            site);
  }
  ++barrier.phase;
  barrier.missing = barrier.arrivals;
  barrier.expected = barrier.arrived = 0;
  barrier.gathered.seen[barrier.copies] = barrier.phase;
  barrier.released.add(barrier.gathered);
  for (const unsigned thread : barrier.waiting) {
    Warp& warp = block.warps[thread / kLanes];
    warp.at_mbarrier &= ~(1u << thread % kLanes);
    warp.ready |= 1u << thread % kLanes;
  }
  barrier.waiting.clear();
}

}  // namespace

void mbarrier_begin_block() { barriers.clear(); }

std::string mbarrier_end_block() {
  for (const Barrier& barrier : barriers) {
    if (barrier.under_way.empty()) continue;
    return "bulk copy not waited for: the block has ended, and no thread waited for phase " +
           std::to_string(barrier.phase) + " of the barrier at " + describe_shared(barrier.offset);
  }
  return "";
}

void mbarrier_init(void* address, unsigned arrivals, Site site) {
  const size_t offset = barrier_offset(address, site);
  if (find(offset)) fail_at("mbarrier: initialised twice, " + describe_shared(offset), site);
  if (arrivals == 0 || arrivals > kMostArrivals) fail_at("mbarrier: 1 to 1048575 arrivals are possible", site);
  if (barriers.size() == kMostBarriers) fail_at("mbarrier: the emulator has 64 in a block at most", site);
  track();
  memory_access({reinterpret_cast<uintptr_t>(address), 8, true, false, __builtin_return_address(0)});
  if (tracking) std::fill_n(writers + offset, 8, kBarrier);
  const auto actor = kCopies + static_cast<uint32_t>(barriers.size());
  barriers.push_back({offset, actor, arrivals, arrivals, block.current, 0});
}

void mbarrier_init_fence() {
  const uint32_t now = next_clock();
  for (Barrier& barrier : barriers) {
    if (barrier.first_thread == block.current && barrier.ready == 0) barrier.ready = now;
  }
}

void mbarrier_arrive(void* address, unsigned bytes, Site site) {
  Barrier& barrier = initialised(address, false, site);
  if (barrier.missing == 0) {
    fail_at("mbarrier: more than " + std::to_string(barrier.arrivals) + " arrivals in a phase, " +
                describe_shared(barrier.offset),
            site);
  }
  barrier.expected += bytes;
  if (barrier.expected > kMostBytes) fail_at("mbarrier: a phase expects 1048575 bytes at most", site);
  --barrier.missing;
  release_to(barrier.gathered);
  advance(barrier, false, site);
}

void mbarrier_wait(void* address, unsigned parity, Site site) {
  if (parity > 1) fail_at("mbarrier: a parity is 0 or 1", site);
  Barrier* barrier = &initialised(address, false, site);
  const unsigned phase = barrier->phase;
  if (phase % 2 == parity) {
    advance(*barrier, true, site);
    if (barrier->phase == phase) {
      Thread& thread = current_thread();
      thread.waits_for = "mbarrier_wait";
      thread.site = site;
      barrier->waiting.push_back(block.current);
      current_warp().ready &= ~(1u << block.current % kLanes);
      current_warp().at_mbarrier |= 1u << block.current % kLanes;
      const size_t offset = barrier->offset;
      yield();
      barrier = find(offset);
      if (barrier->phase != phase + 1) {
        fail_at("mbarrier: two phases have ended while a thread waited for the first, " + describe_shared(offset),
                site);
      }
    }
  }
  acquire(barrier->released);
}

void bulk_copy(void* shared, const void* global, size_t bytes, void* address, Site site) {
  const void* where = __builtin_return_address(0);
  Barrier& barrier = initialised(address, true, site);
  const Access target{reinterpret_cast<uintptr_t>(shared), bytes, true, false, where};
  if (bytes % 16 || target.address % 16 || reinterpret_cast<uintptr_t>(global) % 16) {
    fail_at("bulk copy: misaligned, both addresses and the bytes are multiples of 16", site);
  }
  if (bytes == 0) fail_at("bulk copy: of no bytes", site);
  if (!in_shared(target.address)) fail_at("bulk copy: the target is not in shared memory", site);
  memory_access({reinterpret_cast<uintptr_t>(global), bytes, false, false, where});
  tracked_copy(target, barrier.copies, barrier.phase + 1);
  std::memset(shared, kPoison, bytes);
  barrier.under_way.push_back({static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global),
                               static_cast<uint32_t>(bytes), true});
  advance(barrier, false, site);
}

void need_hopper(const char* name) {
  if (options().architecture < 90) {
    fail(std::string(name) + ": only sm_90a has it, and the device is of architecture " +
         std::to_string(options().architecture));
  }
}

std::string describe_waits(unsigned thread) {
  for (const Barrier& barrier : barriers) {
    for (const unsigned waiting : barrier.waiting) {
      if (waiting != thread) continue;
      return " for phase " + std::to_string(barrier.phase) + " of the barrier at " + describe_shared(barrier.offset) +
             ", which lacks " + std::to_string(barrier.missing) + " of " + std::to_string(barrier.arrivals) +
             " arrivals and " + std::to_string(barrier.expected - barrier.arrived) + " of " +
             std::to_string(barrier.expected) + " bytes";
    }
  }
  return "";
}

std::string describe_barrier(uint32_t actor) {
  return "the barrier at " + describe_shared(barriers[actor - kCopies].offset);
}

void fence_async_proxy() {
  need_hopper("fence_async_proxy");
  track();
  fence_proxy();
}

}  // namespace emulation
