// Checks of memory accesses, as the emulator's files share them: what every access goes through (memory.cpp), shared
// memory (shared_memory.cpp), global memory (global_memory.cpp), counts (counts.cpp).
#pragma once

#include <string>

#include "emulation/runtime.h"

namespace emulation {

struct Access {
  uintptr_t address;
  size_t bytes;
  bool write;
  bool atomic;
  const void* where;      // the code address that it returns to
  bool prefetch = false;  // moves a whole line: only its address is checked
};

// memory.cpp
void memory_begin_launch(const void* parameters, size_t parameter_bytes, size_t dynamic_bytes);
void memory_begin_block();
void memory_end_launch();
void memory_switch();    // block.current has changed, or its warp's order
void memory_interval();  // all threads have passed a barrier of the block
void memory_access(const Access& access);
bool memory_checked();  // a kernel runs and is checked
[[noreturn]] void fail_access(const char* what, const Access& access, const std::string& rest);

// shared_memory.cpp
void shared_begin_launch(size_t dynamic_bytes);
void shared_begin_block();
void shared_switch();
void shared_interval();
constexpr size_t kArenaBytes = 256 * 1024;  // all shared memory lies in the arena
extern unsigned char arena[kArenaBytes];
inline bool in_shared(uintptr_t address) { return address - reinterpret_cast<uintptr_t>(arena) < kArenaBytes; }
void shared_access(const Access& access);
std::string describe_shared(size_t offset);

// global_memory.cpp
void global_begin_launch(const void* parameters, size_t parameter_bytes);
void global_begin_block();
void global_access(const Access& access);

// counts.cpp: `flush` evaluates what the lanes of a warp did since they last were together.
void count_begin_launch();
void count_access(const Access& access, bool shared);
void count_flush(unsigned warp);

}  // namespace emulation
