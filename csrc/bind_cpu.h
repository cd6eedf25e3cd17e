// What the CPU bindings share: checks that name the argument, and tensor -> pointer.
// Only bind_*.cpp include this; kernels see params.h.
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

#include "bind_checks.h"
#include "cpu/huge_pages.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "params.h"

namespace lutgemm::bind {

// CPU, dense and contiguous.
inline void check_memory(const Tensor& t, const char* name) {
  check(t.is_cpu(), name, ": must be a CPU tensor");
  check(t.layout() == torch::headeronly::Layout::Strided, name, ": must be a dense tensor");
  check(t.is_contiguous(), name, ": must be contiguous");
}

// CPU, contiguous, and of the given shape; -1 takes any size. Text is made on failure only: this is in every call.
inline void check_tensor(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
  bool fits = t.dim() == int64_t(shape.size());
  int64_t d = 0;
  for (int64_t size : shape) {
    if (fits && size >= 0 && t.size(d) != size) fits = false;
    ++d;
  }
  if (!fits) check(false, name, ": got shape ", shape_text(t), ", expected ", shape_text(shape));
  check_memory(t, name);
}

// An uninitialised, contiguous CPU tensor. torch::stable::empty looks the operator up by name, 0.6 us in every call.
inline Tensor empty_cpu(const int64_t* sizes, int64_t dims, DType dtype) {
  int64_t strides[kMostDims], stride = 1;
  for (int64_t d = dims; d-- > 0; stride *= std::max(sizes[d], int64_t(1))) strides[d] = stride;
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(scalar_type(dtype)));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, type, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor empty_cpu(std::initializer_list<int64_t> shape, DType dtype) {
  return empty_cpu(shape.begin(), int64_t(shape.size()), dtype);
}

// An uninitialised uint8 tensor for a prepared weight, in huge pages where there are any.
inline Tensor empty_prepared(int64_t bytes) {
  if (!wants_huge_pages(bytes)) return empty_cpu({bytes}, DType::kUInt8);
  void* data = allocate_huge(bytes);
  check(data != nullptr, "packed: out of memory for ", bytes, " bytes");
  const int64_t stride = 1;
  return torch::stable::from_blob(data, {&bytes, 1}, {&stride, 1},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Byte,
                                  free_huge);
}

// Table look-ups below which another thread costs more than it saves: some 10 us of work.
constexpr int64_t kLookupsPerThread = int64_t(1) << 19;

// f(begin, end) over [0, count), items of `lookups` look-ups each, shared among as many of torch's number of threads as
// get enough of them. One thread takes all in one range; of several each gets about `ranges_each`: four, so that one
// that comes late, or is held up, is made good for by the others; one, where a range has a cost of its own.
template <class F>
inline void for_ranges(int64_t count, int64_t lookups, const F& f, int64_t ranges_each = 4) {
  if (count <= 0) return;
  const int64_t useful = std::min(count, 1 + count * lookups / kLookupsPerThread);
  const int64_t threads = useful > 1 ? std::min(useful, int64_t(torch::stable::get_num_threads())) : 1;
  if (threads == 1) return f(0, count);
  const int64_t ranges = std::min(count, ranges_each * threads);
  parallel_items(ranges, int(threads), [&](int64_t item) { f(item * count / ranges, (item + 1) * count / ranges); });
}

// The instruction set asked for by number; refused where this CPU lacks it.
inline Isa requested_isa(int64_t isa) {
  check_range("isa", isa, int(Isa::kScalar), int(kLastIsa));
  check(isa <= int64_t(cpu_isa()), "isa=", isa, ": this CPU runs at most ", int(cpu_isa()),
        LUTGEMM_ARM64 ? " (0 scalar, 1 neon)" : " (0 scalar, 1 avx2, 2 avx512, 3 avx512vbmi)");
  return Isa(isa);
}

// x [..., K], bias [N] of x's dtype or none -> Io with y [..., N], which the caller has to fill.
inline Io make_io(const Tensor& x, const std::optional<Tensor>& bias, Tensor& y, int64_t N, int64_t K) {
  const int64_t dims = x.dim();
  int64_t sizes[kMostDims], M = 1;
  if (dims < 1 || dims > kMostDims || x.size(dims - 1) != K) {
    check(false, "x: got shape ", shape_text(x), ", its last dimension must be K=", K);
  }
  check_memory(x, "x");
  for (int64_t d = 0; d + 1 < dims; ++d) M *= sizes[d] = x.size(d);
  sizes[dims - 1] = N;
  const DType dtype = float_dtype(x, "x");
  if (bias) {
    check_tensor(*bias, "bias", {N});
    check(float_dtype(*bias, "bias") == dtype, "bias: must have the dtype of x");
  }
  y = empty_cpu(sizes, dims, dtype);
  return Io{M, x.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr, y.mutable_data_ptr(), dtype};
}

}  // namespace lutgemm::bind
