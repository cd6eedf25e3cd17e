// Who has seen what, in blocks whose threads order memory in other ways than by barriers of a block or a warp: by
// barriers in shared memory, waits for bulk copies, and waits for warpgroup products.
//
// Actors are the threads, the copies that each barrier counts, and the products of each warp. Each has a clock: a
// thread's counts what it releases, a barrier's copies are at its phase + 1, a warp's products at their group. From the
// first use of such a primitive to the end of its block, a cell of shared memory holds
//     clock (20 bits) | actor (11 bits)
// of the last writer, and of the only reader since, or the number of a set of readers. An access is ordered behind what
// a cell names if the thread has seen that clock of the actor. Seen clocks travel as a whole with what a thread
// releases (__syncwarp, __syncthreads, arrivals) to those who acquire it.
#pragma once

#include <string>
#include <vector>

#include "emulation/block.h"
#include "emulation/memory.h"

namespace emulation {

constexpr unsigned kMostBarriers = 64;
constexpr uint32_t kCopies = 0;                            // + barrier
constexpr uint32_t kProducts = kCopies + kMostBarriers;    // + warp
constexpr uint32_t kFirstThread = kProducts + kMostWarps;  // + thread
constexpr uint32_t kActors = kFirstThread + kMostThreads;

extern bool tracking;  // this block's cells are of the kind above
void track();          // from now on, if accesses are checked
void clocks_end_block();

struct Knowledge {
  std::vector<uint32_t> seen = std::vector<uint32_t>(kActors), fenced = std::vector<uint32_t>(kActors);
  void add(const Knowledge& other);
};

// Of the current thread, whose stamp these may change; nothing unless tracking.
uint32_t current_stamp();
void release_to(Knowledge& knowledge);
void acquire(const Knowledge& knowledge);
void sees(uint32_t actor, uint32_t clock);
void fence_proxy();  // what it has written is for copies and products too
bool has_seen(uint32_t actor, uint32_t clock);
uint32_t next_clock();  // of this thread, which it moves on

void order_lanes(unsigned mask);  // a __syncwarp of these lanes of the current warp
void order_block();               // a barrier of the block

void tracked_access(const Access& access);
// A bulk copy by the current thread is to write; it has `clock` of the copies of a barrier.
void tracked_copy(const Access& access, uint32_t actor, uint32_t clock);
// Products read this: those of four warps from `first_warp` on, whose threads must all be ordered behind the writers.
void tracked_product(const std::vector<Access>& accesses, unsigned first_warp, uint32_t clock);

std::string describe_barrier(uint32_t actor);  // mbarrier.cpp

}  // namespace emulation
