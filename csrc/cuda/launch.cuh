// Launching kernels, and what a launcher needs to know of the current device. Host code only.
//
//   launch(kernel, LaunchShape{grid, block, dynamic_shared, stream, dependent}, args...);
//
// `kernel` is a __global__ function; args are converted to its parameter types. Errors throw std::runtime_error.
// `dependent`: programmatic dependent launch (sm_90 and later). The kernel may start before the one before it in the
// stream has ended, and must call grid_dependency_wait() (ptx.cuh) before it reads what that one wrote.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

#include "cuda/device.cuh"

#if !defined(LUTGEMM_EMULATED)
#include <map>
#include <mutex>
#include <utility>
#endif

namespace lutgemm {

struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t dynamic_shared = 0;  // bytes
  void* stream = nullptr;     // cudaStream_t
  bool dependent = false;
};

#if defined(LUTGEMM_EMULATED)

inline int sm_count() { return emulation::options().sm_count; }
inline int architecture() { return emulation::options().architecture; }  // 80, 90, ...
inline size_t shared_limit() { return emulation::shared_limit(); }       // most shared bytes of a block

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchShape& shape, Arguments&&... arguments) {
  const bool dependent = shape.dependent && architecture() >= 90;
  emulation::launch(kernel, {shape.grid, shape.block, shape.dynamic_shared, dependent},
                    std::forward<Arguments>(arguments)...);
}

#else

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error of a launch is not sticky: the next call must not report it again
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline int current_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

struct DeviceFacts {
  int sm_count, architecture, shared_limit;
};

// Asked once per device: attribute queries take microseconds.
inline const DeviceFacts& device_facts() {
  static std::mutex mutex;
  static std::map<int, DeviceFacts> known;
  const int device = current_device();
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  const auto ask = [device](cudaDeviceAttr attribute) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
    return value;
  };
  const int architecture = 10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor);
  const DeviceFacts facts{ask(cudaDevAttrMultiProcessorCount), architecture,
                          ask(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  return known.emplace(device, facts).first->second;
}

inline int sm_count() { return device_facts().sm_count; }
inline int architecture() { return device_facts().architecture; }  // 80, 90, ...
inline size_t shared_limit() {
  return static_cast<size_t>(device_facts().shared_limit);
}  // most shared bytes of a block

// Of a kernel on a device, asked and set once.
struct KernelFacts {
  size_t allowed_shared = 0;  // dynamic bytes it may get
  bool waits = false;         // its code has grid_dependency_wait()
};

// Where static and dynamic shared memory together exceed 48 KB, a kernel must be told on each device how much of the
// dynamic kind it may get: once for a size, whatever the static part is.
//
// Whether the code that runs waits depends on what it was compiled for, not on the device: a GPU of a later generation
// than 9 gets what the driver makes of PTX for compute_80, in which grid_dependency_wait() is nothing.
inline KernelFacts kernel_facts(const void* kernel, size_t dynamic_shared) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, KernelFacts> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [found, is_new] = known.try_emplace({kernel, current_device()});
  KernelFacts& facts = found->second;
  if (is_new) {
    cudaFuncAttributes attributes{};
    check_cuda(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
    facts.waits = attributes.ptxVersion >= 90;
  }
  if (dynamic_shared > facts.allowed_shared) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(dynamic_shared)),
               "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)");
    facts.allowed_shared = dynamic_shared;
  }
  return facts;
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchShape& shape, Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "as many arguments as the kernel has parameters");
  const KernelFacts facts = kernel_facts(reinterpret_cast<const void*>(kernel), shape.dynamic_shared);
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.dynamic_shared;
  config.stream = static_cast<cudaStream_t>(shape.stream);
  if (shape.dependent && facts.waits) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "cudaLaunchKernelEx");
}

#endif

}  // namespace lutgemm
