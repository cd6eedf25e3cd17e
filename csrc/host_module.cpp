// lutgemm._host: what the CPU is and how fast its memory is, and packing of binary codes over NumPy arrays.
// No torch. Long loops run without the GIL. A bad shape, dtype or count raises ValueError, a thread that the system
// refuses RuntimeError.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "host/bind_dense_gemv.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace py = pybind11;

namespace {

std::string text_of(py::handle value) { return py::str(value).cast<std::string>(); }

// A C-contiguous array of exactly this dtype, at least one-dimensional.
template <class T>
py::array_t<T, py::array::c_style> checked(const char* name, const py::array& array) {
  if (!py::isinstance<py::array_t<T>>(array)) {
    throw py::value_error(std::string(name) + ": got dtype " + text_of(array.dtype()) + ", use " +
                          text_of(py::dtype::of<T>()));
  }
  if (array.ndim() < 1)
    throw py::value_error(std::string(name) + ": got a scalar, use an array of 1 or more dimensions");
  return py::array_t<T, py::array::c_style>::ensure(array);
}

// The shape of `array` with its last dimension replaced.
std::vector<py::ssize_t> with_last(const py::array& array, py::ssize_t last) {
  std::vector<py::ssize_t> shape(array.shape(), array.shape() + array.ndim());
  shape.back() = last;
  return shape;
}

py::ssize_t rows_of(const py::array& array) {
  py::ssize_t rows = 1;
  for (py::ssize_t d = 0; d + 1 < array.ndim(); ++d) rows *= array.shape(d);
  return rows;
}

// Bits [..., K], each 0 or 1 -> int32 words [..., ceil(K/32)]; bit k % 32 of word k // 32, unused bits zero.
py::array_t<int32_t> pack_bits(const py::array& bits) {
  const auto input = checked<uint8_t>("bits", bits);
  const py::ssize_t K = input.shape(input.ndim() - 1), words = (K + 31) / 32, rows = rows_of(input);
  py::array_t<int32_t> output(with_last(input, words));
  const uint8_t* in = input.data();
  int32_t* out = output.mutable_data();
  bool valid = true;
  {
    py::gil_scoped_release release;
    uint8_t seen = 0;
    for (py::ssize_t row = 0; row < rows; ++row, in += K, out += words) {
      for (py::ssize_t word = 0; word < words; ++word) {
        const py::ssize_t count = std::min<py::ssize_t>(32, K - 32 * word);
        uint32_t packed = 0;
        for (py::ssize_t i = 0; i < count; ++i) {
          seen |= in[32 * word + i];
          packed |= uint32_t(in[32 * word + i] & 1) << i;
        }
        out[word] = int32_t(packed);
      }
    }
    valid = seen <= 1;
  }
  if (!valid) throw py::value_error("bits: every value must be 0 or 1");
  return output;
}

// int32 words [..., ceil(K/32)] -> bits [..., K] in {0, 1}.
py::array_t<uint8_t> unpack_bits(const py::array& words, py::ssize_t in_features) {
  const auto input = checked<int32_t>("words", words);
  const py::ssize_t count = input.shape(input.ndim() - 1), rows = rows_of(input), K = in_features;
  if (K < 0 || count != K / 32 + (K % 32 != 0)) {
    throw py::value_error("K=" + std::to_string(K) + ": words has " + std::to_string(count) +
                          " words a row, expected ceil(K/32)");
  }
  py::array_t<uint8_t> output(with_last(input, K));
  const int32_t* in = input.data();
  uint8_t* out = output.mutable_data();
  py::gil_scoped_release release;
  for (py::ssize_t row = 0; row < rows; ++row, in += count, out += K) {
    for (py::ssize_t k = 0; k < K; ++k) out[k] = uint8_t(uint32_t(in[k / 32]) >> (k % 32)) & 1;
  }
  return output;
}

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Keeps the compiler from dropping a loop whose result nobody reads.
void keep(const void* data) { asm volatile("" : : "r"(data) : "memory"); }

struct Free {
  void operator()(void* data) const { std::free(data); }
};
using Words = std::unique_ptr<uint64_t[], Free>;

// Words of 1, in pages of 2 MiB where the system grants them, as prepared weights are: in pages of 4 KiB a pass
// measures walks of the page tables too (24 GB/s in place of 31 on Zen 4).
Words filled_words(int64_t count) {
  constexpr size_t kPage = size_t(2) << 20;
  const size_t bytes = (size_t(count) * sizeof(uint64_t) + kPage - 1) / kPage * kPage;
  void* data = nullptr;
  if (posix_memalign(&data, kPage, bytes) != 0) throw std::bad_alloc();
#if defined(__linux__)
  madvise(data, bytes, MADV_HUGEPAGE);
#endif
  Words words(static_cast<uint64_t*>(data));
  std::fill_n(words.get(), count, 1);
  return words;
}

uint64_t sum_words(const uint64_t* data, int64_t count) {
  uint64_t sum[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int lane = 0; lane < 8; ++lane) sum[lane] += data[i + lane];
  }
  for (; i < count; ++i) sum[0] += data[i];
  return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

// Threads that are joined before this object goes, also when starting a further one throws.
class Threads {
 public:
  Threads() = default;
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;
  ~Threads() { join(); }

  template <class Work>
  void start(const Work& work) {
    try {
      running_.emplace_back(work);
    } catch (const std::system_error& error) {
      throw std::runtime_error("the system refused thread " + std::to_string(running_.size() + 2) + " (" +
                               error.code().message() + "); use fewer threads or raise the limit (ulimit -u)");
    }
  }

  void join() {
    for (std::thread& thread : running_) thread.join();
    running_.clear();
  }

 private:
  std::vector<std::thread> running_;
};

// Seconds of each of `repeats` passes over `nbytes`, split evenly among `threads`; one pass before them is not timed.
// `work(begin, end)` does the words [begin, end). A pass includes starting its threads beyond the first.
template <class Work>
std::vector<double> time_passes(int64_t words, int repeats, int threads, const Work& work) {
  std::vector<double> seconds;
  for (int repeat = -1; repeat < repeats; ++repeat) {
    const double start = seconds_now();
    Threads others;
    for (int t = 1; t < threads; ++t) {
      others.start([&, t] { work(words * t / threads, words * (t + 1) / threads); });
    }
    work(0, words / threads);
    others.join();
    if (repeat >= 0) seconds.push_back(seconds_now() - start);
  }
  return seconds;
}

void check_measurement(int64_t nbytes, int repeats, int threads) {
  if (nbytes < 8 || nbytes > int64_t(1) << 34) {
    throw py::value_error("nbytes=" + std::to_string(nbytes) + ": must be from 8 to 2**34");
  }
  if (repeats < 1 || repeats > 100000) {
    throw py::value_error("repeats=" + std::to_string(repeats) + ": must be from 1 to 100000");
  }
  if (threads < 1 || threads > 1024) {
    throw py::value_error("threads=" + std::to_string(threads) + ": must be from 1 to 1024");
  }
}

std::vector<double> copy_bandwidth(int64_t nbytes, int repeats, int threads) {
  check_measurement(nbytes, repeats, threads);
  const int64_t words = nbytes / 8;
  py::gil_scoped_release release;
  const Words from = filled_words(words), to = filled_words(words);
  return time_passes(words, repeats, threads, [&](int64_t begin, int64_t end) {
    std::memcpy(to.get() + begin, from.get() + begin, size_t(end - begin) * 8);
    keep(to.get());
  });
}

std::vector<double> read_bandwidth(int64_t nbytes, int repeats, int threads) {
  check_measurement(nbytes, repeats, threads);
  const int64_t words = nbytes / 8;
  py::gil_scoped_release release;
  const Words from = filled_words(words);
  return time_passes(words, repeats, threads, [&](int64_t begin, int64_t end) {
    const uint64_t sum = sum_words(from.get() + begin, end - begin);
    keep(&sum);
  });
}

#if defined(__x86_64__)
// CPUID's processor brand string, leaves 0x80000002 to 0x80000004.
std::string brand() {
  unsigned words[12] = {};
  if (__get_cpuid_max(0x80000000u, nullptr) < 0x80000004u) return "unknown x86-64";
  for (unsigned leaf = 0; leaf < 3; ++leaf) {
    unsigned* w = words + 4 * leaf;
    __get_cpuid(0x80000002u + leaf, w, w + 1, w + 2, w + 3);
  }
  char text[sizeof words + 1] = {};
  std::memcpy(text, words, sizeof words);
  std::string name(text);
  const size_t first = name.find_first_not_of(' ');
  return first == std::string::npos ? "unknown x86-64" : name.substr(first, name.find_last_not_of(' ') - first + 1);
}
#endif

py::dict cpu_features() {
  py::dict found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  found["brand"] = brand();
  found["architecture"] = "x86-64";
#define LUTGEMM_FLAG(name) found[name] = __builtin_cpu_supports(name) != 0
  LUTGEMM_FLAG("avx2");
  LUTGEMM_FLAG("fma");
  LUTGEMM_FLAG("f16c");
  LUTGEMM_FLAG("avx512f");
  LUTGEMM_FLAG("avx512bw");
  LUTGEMM_FLAG("avx512dq");
  LUTGEMM_FLAG("avx512vl");
  LUTGEMM_FLAG("avx512vbmi");
  LUTGEMM_FLAG("avx512vnni");
  LUTGEMM_FLAG("avx512bf16");
#undef LUTGEMM_FLAG
#else
  found["brand"] = "unknown";
  found["architecture"] = "other";
#endif
  found["logical_cpus"] = std::max(1u, std::thread::hardware_concurrency());
  py::dict caches;  // bytes, as the C library reports them; what it does not know is left out
  const std::pair<const char*, int> levels[] = {
      {"l1d", _SC_LEVEL1_DCACHE_SIZE}, {"l2", _SC_LEVEL2_CACHE_SIZE}, {"l3", _SC_LEVEL3_CACHE_SIZE}};
  for (const auto& [name, key] : levels) {
    const long bytes = sysconf(key);
    if (bytes > 0) caches[name] = bytes;
  }
  found["cache_bytes"] = caches;
  return found;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "What needs neither torch nor a GPU: CPU features, memory bandwidth, packing of binary codes.";
  m.def("cpu_features", &cpu_features,
        "dict: brand, architecture, logical_cpus, cache_bytes {l1d, l2, l3}, and one bool per instruction set.");
  m.def("pack_bits", &pack_bits, py::arg("bits"),
        "Bits uint8 [..., K], each 0 or 1 -> int32 words [..., ceil(K/32)]; bit k % 32 of word k // 32, LSB first.");
  m.def("unpack_bits", &unpack_bits, py::arg("words"), py::arg("K"),
        "int32 words [..., ceil(K/32)] -> bits uint8 [..., K]. Inverse of pack_bits.");
  m.def("copy_bandwidth", &copy_bandwidth, py::arg("nbytes"), py::arg("repeats"), py::arg("threads") = 1,
        "Seconds of each of `repeats` memcpy of `nbytes` (so 2 * nbytes of traffic), split among `threads`.");
  m.def("read_bandwidth", &read_bandwidth, py::arg("nbytes"), py::arg("repeats"), py::arg("threads") = 1,
        "Seconds of each of `repeats` sums over `nbytes`, split among `threads`.");
  lutgemm::host::bind_dense_gemv(m);
  m.def("now", &seconds_now, "Seconds of std::chrono::steady_clock, the clock of the loops above.");
}
