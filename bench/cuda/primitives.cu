// What the designs of the GPU kernels hang on, measured: one JSON object on stdout, figures as medians.
//
//   nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -o primitives bench/cuda/primitives.cu && ./primitives
//
//   look_ups    table look-ups in shared memory per clock and SM with random indices, by size and width of the entries,
//               one table for the warp; "private": every lane has a table in its own bank
//   mma         m16n8k16 fp16 and m16n8k32 int8 instructions per clock and SM
//   alu         lop3, prmt and their mix with shifts per clock and SM (lanes)
//   copy        GB/s read and written by a copy of 1 GiB; read: GB/s of 16-byte loads of 1 GiB
//   launch_us   one empty kernel in a graph of 100; dependent: the same by programmatic dependent launch;
//               cold_4mb: reading 4 MiB that are in no cache, in one kernel
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

constexpr int kThreads = 512, kRounds = 2048, kUnroll = 8;

__device__ uint32_t next_random(uint32_t state) { return state * 1664525u + 1013904223u; }

// Reads 2, 4 or 8 bytes of shared memory at a byte address; volatile, so that every round reads again.
template <int kBytes>
__device__ uint32_t look_up(uint32_t address) {
  uint32_t low = 0, high = 0;
  if constexpr (kBytes == 2) {
    uint16_t half;
    asm volatile("ld.volatile.shared.u16 %0, [%1];" : "=h"(half) : "r"(address));
    low = half;
  } else if constexpr (kBytes == 4) {
    asm volatile("ld.volatile.shared.u32 %0, [%1];" : "=r"(low) : "r"(address));
  } else {
    asm volatile("ld.volatile.shared.v2.u32 {%0, %1}, [%2];" : "=r"(low), "=r"(high) : "r"(address));
  }
  return low ^ high;
}

// Every lane reads random entries of a table of `kEntries` of `kBytes`; kPrivate: of the table in its own bank. The
// addresses are drawn once (128 patterns of a warp to a block), so that a look-up is one load and one addition.
template <int kBytes, int kEntries, bool kPrivate>
__global__ void __launch_bounds__(kThreads) look_ups(uint32_t* sink, long long* clocks) {
  extern __shared__ __align__(16) unsigned char bytes[];
  constexpr int kWords = kBytes * kEntries * (kPrivate ? 32 : 1) / 4;
  for (int i = threadIdx.x; i < kWords; i += kThreads) reinterpret_cast<uint32_t*>(bytes)[i] = i;
  __syncthreads();
  const uint32_t base = uint32_t(__cvta_generic_to_shared(bytes));
  uint32_t address[kUnroll], sum = 0, state = blockIdx.x * kThreads + threadIdx.x;
  for (int u = 0; u < kUnroll; ++u) {
    for (int i = 0; i < 5; ++i) state = next_random(state ^ (state >> 15));
    const uint32_t entry = (state >> 11) % kEntries;
    address[u] = base + kBytes * (kPrivate ? entry * 32 + threadIdx.x % 32 : entry);
  }
  const long long start = clock64();
  for (int round = 0; round < kRounds / kUnroll; ++round) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) sum += look_up<kBytes>(address[u]);
  }
  const long long end = clock64();
  if (threadIdx.x == 0) clocks[blockIdx.x] = end - start;
  sink[blockIdx.x * kThreads + threadIdx.x] = sum;
}

template <bool kInt8>
__global__ void __launch_bounds__(kThreads) mma(uint32_t* sink, long long* clocks) {
  constexpr int kChains = 4;
  uint32_t a[4], b[2], c[kChains][4] = {};
  for (int i = 0; i < 4; ++i) a[i] = threadIdx.x & 1;
  for (int i = 0; i < 2; ++i) b[i] = 0;
  const long long start = clock64();
  for (int round = 0; round < kRounds / kChains; ++round) {
#pragma unroll
    for (int u = 0; u < kChains; ++u) {
      if constexpr (kInt8) {
        asm volatile(
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+r"(c[u][0]), "+r"(c[u][1]), "+r"(c[u][2]), "+r"(c[u][3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
      } else {
        float* f = reinterpret_cast<float*>(c[u]);
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(f[0]), "+f"(f[1]), "+f"(f[2]), "+f"(f[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
      }
    }
  }
  const long long end = clock64();
  if (threadIdx.x == 0) clocks[blockIdx.x] = end - start;
  uint32_t sum = 0;
  for (auto& chain : c) sum += chain[0] + chain[1] + chain[2] + chain[3];
  sink[blockIdx.x * kThreads + threadIdx.x] = sum;
}

enum class Alu { kLop3, kPrmt, kLop3Shift, kLop3Multiply };

template <Alu kOperation>
__global__ void __launch_bounds__(kThreads) alu(uint32_t* sink, long long* clocks, uint32_t mask) {
  uint32_t v[kUnroll];
  for (int u = 0; u < kUnroll; ++u) v[u] = threadIdx.x + u;
  const long long start = clock64();
  for (int round = 0; round < kRounds / kUnroll; ++round) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if constexpr (kOperation == Alu::kPrmt) {
        asm volatile("prmt.b32 %0, %0, %1, %1;" : "+r"(v[u]) : "r"(mask));
      } else {
        asm volatile("lop3.b32 %0, %0, %1, %1, 0x96;" : "+r"(v[u]) : "r"(mask));
      }
      if constexpr (kOperation == Alu::kLop3Shift) asm volatile("shl.b32 %0, %0, 1;" : "+r"(v[u]));
      if constexpr (kOperation == Alu::kLop3Multiply)
        asm volatile("mad.lo.u32 %0, %0, %1, %1;" : "+r"(v[u]) : "r"(mask));
    }
  }
  const long long end = clock64();
  if (threadIdx.x == 0) clocks[blockIdx.x] = end - start;
  uint32_t sum = 0;
  for (uint32_t each : v) sum += each;
  sink[blockIdx.x * kThreads + threadIdx.x] = sum;
}

__global__ void read_all(const uint4* data, size_t count, uint32_t* sink) {
  uint32_t sum = 0;
  const size_t step = size_t(gridDim.x) * blockDim.x;
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count; i += 4 * step) {
    uint4 found[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) found[u] = i + u * step < count ? __ldcs(data + i + u * step) : uint4{};
#pragma unroll
    for (int u = 0; u < 4; ++u) sum += found[u].x ^ found[u].y ^ found[u].z ^ found[u].w;
  }
  if (sum == 0x12345678u) *sink = sum;
}

__global__ void empty(int dependent) {
#if __CUDA_ARCH__ >= 900
  if (dependent) {
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
  }
#endif
}

float median(std::vector<float> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// Microseconds of one of `count` runs of `enqueue` in a graph.
float graph_us(int count, const std::function<void(cudaStream_t, int)>& enqueue) {
  cudaStream_t stream;
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  cudaGraph_t graph;
  cudaGraphExec_t run;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
  for (int i = 0; i < count; ++i) enqueue(stream, i);
  check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  check(cudaGraphInstantiate(&run, graph, 0), "cudaGraphInstantiate");
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<float> found;
  for (int i = 0; i < 31; ++i) {
    check(cudaGraphLaunch(run, stream), "cudaGraphLaunch");
    check(cudaEventRecord(begin, stream), "cudaEventRecord");
    check(cudaGraphLaunch(run, stream), "cudaGraphLaunch");
    check(cudaEventRecord(end, stream), "cudaEventRecord");
    check(cudaEventSynchronize(end), "cudaEventSynchronize");
    float milliseconds;
    check(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
    found.push_back(1e3f * milliseconds / count);
  }
  return median(found);
}

uint32_t* sink;
long long* clocks;
int sms;

// `per_thread` operations of each thread (of each warp, for mma) per clock and SM.
template <class Kernel, class... Arguments>
void rate(const char* name, double operations, int shared, Kernel kernel, Arguments... arguments) {
  if (shared > 48 << 10) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "cudaFuncSetAttribute");
  }
  std::vector<float> found;
  for (int i = 0; i < 11; ++i) {
    kernel<<<sms, kThreads, shared>>>(sink, clocks, arguments...);
    check(cudaGetLastError(), name);
    check(cudaDeviceSynchronize(), name);
    std::vector<long long> each(sms);
    check(cudaMemcpy(each.data(), clocks, sms * sizeof(long long), cudaMemcpyDeviceToHost), "cudaMemcpy");
    found.push_back(float(operations / double(*std::max_element(each.begin(), each.end()))));
  }
  std::printf("  \"%s\": %.3f,\n", name, median(found));
}

}  // namespace

int main() {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0), "cudaGetDeviceProperties");
  sms = device.multiProcessorCount;
  check(cudaMalloc(&sink, sms * kThreads * sizeof(uint32_t)), "cudaMalloc");
  check(cudaMalloc(&clocks, sms * sizeof(long long)), "cudaMalloc");
  std::printf("{\n  \"device\": \"%s\", \"multiprocessors\": %d, \"l2_bytes\": %d,\n", device.name, sms,
              device.l2CacheSize);
  const double each = double(kThreads) * kRounds;
  rate("look_ups_u16_256", each, 512, look_ups<2, 256, false>);
  rate("look_ups_u16_128", each, 256, look_ups<2, 128, false>);
  rate("look_ups_u16_64", each, 128, look_ups<2, 64, false>);
  rate("look_ups_u32_256", each, 1024, look_ups<4, 256, false>);
  rate("look_ups_u32_128", each, 512, look_ups<4, 128, false>);
  rate("look_ups_u32_16", each, 64, look_ups<4, 16, false>);
  rate("look_ups_u64_128", each, 1024, look_ups<8, 128, false>);
  rate("look_ups_u64_256", each, 2048, look_ups<8, 256, false>);
  rate("look_ups_private_u32_256", each, 32 << 10, look_ups<4, 256, true>);
  rate("look_ups_private_u32_16", each, 2 << 10, look_ups<4, 16, true>);
  rate("mma_m16n8k16_fp16", each / 32, 0, mma<false>);
  rate("mma_m16n8k32_int8", each / 32, 0, mma<true>);
  rate("alu_lop3", each, 0, alu<Alu::kLop3>, 0x80808080u);
  rate("alu_prmt", each, 0, alu<Alu::kPrmt>, 0x3210u);
  rate("alu_lop3_and_shift_pairs", each, 0, alu<Alu::kLop3Shift>, 0x80808080u);
  rate("alu_lop3_and_multiply_pairs", each, 0, alu<Alu::kLop3Multiply>, 0x80808080u);

  constexpr size_t kBytes = size_t(1) << 30, kPart = size_t(4) << 20;
  uint8_t *source, *target;
  check(cudaMalloc(&source, kBytes), "cudaMalloc");
  check(cudaMalloc(&target, kBytes), "cudaMalloc");
  check(cudaMemset(source, 1, kBytes), "cudaMemset");
  const float copy = graph_us(4, [&](cudaStream_t s, int) {
    check(cudaMemcpyAsync(target, source, kBytes, cudaMemcpyDeviceToDevice, s), "cudaMemcpyAsync");
  });
  const float read = graph_us(4, [&](cudaStream_t s, int) {
    read_all<<<8 * sms, 256, 0, s>>>(reinterpret_cast<const uint4*>(source), kBytes / 16, sink);
  });
  const float part = graph_us(128, [&](cudaStream_t s, int i) {
    read_all<<<sms, 512, 0, s>>>(reinterpret_cast<const uint4*>(source + i * kPart), kPart / 16, sink);
  });
  const float launch = graph_us(100, [&](cudaStream_t s, int) { empty<<<sms, 256, 0, s>>>(0); });
  float dependent = launch;
  if (device.major >= 9) {
    dependent = graph_us(100, [&](cudaStream_t s, int) {
      cudaLaunchConfig_t config{};
      config.gridDim = sms;
      config.blockDim = 256;
      config.stream = s;
      cudaLaunchAttribute attribute{};
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
      config.attrs = &attribute;
      config.numAttrs = 1;
      check(cudaLaunchKernelEx(&config, empty, 1), "cudaLaunchKernelEx");
    });
  }
  std::printf("  \"copy_gb_per_s\": %.1f,\n  \"read_gb_per_s\": %.1f,\n", 2e-3 * kBytes / copy, 1e-3 * kBytes / read);
  std::printf("  \"launch_us\": %.3f,\n  \"dependent_launch_us\": %.3f,\n  \"cold_4mb_us\": %.3f\n}\n", launch,
              dependent, part);
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  return 0;
}
