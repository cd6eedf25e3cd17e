// Lets Python run the test kernels of a .cu file by name:
//     LUTGEMM_TEST_KERNELS({"name", kernel}, ...)
// All kernels take (const void* a, const void* b, void* y, int n): two inputs and an output that tests fill and read.
#pragma once

#include <map>
#include <string>

#include "cuda/launch.cuh"

namespace lutgemm {

using TestKernel = void (*)(const void*, const void*, void*, int);

struct TestCall {
  const void* a;
  int64_t a_bytes;
  const void* b;
  int64_t b_bytes;
  void* y;
  int64_t y_bytes, n, blocks, threads_x, threads_y, dynamic_shared, dependent;
};

// Null, or what the launch threw; valid until the next call.
inline const char* run_test_kernel(TestKernel kernel, const TestCall& call) {
  static std::string error;
  try {
#if defined(LUTGEMM_EMULATED)
    emulation::Allowed allowed;
    allowed.read(call.a, static_cast<size_t>(call.a_bytes), "a");
    allowed.input(call.b, static_cast<size_t>(call.b_bytes), "b");
    allowed.write(call.y, static_cast<size_t>(call.y_bytes), "y");
#endif
    const dim3 block(static_cast<unsigned>(call.threads_x), static_cast<unsigned>(call.threads_y));
    const LaunchShape shape{static_cast<unsigned>(call.blocks), block, static_cast<size_t>(call.dynamic_shared),
                            nullptr, call.dependent != 0};
    launch(kernel, shape, call.a, call.b, call.y, static_cast<int>(call.n));
#if !defined(LUTGEMM_EMULATED)
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
#endif
    return nullptr;
  } catch (const std::exception& caught) {
    error = caught.what();
    return error.c_str();
  }
}

}  // namespace lutgemm

#define LUTGEMM_TEST_KERNELS(run, ...)                                                                                 \
  extern "C" __attribute__((visibility("default"))) const char* run(const char* name, const lutgemm::TestCall* call) { \
    static const std::map<std::string, lutgemm::TestKernel> kernels = {__VA_ARGS__};                                   \
    const auto found = kernels.find(name);                                                                             \
    return found == kernels.end() ? "no such kernel" : lutgemm::run_test_kernel(found->second, *call);                 \
  }
