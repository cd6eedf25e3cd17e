#include "bind_dense_gemv.h"

#include <cstdint>
#include <string>

#include "../cpu/isa.h"
#include "dense_gemv.h"

namespace py = pybind11;

namespace lutgemm::host {
namespace {

// Addresses instead of arrays: NumPy knows no bf16. The caller keeps the memory alive and of the stated size.
void dense_gemv_at(uintptr_t weight, uintptr_t x, uintptr_t y, int64_t N, int64_t K, const std::string& dtype,
                   int isa) {
  const int best = int(cpu_isa());
  if (isa < -1 || isa > best) {
    throw py::value_error("isa=" + std::to_string(isa) + ": this CPU has 0 to " + std::to_string(best) +
                          ", -1 takes the best");
  }
  if (N < 0 || K < 0) throw py::value_error("N=" + std::to_string(N) + ", K=" + std::to_string(K) + ": must be >= 0");
  if (dtype != "float32" && dtype != "bfloat16") {
    throw py::value_error("dtype=" + dtype + ": use float32 or bfloat16");
  }
  if ((!weight || !x || !y) && N && K) throw py::value_error("weight, x, y: an address is 0");
  const Isa chosen = isa < 0 ? cpu_isa() : Isa(isa);
  const auto* in = reinterpret_cast<const float*>(x);
  auto* out = reinterpret_cast<float*>(y);
  py::gil_scoped_release release;
  if (dtype == "float32") {
    dense_gemv(reinterpret_cast<const float*>(weight), in, out, N, K, chosen);
  } else {
    dense_gemv(reinterpret_cast<const uint16_t*>(weight), in, out, N, K, chosen);
  }
}

}  // namespace

void bind_dense_gemv(py::module_& m) {
  m.def("dense_gemv", &dense_gemv_at, py::arg("weight"), py::arg("x"), py::arg("y"), py::arg("N"), py::arg("K"),
        py::arg("dtype"), py::arg("isa") = -1,
        "y[N] = W[N, K] @ x[K] with one thread, at the speed of memory. Takes addresses of contiguous memory: W of "
        "`dtype` (float32 or bfloat16), x and y float32. isa: number of an instruction set, -1 the best.");
}

}  // namespace lutgemm::host
