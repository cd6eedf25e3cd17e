// Registers dense_gemv in the module lutgemm._host.
#pragma once

#include <pybind11/pybind11.h>

namespace lutgemm::host {

void bind_dense_gemv(pybind11::module_& m);

}  // namespace lutgemm::host
