// One block's state, shared by the emulator's own files: fibers and warps (block.cpp), collectives (warp.cpp),
// memory checks (memory.h), counts (counts.cpp). One launch runs at a time, so there is one of each.
#pragma once

#include <string>
#include <vector>

#include "emulation/runtime.h"

namespace emulation {

constexpr unsigned kLanes = 32;
constexpr unsigned kMostThreads = 1024;
constexpr unsigned kMostWarps = kMostThreads / kLanes;
constexpr int kSlotWords = 16;

struct Slot {
  uint32_t in[kSlotWords], out[kSlotWords];
};
using Combine = void (*)(Slot* lanes, unsigned mask, uint32_t argument);

struct PendingCopy {
  unsigned char* shared;
  const unsigned char* global;
  uint32_t bytes;
  bool valid;
};

struct Thread {
  void* stack_pointer;
  uint3 index;
  // What a waiting thread waits for.
  const char* waits_for;
  Site site;
  unsigned mask;
  // cp.async: copies issued, oldest first; copies below group_ends[i] belong to committed group i or an earlier one.
  std::vector<PendingCopy> copies;
  std::vector<size_t> group_ends;
  bool waited_for_launch;  // has called grid_dependency_wait()
};

// Sets of lanes as bits. A lane is ready, in a collective, at a barrier of the block or in shared memory, or done.
struct Warp {
  unsigned lanes, ready, in_collective, at_barrier, at_mbarrier, done;
  uint32_t order;  // how many collectives that order memory these lanes have passed in this barrier interval
  Slot slots[kLanes];
};

struct Block {
  uint3 index, size, grid;
  unsigned thread_count, warp_count;
  unsigned current;  // the running thread
  unsigned at_barrier;
  int barrier_votes;
  int barrier_result;
  Thread threads[kMostThreads];
  Warp warps[kMostWarps];
  bool running;    // a fiber runs, not the launcher
  bool dependent;  // launched while the launch before it may still run
  bool waited;     // some thread of the launch has waited for that one
  const void* kernel;
};
extern Block block;

inline Thread& current_thread() { return block.threads[block.current]; }
inline Warp& current_warp() { return block.warps[block.current / kLanes]; }

// Ends the launch with this message; called by fibers and by the launcher.
[[noreturn]] void fail(const std::string& message);
// As `fail` in a fiber; in host code, which may not be left by an exception here, the next launch throws it.
void fail_undefined(const std::string& message);
std::string thread_name(unsigned thread);
void yield();  // the current thread waits: another runs

// The stacks of all threads, in one mapping.
constexpr size_t kStackBytes = 128 * 1024, kGuardBytes = 64 * 1024, kStackStride = kStackBytes + kGuardBytes;
extern unsigned char* stacks;
inline bool on_stack(uintptr_t address) {
  return address - reinterpret_cast<uintptr_t>(stacks) < kStackStride * kMostThreads;
}

// mbarrier.cpp, wgmma.cpp. At the end of a block: an error, or "".
void mbarrier_begin_block();
std::string mbarrier_end_block();
std::string describe_waits(unsigned thread);  // what a thread in mbarrier_wait waits for
void wgmma_begin_block();
std::string wgmma_end_block();
void need_hopper(const char* name);  // fails on a device without what ptx_hopper.cuh has

// Blocks until every lane of `mask` has called it with the same name, mask and site; the last one runs `combine`.
void collective(Combine combine, const char* name, unsigned mask, uint32_t argument, Site site);

}  // namespace emulation
