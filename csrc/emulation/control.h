// The emulator's switches and its list of allowed global memory, for bindings and tests. No CUDA name is defined here.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulation {

struct Options {
  bool checks = true;     // bounds, alignment, poison, races
  bool races = true;      // the part of `checks` that compares threads
  bool counts = false;    // bank conflicts and memory sectors per access site (slow)
  unsigned seed = 0;      // 0: blocks and warps in order; else the seed of their shuffled order
  int sm_count = 4;       // few, so that small problems take the paths that split over blocks
  int architecture = 90;  // 80: 163 KB of shared memory a block; 90: 227 KB
};
extern Options current_options;
inline Options& options() { return current_options; }
size_t shared_limit();

// While it lives, kernels may access the ranges added to it. Without any they may access no global memory.
//   emulation::Allowed allowed;
//   allowed.read(codes, bytes, "codes");   // that no kernel writes: weights
//   allowed.input(x, bytes, "x");          // that a kernel before this one may still be writing
//   allowed.write(y, bytes, "y");          // reads too
// A dependent launch may touch only the first kind before grid_dependency_wait().
class Allowed {
 public:
  Allowed();
  ~Allowed();
  Allowed(const Allowed&) = delete;
  Allowed& operator=(const Allowed&) = delete;
  void read(const void* address, size_t bytes, const char* name);
  void input(const void* address, size_t bytes, const char* name);
  void write(void* address, size_t bytes, const char* name);

 private:
  size_t first_;
};

}  // namespace emulation

// For ctypes. set: one of Options by name, false when unknown. report: counts of every site as JSON, valid until the
// next call (counts.cpp describes it).
extern "C" {
__attribute__((visibility("default"))) bool emulation_set(const char* name, long value);
__attribute__((visibility("default"))) const char* emulation_report();
__attribute__((visibility("default"))) void emulation_reset_counts();
}
