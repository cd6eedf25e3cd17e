// What the CPU and CUDA bindings share: checks that name the argument, and dtypes.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "params.h"

namespace lutgemm::bind {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws std::runtime_error (RuntimeError in Python) of the joined text unless `ok`.
template <class... Text>
inline void check(bool ok, const Text&... text) {
  if (__builtin_expect(ok, true)) return;
  std::ostringstream message;
  ((message << text), ...);
  throw std::runtime_error(message.str());
}

inline std::string shape_text(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t d = 0; d < t.dim(); ++d) text << (d ? ", " : "") << t.size(d);
  text << ']';
  return text.str();
}

inline std::string shape_text(std::initializer_list<int64_t> shape) {
  std::ostringstream text;
  const char* separator = "[";
  for (int64_t size : shape) {
    text << separator;
    size < 0 ? text << '*' : text << size;
    separator = ", ";
  }
  return text.str() + "]";
}

inline void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  check(low <= value && value <= high, name, "=", value, ": must be from ", low, " to ", high);
}

inline Accuracy requested_accuracy(int64_t accuracy) {
  check_range("accuracy", accuracy, int(Accuracy::kFast), int(Accuracy::kExact));
  return Accuracy(accuracy);
}

// fp32, fp16 or bf16. Operators take a dtype as ScalarType, and no strings: torch's conversion of a string argument
// leaks it, and the small blocks that stay behind keep freed weights' memory from being used again.
inline DType float_dtype(ScalarType dtype, const char* name) {
  switch (dtype) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      check(false, name, ": must be float32, float16 or bfloat16");
      return DType::kFloat32;
  }
}

inline DType float_dtype(const Tensor& t, const char* name) { return float_dtype(t.scalar_type(), name); }

inline ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return ScalarType::Half;
    case DType::kBFloat16:
      return ScalarType::BFloat16;
    case DType::kUInt8:
      return ScalarType::Byte;
    default:
      return ScalarType::Float;
  }
}

constexpr int64_t kMostDims = 64;  // of a torch tensor

}  // namespace lutgemm::bind
