// Shared memory of the emulated block: its arrays, poison, bounds, races, and copies that are still under way.
//
// One arena holds the dynamic array and, behind it, the static ones with gaps between. Two 32-bit cells belong to each
// byte: who wrote it last, and who read it since. A cell is a stamp
//     interval (11 bits) | order (10 bits) | who (11 bits)
// interval counts barriers of the block, over blocks and launches; order counts __syncwarp of the warp within the
// interval; who is a thread of the block or one of the values below. Two accesses in one interval by different threads,
// one of them a write, are a race, unless both are of one warp and differ in order. From the first barrier in shared
// memory of a block on, its cells are those of clocks.h.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulation/block.h"
#include "emulation/clocks.h"
#include "emulation/memory.h"
#include "emulation/shadow.h"

namespace emulation {

alignas(4096) unsigned char arena[kArenaBytes];
alignas(64) uint32_t writers[kArenaBytes], readers[kArenaBytes];

namespace {

constexpr unsigned kWhoBits = 11, kOrderBits = 10, kIntervalBits = 11;
constexpr uint32_t kWhoMask = (1u << kWhoBits) - 1, kOrderMask = (1u << kOrderBits) - 1;
constexpr uint32_t kLanesOfWarp = 1024;                         // + warp: several lanes of that warp (readers)
constexpr uint32_t kAtomic = 2046;                              // atomic operations, of any threads (writers)
constexpr uint32_t kSeveralWarps = 2047;                        // threads of several warps (readers)
constexpr uint32_t kMostIntervals = (1u << kIntervalBits) - 2;  // no stamp is a special cell

constexpr size_t kGapBytes = 128;
constexpr size_t kStaticLimit = 48 * 1024;
constexpr int kPoison = 0xff;  // NaN in every float type

struct SharedArray {
  size_t begin, bytes;
  const void* key;
  const char* name;
};
std::vector<SharedArray> arrays;  // the dynamic one first
size_t arena_used, static_bytes, dynamic_bytes;

uint32_t interval = 1;
uint32_t block_start;     // the least stamp of this block
uint32_t interval_start;  // the least stamp of this interval
uint32_t own_stamp, own_lanes_stamp, several_stamp;

uint32_t stamp_of(uint32_t at, uint32_t order, uint32_t who) {
  return at << (kOrderBits + kWhoBits) | order << kWhoBits | who;
}

// Stamps start anew; which bytes were written since the block began stays known.
void renew_stamps() {
  const uint32_t written = stamp_of(1, 0, 0);
  for (size_t i = tracking ? arena_used : 0; i < kArenaBytes; ++i) {
    if (!is_special(writers[i])) writers[i] = writers[i] >= block_start ? written : 0;
    readers[i] = 0;
  }
  block_start = written;
  interval = 2;
}

void next_interval() {
  if (++interval > kMostIntervals) renew_stamps();
  for (unsigned w = 0; w < block.warp_count; ++w) block.warps[w].order = 0;
  shared_switch();
}

size_t add_array(const void* key, size_t bytes, const char* name) {
  const size_t begin = arena_used;
  arrays.push_back({begin, bytes, key, name});
  std::memset(arena + begin, kPoison, bytes);
  std::fill(writers + begin, writers + begin + bytes, 0u);
  if (tracking) std::fill(readers + begin, readers + begin + bytes, 0u);  // else they are old stamps
  arena_used = (begin + bytes + kGapBytes + 127) / 128 * 128;
  return begin;
}

std::string describe(size_t offset) {
  const SharedArray* before = &arrays[0];
  for (const SharedArray& array : arrays) {
    if (array.begin <= offset && array.begin >= before->begin) before = &array;
  }
  const size_t at = offset - before->begin;
  const std::string name = std::string(before->name) + " (" + std::to_string(before->bytes) + " bytes)";
  if (at < before->bytes) return "byte " + std::to_string(at) + " of shared " + name;
  return std::to_string(at - before->bytes) + " bytes behind the end of shared " + name;
}

std::string describe_who(uint32_t cell) {
  const uint32_t who = cell & kWhoMask;
  if (who == kSeveralWarps) return "threads of several warps";
  if (who == kAtomic) return "an atomic operation";
  if (who >= kLanesOfWarp) return "several lanes of warp " + std::to_string(who - kLanesOfWarp);
  return thread_name(who);
}

uint32_t warp_of(uint32_t who) { return who >= kLanesOfWarp ? who - kLanesOfWarp : who / kLanes; }

// Whether what `cell` (of this interval) marks may happen at the same time as an access of the current thread.
bool unordered(uint32_t cell) {
  const uint32_t who = cell & kWhoMask;
  if (who == kSeveralWarps || who == kAtomic) return true;
  if (who == block.current) return false;
  return warp_of(who) != block.current / kLanes || !((cell ^ own_stamp) >> kWhoBits & kOrderMask);
}

void check_writer(uint32_t cell, size_t byte, const Access& access) {
  check_special(cell, byte, access);
  if (cell < block_start && (!access.write || access.atomic)) fail_uninitialised(byte, access);
  if (access.atomic && (cell & kWhoMask) == kAtomic) return;
  if (options().races && cell >= interval_start && unordered(cell)) {
    fail_access("race", access, describe(byte) + " was written by " + describe_who(cell) + ", no barrier between");
  }
}

void check_reader(uint32_t cell, size_t byte, const Access& access) {
  if (options().races && cell >= interval_start && unordered(cell)) {
    fail_access("race", access, describe(byte) + " was read by " + describe_who(cell) + ", no barrier between");
  }
}

void read_byte(size_t i, const Access& access) {
  if (writers[i] - block_start >= interval_start - block_start) check_writer(writers[i], i, access);
  const uint32_t reader = readers[i];
  if (reader == own_stamp || reader == own_lanes_stamp || reader == several_stamp) return;
  if (reader < interval_start) {
    readers[i] = own_stamp;
  } else if (warp_of(reader & kWhoMask) != block.current / kLanes) {
    readers[i] = several_stamp;
  } else if ((reader ^ own_stamp) >> kWhoBits) {
    readers[i] = own_stamp;  // what was ordered before this read is so before whatever this read is ordered before
  } else {
    readers[i] = own_lanes_stamp;
  }
}

// Cells of four bytes at a time. Masks are all ones where a comparison holds.
using Cells = uint32_t __attribute__((vector_size(16)));
using Mask = int32_t __attribute__((vector_size(16)));

Cells load_cells(const uint32_t* p) {
  Cells cells;
  std::memcpy(&cells, p, sizeof(cells));
  return cells;
}

bool all(Mask mask) { return (mask[0] & mask[1] & mask[2] & mask[3]) != 0; }

bool read_four(size_t i) {
  const Cells writer = load_cells(writers + i), reader = load_cells(readers + i);
  const Mask old = reader < interval_start;
  const Mask seen = (reader == own_stamp) | (reader == own_lanes_stamp) | (reader == several_stamp);
  if (!all((writer - block_start < interval_start - block_start) & (seen | old))) return false;
  const Cells marked = old ? Cells{} + own_stamp : reader;
  std::memcpy(readers + i, &marked, sizeof(marked));
  return true;
}

bool write_four(size_t i) {
  const Cells writer = load_cells(writers + i), reader = load_cells(readers + i);
  const Mask free =
      ((writer < interval_start) | (writer == own_stamp)) & ((reader < interval_start) | (reader == own_stamp));
  if (!all(free)) return false;
  const Cells marked = Cells{} + own_stamp;
  std::memcpy(writers + i, &marked, sizeof(marked));
  return true;
}

void write_byte(size_t i, const Access& access) {
  const uint32_t writer = writers[i];
  if ((writer >= interval_start && writer != own_stamp) || access.atomic) check_writer(writer, i, access);
  check_reader(readers[i], i, access);
  writers[i] = access.atomic ? several_stamp - 1 : own_stamp;
}
static_assert(kAtomic == kSeveralWarps - 1, "the stamp of an atomic operation is the one before several_stamp");

size_t offset_of(const void* shared) { return static_cast<size_t>(static_cast<const unsigned char*>(shared) - arena); }

}  // namespace

void shared_begin_launch(size_t bytes) {
  if (bytes > shared_limit()) {
    throw std::runtime_error("shared memory: a launch with " + std::to_string(bytes) + " bytes of dynamic memory; " +
                             std::to_string(shared_limit()) + " are possible");
  }
  static const bool once = [] { return std::fill(writers, writers + kArenaBytes, kOutside), true; }();
  (void)once;
  dynamic_bytes = bytes;
}

void shared_begin_block() {
  clocks_end_block();
  std::fill(writers, writers + arena_used, kOutside);
  arrays.clear();
  arena_used = static_bytes = 0;
  add_array(nullptr, dynamic_bytes, "dynamic_shared()");
  next_interval();
  block_start = interval_start;
}

void shared_switch() {
  interval_start = stamp_of(interval, 0, 0);
  own_stamp = stamp_of(interval, current_warp().order & kOrderMask, block.current);
  own_lanes_stamp = (own_stamp & ~kWhoMask) | (kLanesOfWarp + block.current / kLanes);
  several_stamp = interval_start | kSeveralWarps;
  if (tracking) own_stamp = current_stamp();
}

void shared_interval() {
  order_block();
  next_interval();
}

void shared_access(const Access& access) {
  if (tracking) {
    tracked_access(access);
    return;
  }
  const size_t begin = offset_of(reinterpret_cast<const void*>(access.address)), end = begin + access.bytes;
  if (end > kArenaBytes) fail_access("out of bounds", access, describe(begin));
  size_t i = begin;
  if (access.bytes % 4 == 0 && !access.atomic) {
    while (i < end && (access.write ? write_four(i) : read_four(i))) i += 4;
  }
  for (; i < end; ++i) access.write ? write_byte(i, access) : read_byte(i, access);
}

std::string describe_shared(size_t offset) { return describe(offset); }
size_t arena_in_use() { return arena_used; }

void check_special(uint32_t cell, size_t byte, const Access& access) {
  if (cell == kOutside) fail_access("out of bounds", access, describe(byte));
  if (cell == kInFlight) fail_access("cp.async not waited for", access, describe(byte) + " is still to be copied");
  if (cell == kBarrier) fail_access("mbarrier", access, describe(byte) + " is part of a barrier");
}

void fail_uninitialised(size_t byte, const Access& access) {
  fail_access("uninitialised", access,
              describe(byte) + " was not written by this block, or only by a thread that no barrier orders before");
}

OldStamp old_stamp(uint32_t cell) {
  const uint32_t who = cell & kWhoMask;
  OldStamp old{cell >= block_start, cell >= interval_start, who == kAtomic, who, 1};
  if (who == kAtomic) old.first_thread = 0;
  if (who == kSeveralWarps) {
    old.first_thread = 0;
    old.threads = block.thread_count;
  } else if (who >= kLanesOfWarp && who != kAtomic) {
    old.first_thread = (who - kLanesOfWarp) * kLanes;
    old.threads = std::min(kLanes, block.thread_count - old.first_thread);
  }
  return old;
}

unsigned char* dynamic_shared() { return arena; }

void* static_shared(const void* key, size_t bytes, const char* name) {
  for (const SharedArray& array : arrays) {
    if (array.key == key) return arena + array.begin;
  }
  static_bytes += (bytes + 15) / 16 * 16;
  if (static_bytes > kStaticLimit || static_bytes + dynamic_bytes > shared_limit()) {
    fail("shared memory: with " + std::string(name) + " the block has " + std::to_string(static_bytes) +
         " bytes of static and " + std::to_string(dynamic_bytes) + " of dynamic memory; 49152 static and " +
         std::to_string(shared_limit()) + " together are possible");
  }
  if (arena_used + bytes + kGapBytes > kArenaBytes) fail("shared memory: too many static arrays for the emulator");
  return arena + add_array(key, bytes, name);
}

// The bytes are poisoned and in flight from here until the wait that delivers them.
void cp_async(void* shared, const void* global, size_t bytes, bool valid) {
  const void* where = __builtin_return_address(0);
  if (valid) memory_access({reinterpret_cast<uintptr_t>(global), bytes, false, false, where});
  const Access target{reinterpret_cast<uintptr_t>(shared), bytes, true, false, where};
  memory_access(target);
  if (memory_checked()) {
    if (!in_shared(target.address)) fail_access("cp.async", target, "the target is not in shared memory");
    std::memset(shared, kPoison, bytes);
    std::fill(writers + offset_of(shared), writers + offset_of(shared) + bytes, kInFlight);
  }
  current_thread().copies.push_back({static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global),
                                     static_cast<uint32_t>(bytes), valid});
}

void cp_async_commit() { current_thread().group_ends.push_back(current_thread().copies.size()); }

void cp_async_wait(int groups_left) {
  Thread& thread = current_thread();
  const size_t left = static_cast<size_t>(groups_left);
  if (thread.group_ends.size() <= left) return;
  const size_t groups = thread.group_ends.size() - left, copies = thread.group_ends[groups - 1];
  for (size_t i = 0; i < copies; ++i) {
    const PendingCopy& copy = thread.copies[i];
    if (copy.valid) {
      std::memcpy(copy.shared, copy.global, copy.bytes);
    } else {
      std::memset(copy.shared, 0, copy.bytes);
    }
    const size_t offset = offset_of(copy.shared);
    if (memory_checked()) std::fill(writers + offset, writers + offset + copy.bytes, own_stamp);
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<std::ptrdiff_t>(copies));
  thread.group_ends.erase(thread.group_ends.begin(), thread.group_ends.begin() + static_cast<std::ptrdiff_t>(groups));
  for (size_t& end : thread.group_ends) end -= copies;
}

}  // namespace emulation
