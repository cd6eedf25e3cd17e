// What the CUDA bindings share: registration, checks that name the argument, tensor -> pointer, the device of a call.
// Only bind_cuda*.cpp include this; kernels see cuda/problem.h.
//
// With LUTGEMM_EMULATED the same bindings serve the emulator: operators of the namespace lutgemm_emulated on CPU
// tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind_checks.h"
#include "cuda/problem.h"

#ifdef LUTGEMM_EMULATED
#include "emulation/control.h"
#else
#include <torch/csrc/stable/accelerator.h>
#endif

#ifdef LUTGEMM_EMULATED
#define LUTGEMM_GPU_NAMESPACE lutgemm_emulated
#define LUTGEMM_GPU_KEY CPU
#else
#define LUTGEMM_GPU_NAMESPACE lutgemm
#define LUTGEMM_GPU_KEY CUDA
#endif

// LUTGEMM_GPU_OPS(m) { m.def("_name_cuda(Tensor x, ...) -> Tensor"); }
// LUTGEMM_GPU_IMPL(m) { m.impl("_name_cuda", TORCH_BOX(&name_cuda)); }
#define LUTGEMM_GPU_OPS(m) STABLE_TORCH_LIBRARY_FRAGMENT(LUTGEMM_GPU_NAMESPACE, m)
#define LUTGEMM_GPU_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(LUTGEMM_GPU_NAMESPACE, LUTGEMM_GPU_KEY, m)

namespace lutgemm::cuda {

using bind::check;
using bind::check_range;
using bind::float_dtype;
using bind::requested_accuracy;
using bind::scalar_type;
using bind::shape_text;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The emulator lets the kernels of the current Call touch the memory that was named to it, and none else.
#ifdef LUTGEMM_EMULATED
void let_read(const void* data, int64_t bytes, const char* name);
void let_input(const void* data, int64_t bytes, const char* name);  // that the kernel before may still be writing
void let_write(void* data, int64_t bytes, const char* name);        // poisons it first
#else
inline void let_read(const void*, int64_t, const char*) {}
inline void let_input(const void*, int64_t, const char*) {}
inline void let_write(void*, int64_t, const char*) {}
#endif

// A kernel's memory: dense, contiguous, aligned to 16 bytes, and on the device of the call's x.
inline void check_memory(const Tensor& t, const char* name, const Tensor& x) {
#ifdef LUTGEMM_EMULATED
  check(t.is_cpu() && x.is_cpu(), name, ": must be a CPU tensor");
#else
  check(t.is_cuda() && t.get_device_index() == x.get_device_index(), name, ": must be on the device of x");
#endif
  check(t.layout() == torch::headeronly::Layout::Strided, name, ": must be a dense tensor");
  check(t.is_contiguous(), name, ": must be contiguous");
  check(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, name, ": must start at a multiple of 16 bytes");
  let_read(t.const_data_ptr(), t.numel() * int64_t(t.element_size()), name);
}

// As `check_memory`, of the given shape (-1 takes any size) and type. Text is made on failure only.
inline void check_tensor(const Tensor& t, const char* name, std::initializer_list<int64_t> shape, const Tensor& x) {
  bool fits = t.dim() == int64_t(shape.size());
  int64_t d = 0;
  for (int64_t size : shape) {
    if (fits && size >= 0 && t.size(d) != size) fits = false;
    ++d;
  }
  if (!fits) check(false, name, ": got shape ", shape_text(t), ", expected ", shape_text(shape));
  check_memory(t, name, x);
}

inline void check_tensor(const Tensor& t, const char* name, std::initializer_list<int64_t> shape, ScalarType type,
                         const Tensor& x) {
  check(t.scalar_type() == type, name, ": has another dtype than its kernel's layout");
  check_tensor(t, name, shape, x);
}

// Uninitialised, on the device of x, from torch's caching allocator: right for CUDA graphs and for the current stream.
inline Tensor empty_like_x(std::initializer_list<int64_t> shape, ScalarType type, const Tensor& x) {
  Tensor made = torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), type,
                                     std::nullopt, x.device());
  let_write(made.mutable_data_ptr(), made.numel() * int64_t(made.element_size()), "new memory");
  return made;
}

// Scratch memory of a call. Keep the tensor until the launcher has returned; null data for 0 bytes.
struct Workspace {
  std::optional<Tensor> tensor;
  void* data = nullptr;

  Workspace(int64_t bytes, const Tensor& x) {
    if (bytes <= 0) return;
    tensor = empty_like_x({bytes}, ScalarType::Byte, x);
    data = tensor->mutable_data_ptr();
  }
};

// One call on the device of x: makes it current for as long as this object lives, and knows its stream. Make it before
// anything else: tensors are checked, and memory is made, for the Call that there is.
class Call {
 public:
  explicit Call(const Tensor& x);
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
  Gpu gpu;

 private:
#ifdef LUTGEMM_EMULATED
  emulation::Allowed allowed_;
  emulation::Allowed* outer_;
#else
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// x [M, K] (rows may be a stride apart), bias [N] of x's dtype or none -> GpuIo with a new y [M, N], which the launcher
// has to fill. With M = 0 there is nothing to launch.
GpuIo make_io(const Tensor& x, const std::optional<Tensor>& bias, Tensor& y, int64_t N, int64_t K);

}  // namespace lutgemm::cuda
