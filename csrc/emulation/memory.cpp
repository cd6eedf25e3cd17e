// What every access of an emulated kernel goes through: the functions that code compiled with -fsanitize=thread calls
// in place of the sanitizer's own, and the accesses of intrinsics and PTX wrappers.
#include "emulation/memory.h"

#include <cstring>

#include "emulation/block.h"
#include "emulation/sites.h"

namespace emulation {

namespace {

bool checking;

// Where the compiler knows the size and direction, most of this folds away.
inline __attribute__((always_inline)) void access_memory(uintptr_t address, size_t bytes, bool write, bool atomic,
                                                         const void* where) {
  if (!checking) return;
  const bool shared = in_shared(address);
  if (!shared) {
    if (on_stack(address)) return;
    // Host code of a .cu that another OS thread runs meanwhile.
    if (!on_stack(reinterpret_cast<uintptr_t>(__builtin_frame_address(0)))) return;
  }
  const Access access{address, bytes, write, atomic, where};
  if (bytes <= 16 && !(bytes & (bytes - 1)) && address & (bytes - 1)) {
    fail_access("misaligned", access, "the address is no multiple of the size");
  }
  if (shared && options().counts) count_access(access, true);
  shared ? shared_access(access) : global_access(access);
}

}  // namespace

bool memory_checked() { return checking; }

void memory_begin_launch(const void* parameters, size_t parameter_bytes, size_t dynamic_bytes) {
  shared_begin_launch(dynamic_bytes);
  global_begin_launch(parameters, parameter_bytes);
  count_begin_launch();
  checking = options().checks;
}

void memory_begin_block() {
  shared_begin_block();
  global_begin_block();
}

void memory_end_launch() { checking = false; }
void memory_switch() { shared_switch(); }
void memory_interval() { shared_interval(); }

void fail_access(const char* what, const Access& access, const std::string& rest) {
  fail(std::string(what) + ": " + thread_name(block.current) + (access.write ? " writes " : " reads ") +
       std::to_string(access.bytes) + " bytes at " + describe_code(access.where) + ": " + rest);
}

void memory_access(const Access& a) { access_memory(a.address, a.bytes, a.write, a.atomic, a.where); }

void read_bytes(void* to, const void* from, size_t bytes) {
  access_memory(reinterpret_cast<uintptr_t>(from), bytes, false, false, __builtin_return_address(0));
  std::memcpy(to, from, bytes);
}

void write_bytes(void* to, const void* from, size_t bytes) {
  access_memory(reinterpret_cast<uintptr_t>(to), bytes, true, false, __builtin_return_address(0));
  std::memcpy(to, from, bytes);
}

void prefetch(const void* from) {
  const Access access{reinterpret_cast<uintptr_t>(from), 1, false, false, __builtin_return_address(0), true};
  if (checking) global_access(access);
}

uint64_t atomic_read(const void* address, size_t bytes) {
  access_memory(reinterpret_cast<uintptr_t>(address), bytes, true, true, __builtin_return_address(0));
  uint64_t value = 0;
  std::memcpy(&value, address, bytes);
  return value;
}

void atomic_write(void* address, size_t bytes, uint64_t value) { std::memcpy(address, &value, bytes); }

}  // namespace emulation

// Hidden: the hooks of one shared object serve that object alone.
#define EMULATION_HOOK extern "C" __attribute__((visibility("hidden"))) void
#define EMULATION_ACCESS(p, bytes, write) \
  emulation::access_memory(reinterpret_cast<uintptr_t>(p), bytes, write, false, __builtin_return_address(0))
#define EMULATION_HOOKS(bytes)                                                                \
  EMULATION_HOOK __tsan_read##bytes(void* p) { EMULATION_ACCESS(p, bytes, false); }           \
  EMULATION_HOOK __tsan_write##bytes(void* p) { EMULATION_ACCESS(p, bytes, true); }           \
  EMULATION_HOOK __tsan_unaligned_read##bytes(void* p) { EMULATION_ACCESS(p, bytes, false); } \
  EMULATION_HOOK __tsan_unaligned_write##bytes(void* p) { EMULATION_ACCESS(p, bytes, true); }
EMULATION_HOOKS(1)
EMULATION_HOOKS(2)
EMULATION_HOOKS(4)
EMULATION_HOOKS(8)
EMULATION_HOOKS(16)
EMULATION_HOOK __tsan_read_range(void* p, size_t bytes) { EMULATION_ACCESS(p, bytes, false); }
EMULATION_HOOK __tsan_write_range(void* p, size_t bytes) { EMULATION_ACCESS(p, bytes, true); }
EMULATION_HOOK __tsan_init() {}
EMULATION_HOOK __tsan_func_entry(void*) {}
EMULATION_HOOK __tsan_func_exit() {}
EMULATION_HOOK __tsan_vptr_update(void**, void*) {}
EMULATION_HOOK __tsan_vptr_read(void**) {}

// std::atomic and the guards of static variables, in host code of a .cu: plain atomics, unchecked.
#define EMULATION_ATOMICS(bits, type)                                                                             \
  extern "C" __attribute__((visibility("hidden"))) type __tsan_atomic##bits##_load(const volatile type* p, int) { \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                                  \
  }                                                                                                               \
  EMULATION_HOOK __tsan_atomic##bits##_store(volatile type* p, type v, int) {                                     \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                                     \
  }                                                                                                               \
  extern "C" __attribute__((visibility("hidden"))) type __tsan_atomic##bits##_fetch_add(volatile type* p, type v, \
                                                                                        int) {                    \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                                            \
  }                                                                                                               \
  extern "C" __attribute__((visibility("hidden"))) int __tsan_atomic##bits##_compare_exchange_strong(             \
      volatile type* p, type* expected, type desired, int, int) {                                                 \
    return __atomic_compare_exchange_n(p, expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);          \
  }
EMULATION_ATOMICS(8, uint8_t)
EMULATION_ATOMICS(32, uint32_t)
EMULATION_ATOMICS(64, uint64_t)
