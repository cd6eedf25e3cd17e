// What emulated kernels call in the emulator: thread indices, barriers, collectives, reported accesses, launches.
//
// A launch runs its blocks one after another, a block's threads as fibers of the calling OS thread (block.cpp). Errors
// of a kernel end the launch with std::runtime_error; the process goes on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emulation/control.h"
#include "emulation/vector_types.h"

namespace emulation {

// Where in the source a collective was called: filled in by default arguments at the call.
struct Site {
  const char* file;
  int line;
};
#define EMULATION_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// Constant for the whole life of one thread's call of the kernel, as the attribute promises.
__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) uint3 block_size();
__attribute__((const)) uint3 grid_size();

unsigned char* dynamic_shared();
void* static_shared(const void* key, size_t bytes, const char* name);

enum class Votes { kNone, kAny, kAll, kCount };
int sync_threads(Votes votes, int predicate, Site site);

// Collectives of the lanes in `mask`: each blocks until all of them have called it at the same line. Values travel in
// registers, or in arrays of the calling fiber's stack, so that nothing but a kernel's own accesses is instrumented.
void sync_warp(unsigned mask, Site site);
uint64_t shuffle(const char* name, unsigned mask, uint64_t value, uint32_t source_lane, Site site);
enum class WarpOp { kBallot, kMatch, kAdd, kMax, kMin, kUnsignedMax, kUnsignedMin };
uint32_t warp_op(WarpOp op, const char* name, unsigned mask, uint32_t value, Site site);
enum class MmaKind { kF16, kBF16, kS8S8, kU8S8, kS8U8, kU8U8 };
void mma(MmaKind kind, void* d, const uint32_t* a, const uint32_t* b, Site site);
void ldmatrix(uint32_t* r, int matrices, bool transposed, const void* row, Site site);

// Accesses that the instrumentation of the compiler would not see, or see in pieces.
void read_bytes(void* to, const void* from, size_t bytes);
void write_bytes(void* to, const void* from, size_t bytes);
void prefetch(const void* from);  // checks the address
uint64_t atomic_read(const void* address, size_t bytes);
void atomic_write(void* address, size_t bytes, uint64_t value);

void cp_async(void* shared, const void* global, size_t bytes, bool valid);
void cp_async_commit();
void cp_async_wait(int groups_left);

void grid_dependency_wait();

struct LaunchBounds {
  dim3 grid, block;
  size_t dynamic_shared;
  bool dependent;
};
void launch_body(void (*body)(void*), void* context, const void* kernel, size_t context_bytes,
                 const LaunchBounds& bounds);

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchBounds& bounds, Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "as many arguments as the kernel has parameters");
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> arguments;
  } call{kernel, {static_cast<Parameters>(std::forward<Arguments>(arguments))...}};
  const auto body = [](void* context) {
    Call* call = static_cast<Call*>(context);
    std::apply(call->kernel, call->arguments);
  };
  launch_body(body, &call, reinterpret_cast<const void*>(kernel), sizeof(call), bounds);
}

}  // namespace emulation
