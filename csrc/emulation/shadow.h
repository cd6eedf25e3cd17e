// The two cells of each byte of shared memory (shared_memory.cpp), for clocks.cpp, which gives them another meaning.
#pragma once

#include <cstddef>
#include <cstdint>

#include "emulation/memory.h"

namespace emulation {

extern uint32_t writers[kArenaBytes], readers[kArenaBytes];
size_t arena_in_use();

// In place of a writer, in both kinds of cells.
constexpr uint32_t kOutside = ~0u;       // the byte belongs to no array
constexpr uint32_t kInFlight = ~0u - 1;  // a cp.async has not arrived
constexpr uint32_t kBarrier = ~0u - 2;   // part of a barrier in shared memory
inline bool is_special(uint32_t cell) { return cell >= kBarrier; }

// Fails where a writer is one of those three, or none.
void check_special(uint32_t cell, size_t byte, const Access& access);
[[noreturn]] void fail_uninitialised(size_t byte, const Access& access);

// What a cell of the first kind says.
struct OldStamp {
  bool this_block, this_interval, atomic;
  unsigned first_thread, threads;  // one or several that it may name
};
OldStamp old_stamp(uint32_t cell);

}  // namespace emulation
