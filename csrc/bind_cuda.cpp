// The part of the CUDA bindings that all kernels share: devices, streams, x -> GpuIo.
#include "bind_cuda.h"

#ifdef LUTGEMM_EMULATED
#include <cstring>
#else
#include <cuda_runtime_api.h>

#include <mutex>
#endif

namespace lutgemm::cuda {
namespace {

#ifdef LUTGEMM_EMULATED

thread_local emulation::Allowed* current = nullptr;

Gpu gpu_of(const Tensor& x) {
  check(x.is_cpu(), "x: must be a CPU tensor");
  const emulation::Options& options = emulation::options();
  return Gpu{nullptr, 0, options.architecture, options.sm_count, int(emulation::shared_limit())};
}

#else

void check_cuda(cudaError_t status, const char* what) {
  check(status == cudaSuccess, "CUDA: ", what, " failed: ", cudaGetErrorString(status));
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

// What does not change of a device, asked once.
Gpu device_facts(int index) {
  constexpr int kMostDevices = 64;
  static Gpu known[kMostDevices];
  static std::once_flag asked[kMostDevices];
  check_range("device", index, 0, kMostDevices - 1);
  std::call_once(asked[index], [index] {
    const int major = attribute(cudaDevAttrComputeCapabilityMajor, index);
    const int minor = attribute(cudaDevAttrComputeCapabilityMinor, index);
    known[index] = Gpu{nullptr, index, 10 * major + minor, attribute(cudaDevAttrMultiProcessorCount, index),
                       attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index)};
  });
  return known[index];
}

// torch has the device current already. This library has a CUDA runtime of its own, which may not have used it yet.
void make_current(int index) {
  int current = -1;
  check_cuda(cudaGetDevice(&current), "cudaGetDevice");
  if (current != index) check_cuda(cudaSetDevice(index), "cudaSetDevice");
}

Gpu gpu_of(const Tensor& x) {
  check(x.is_cuda(), "x: must be a CUDA tensor");
  const int index = x.get_device_index();
  make_current(index);
  Gpu gpu = device_facts(index);
  check(aoti_torch_get_current_cuda_stream(index, &gpu.stream) == 0, "torch has no current stream for device ", index);
  return gpu;
}

#endif

// Compute capability of a device as 10 * major + minor. Throws where the CUDA runtime inside this library cannot use
// it, for a driver older than the toolkit that built the library, say.
int64_t gpu_capability(int64_t device) {
#ifdef LUTGEMM_EMULATED
  check_range("device", device, 0, 0);
  return emulation::options().architecture;
#else
  return device_facts(int(device)).capability;
#endif
}

}  // namespace

#ifdef LUTGEMM_EMULATED

Call::Call(const Tensor& x) : gpu(gpu_of(x)), outer_(current) { current = &allowed_; }
Call::~Call() { current = outer_; }

void let_read(const void* data, int64_t bytes, const char* name) {
  if (current != nullptr && bytes > 0) current->read(data, size_t(bytes), name);
}

void let_input(const void* data, int64_t bytes, const char* name) {
  if (current != nullptr && bytes > 0) current->input(data, size_t(bytes), name);
}

void let_write(void* data, int64_t bytes, const char* name) {
  if (bytes <= 0) return;
  std::memset(data, 0xff, size_t(bytes));  // NaN in every floating type
  if (current != nullptr) current->write(data, size_t(bytes), name);
}

#else

Call::Call(const Tensor& x) : gpu{}, guard_(x.get_device_index()) { gpu = gpu_of(x); }
Call::~Call() = default;

#endif

GpuIo make_io(const Tensor& x, const std::optional<Tensor>& bias, Tensor& y, int64_t N, int64_t K) {
  check_range("N", N, 1, kMaxFeatures);
  check_range("K", K, 1, kMaxFeatures);
  if (x.dim() != 2 || x.size(1) != K) check(false, "x: got shape ", shape_text(x), ", expected [*, ", K, "]");
  check(x.layout() == torch::headeronly::Layout::Strided, "x: must be a dense tensor");
  const int64_t M = x.size(0), stride = M > 1 ? x.stride(0) : K;
  check((K == 1 || x.stride(1) == 1) && stride >= K, "x: the elements of a row must be adjacent, the rows apart");
  check(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0, "x: must start at a multiple of 16 bytes");
  const DType dtype = float_dtype(x, "x");
  if (M > 0) let_input(x.const_data_ptr(), ((M - 1) * stride + K) * int64_t(x.element_size()), "x");
  if (bias) {
    check_tensor(*bias, "bias", {N}, x);
    check(float_dtype(*bias, "bias") == dtype, "bias: must have the dtype of x");
  }
  y = empty_like_x({M, N}, scalar_type(dtype), x);
  return GpuIo{M,    N, K, x.const_data_ptr(), stride, bias ? bias->const_data_ptr() : nullptr, y.mutable_data_ptr(),
               dtype};
}

LUTGEMM_GPU_OPS(m) { m.def("_gpu_capability(int device) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(LUTGEMM_GPU_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("_gpu_capability", TORCH_BOX(&gpu_capability));
}

}  // namespace lutgemm::cuda
