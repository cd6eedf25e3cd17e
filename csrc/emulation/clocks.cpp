#include "emulation/clocks.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "emulation/shadow.h"

namespace emulation {

bool tracking;

namespace {

constexpr unsigned kActorBits = 11;
constexpr uint32_t kActorMask = (1u << kActorBits) - 1, kMostClock = (1u << 20) - 1;
static_assert(kActors <= kActorMask, "an actor fits in its bits");
// Of readers: the rest of the cell is the number of a set. Of writers: the write was atomic.
constexpr uint32_t kFlag = 1u << 31;
constexpr uint32_t kBeforeOldBarrier = 1, kBeforeTracking = 2, kFirstClock = 3;  // clocks of threads
constexpr size_t kMostSets = 1 << 16;

uint32_t clocks[kActors];
uint32_t settled[kActors], settled_fenced[kActors];  // seen by all
uint32_t seen[kMostThreads][kActors], fenced[kMostThreads][kActors];
size_t actors;  // in use: what lies behind belongs to no thread

std::vector<std::vector<uint32_t>> sets;
std::unordered_map<uint64_t, uint32_t> sums;  // cell, stamp -> the cell with both

uint32_t actor_of(uint32_t cell) { return cell & kActorMask; }
uint32_t clock_of(uint32_t cell) { return (cell & ~kFlag) >> kActorBits; }
uint32_t stamp(uint32_t actor, uint32_t clock) { return clock << kActorBits | actor; }
bool is_set(uint32_t cell) { return cell & kFlag; }

void take_larger(uint32_t* to, const uint32_t* from) {
  for (size_t i = 0; i < actors; ++i) to[i] = std::max(to[i], from[i]);
}

bool ordered(unsigned thread, uint32_t cell) {
  const uint32_t actor = actor_of(cell), clock = clock_of(cell);
  return clock <= settled[actor] || clock <= seen[thread][actor] || actor == kFirstThread + thread || !options().races;
}

bool proxy_fenced(unsigned thread, uint32_t cell) {
  const uint32_t actor = actor_of(cell), clock = clock_of(cell);
  return actor < kFirstThread || clock <= settled_fenced[actor] || clock <= fenced[thread][actor] || !options().races;
}

uint32_t new_set(std::vector<uint32_t> members) {
  if (members.size() == 1) return members[0];
  sets.push_back(std::move(members));
  return kFlag | static_cast<uint32_t>(sets.size() - 1);
}

// The readers of a cell and one more.
uint32_t with_reader(uint32_t cell, uint32_t reader) {
  const auto replaced = [reader](uint32_t known) {
    return actor_of(known) == actor_of(reader) || clock_of(known) <= settled[actor_of(known)];
  };
  if (cell == 0 || (!is_set(cell) && replaced(cell))) return reader;
  const auto [found, is_new] = sums.try_emplace(uint64_t{cell} << 32 | reader);
  if (is_new) {
    std::vector<uint32_t> members = is_set(cell) ? sets[cell & ~kFlag] : std::vector<uint32_t>{cell};
    if (std::find(members.begin(), members.end(), reader) != members.end()) return found->second = cell;
    members.erase(std::remove_if(members.begin(), members.end(), replaced), members.end());
    members.push_back(reader);
    found->second = new_set(std::move(members));
  }
  return found->second;
}

// Forgets sets that no cell has any more, and readers that all have seen. Where too many are left, only products stay:
// some races of threads are then overlooked.
void compact() {
  const std::vector<std::vector<uint32_t>> old = std::move(sets);
  sets.clear();
  sums.clear();
  std::unordered_map<uint32_t, uint32_t> renamed;
  for (size_t i = 0; i < arena_in_use(); ++i) {
    if (!is_set(readers[i])) continue;
    const auto [found, is_new] = renamed.try_emplace(readers[i]);
    if (is_new) {
      std::vector<uint32_t> members;
      for (const uint32_t reader : old[readers[i] & ~kFlag]) {
        const bool keep = sets.size() < kMostSets / 2 || actor_of(reader) < kFirstThread;
        if (keep && clock_of(reader) > settled[actor_of(reader)]) members.push_back(reader);
      }
      found->second = members.empty() ? 0 : new_set(std::move(members));
    }
    readers[i] = found->second;
  }
}

std::string describe_actor(uint32_t cell) {
  const uint32_t actor = actor_of(cell);
  if (actor >= kFirstThread) return thread_name(actor - kFirstThread);
  if (actor >= kProducts) return "a product of warp " + std::to_string(actor - kProducts);
  return "a bulk copy for phase " + std::to_string(clock_of(cell) - 1) + " of " + describe_barrier(actor);
}

[[noreturn]] void fail_unordered(uint32_t cell, bool written, size_t byte, const Access& access, unsigned thread) {
  const char* kind = "race";
  if (actor_of(cell) < kFirstThread) kind = "wgmma not waited for";
  if (actor_of(cell) < kProducts) kind = "bulk copy not waited for";
  const std::string who = thread == block.current ? "" : ", which " + thread_name(thread) + " has not seen";
  fail_access(kind, access,
              describe_shared(byte) + (written ? " was written by " : " was read by ") + describe_actor(cell) +
                  ", nothing between that orders them" + who);
}

void check_writer(uint32_t cell, size_t byte, const Access& access, unsigned thread) {
  check_special(cell, byte, access);
  if (cell == 0) {
    if (!access.write || access.atomic) fail_uninitialised(byte, access);
    return;
  }
  if (access.atomic && cell & kFlag) return;
  if (!ordered(thread, cell)) fail_unordered(cell, true, byte, access, thread);
}

void check_readers(uint32_t cell, size_t byte, const Access& access) {
  if (cell == 0) return;
  const uint32_t* first = is_set(cell) ? sets[cell & ~kFlag].data() : &cell;
  const size_t count = is_set(cell) ? sets[cell & ~kFlag].size() : 1;
  for (const uint32_t* reader = first; reader < first + count; ++reader) {
    if (!ordered(block.current, *reader)) fail_unordered(*reader, false, byte, access, block.current);
  }
}

void check_fenced(uint32_t cell, size_t byte, const Access& access, unsigned thread) {
  if (cell == 0 || proxy_fenced(thread, cell)) return;
  fail_access("no proxy fence", access,
              describe_shared(byte) + " was written by " + describe_actor(cell) +
                  ", which has not called fence_async_proxy() between that and the barrier");
}

// Calls function(first, last) for each run of bytes with the same two cells.
template <typename Function>
void for_runs(const Access& access, Function function) {
  if (sets.size() > kMostSets) compact();
  const size_t begin = access.address - reinterpret_cast<uintptr_t>(arena), end = begin + access.bytes;
  if (end > kArenaBytes) fail_access("out of bounds", access, describe_shared(begin));
  for (size_t i = begin, last = begin; i < end; i = last) {
    while (last < end && writers[last] == writers[i] && readers[last] == readers[i]) ++last;
    function(i, last);
  }
}

void tick(unsigned thread) {
  if (++clocks[kFirstThread + thread] > kMostClock) fail("the emulator counts 2^20 releases of a thread at most");
}

uint32_t converted_writer(uint32_t cell) {
  if (is_special(cell)) return cell;
  const OldStamp old = old_stamp(cell);
  if (!old.this_block) return 0;
  const uint32_t clock = old.this_interval ? kBeforeTracking : kBeforeOldBarrier;
  return old.atomic ? stamp(kFirstThread, clock) | kFlag : stamp(kFirstThread + old.first_thread, clock);
}

uint32_t converted_readers(uint32_t cell) {
  const OldStamp old = old_stamp(cell);
  if (!old.this_interval) return 0;
  const uint64_t key = uint64_t{old.first_thread} << 32 | old.threads;
  const auto [found, is_new] = sums.try_emplace(key);
  if (is_new) {
    std::vector<uint32_t> members;
    for (unsigned t = old.first_thread; t < old.first_thread + old.threads; ++t) {
      members.push_back(stamp(kFirstThread + t, kBeforeTracking));
    }
    found->second = new_set(std::move(members));
  }
  return found->second;
}

}  // namespace

void Knowledge::add(const Knowledge& other) {
  take_larger(seen.data(), other.seen.data());
  take_larger(fenced.data(), other.fenced.data());
}

// What threads did in this interval before is known by thread alone; lanes of one warp are taken to be in order.
void track() {
  if (tracking || !memory_checked()) return;
  tracking = true;
  actors = kFirstThread + block.thread_count;
  for (size_t actor = 0; actor < actors; ++actor) {
    clocks[actor] = actor < kFirstThread ? 0 : kFirstClock;
    settled[actor] = actor < kFirstThread ? 0 : kBeforeOldBarrier;
    settled_fenced[actor] = 0;
  }
  for (unsigned t = 0; t < block.thread_count; ++t) {
    std::fill(seen[t], seen[t] + actors, 0u);
    std::fill(fenced[t], fenced[t] + actors, 0u);
    const unsigned lanes = std::min(kLanes, block.thread_count - t / kLanes * kLanes);
    std::fill_n(seen[t] + kFirstThread + t / kLanes * kLanes, lanes, kBeforeTracking);
  }
  sets.clear();
  sums.clear();
  for (size_t i = 0; i < arena_in_use(); ++i) {
    if (writers[i]) writers[i] = converted_writer(writers[i]);
    if (readers[i]) readers[i] = converted_readers(readers[i]);
  }
  sums.clear();
  memory_switch();
}

void clocks_end_block() {
  if (tracking) std::fill(readers, readers + arena_in_use(), 0u);
  tracking = false;
}

uint32_t current_stamp() {
  const uint32_t actor = kFirstThread + block.current;
  return stamp(actor, clocks[actor]);
}

void release_to(Knowledge& knowledge) {
  if (!tracking) return;
  take_larger(knowledge.seen.data(), seen[block.current]);
  take_larger(knowledge.fenced.data(), fenced[block.current]);
  knowledge.seen[kFirstThread + block.current] = next_clock();
}

void acquire(const Knowledge& knowledge) {
  if (!tracking) return;
  take_larger(seen[block.current], knowledge.seen.data());
  take_larger(fenced[block.current], knowledge.fenced.data());
}

void sees(uint32_t actor, uint32_t clock) {
  if (tracking) seen[block.current][actor] = std::max(seen[block.current][actor], clock);
}

void fence_proxy() {
  if (tracking) fenced[block.current][kFirstThread + block.current] = next_clock();
}

bool has_seen(uint32_t actor, uint32_t clock) { return !tracking || ordered(block.current, stamp(actor, clock)); }

uint32_t next_clock() {
  if (!tracking) return 1;
  const uint32_t now = clocks[kFirstThread + block.current];
  tick(block.current);
  memory_switch();
  return now;
}

void order_lanes(unsigned mask) {
  if (!tracking) return;
  const unsigned first = block.current / kLanes * kLanes;
  static Knowledge all;
  std::fill(all.seen.begin(), all.seen.end(), 0u);
  std::fill(all.fenced.begin(), all.fenced.end(), 0u);
  for (unsigned t = first; t < first + kLanes; ++t) {
    if (!(mask >> (t - first) & 1u)) continue;
    take_larger(all.seen.data(), seen[t]);
    take_larger(all.fenced.data(), fenced[t]);
    all.seen[kFirstThread + t] = clocks[kFirstThread + t];
    tick(t);
  }
  for (unsigned t = first; t < first + kLanes; ++t) {
    if (!(mask >> (t - first) & 1u)) continue;
    std::copy_n(all.seen.begin(), actors, seen[t]);
    std::copy_n(all.fenced.begin(), actors, fenced[t]);
  }
}

void order_block() {
  if (!tracking) return;
  for (unsigned t = 0; t < block.thread_count; ++t) {
    const uint32_t actor = kFirstThread + t;
    for (uint32_t other = 0; other < kFirstThread; ++other) settled[other] = std::max(settled[other], seen[t][other]);
    settled[actor] = clocks[actor];
    settled_fenced[actor] = fenced[t][actor];
    tick(t);
  }
}

void tracked_access(const Access& access) {
  const uint32_t own = current_stamp();
  for_runs(access, [&](size_t first, size_t last) {
    check_writer(writers[first], first, access, block.current);
    if (!access.write) {
      std::fill(readers + first, readers + last, with_reader(readers[first], own));
      return;
    }
    check_readers(readers[first], first, access);
    std::fill(writers + first, writers + last, access.atomic ? own | kFlag : own);
    std::fill(readers + first, readers + last, 0u);
  });
}

void tracked_copy(const Access& access, uint32_t actor, uint32_t clock) {
  if (!tracking) return;
  for_runs(access, [&](size_t first, size_t last) {
    check_writer(writers[first], first, access, block.current);
    check_fenced(writers[first], first, access, block.current);
    check_readers(readers[first], first, access);
    std::fill(writers + first, writers + last, stamp(actor, clock));
    std::fill(readers + first, readers + last, 0u);
  });
}

void tracked_product(const std::vector<Access>& accesses, unsigned first_warp, uint32_t clock) {
  if (!tracking) return;
  const unsigned first_thread = first_warp * kLanes, last_thread = first_thread + 4 * kLanes;
  uint32_t checked = kOutside;  // rows of a matrix mostly have one writer
  for (const Access& access : accesses) {
    for_runs(access, [&](size_t first, size_t last) {
      const uint32_t writer = writers[first];
      if (writer != checked || writer == kOutside) {
        for (unsigned t = first_thread; t < last_thread; ++t) check_writer(writer, first, access, t);
        for (unsigned t = first_thread; t < last_thread; ++t) check_fenced(writer, first, access, t);
      }
      checked = writer;
      uint32_t cell = readers[first];
      for (unsigned w = first_warp; w < first_warp + 4; ++w) cell = with_reader(cell, stamp(kProducts + w, clock));
      std::fill(readers + first, readers + last, cell);
    });
  }
}

}  // namespace emulation
