// One dense row-major weight times one vector: what a linear layer without compression costs at batch 1 when nothing
// but memory limits it. A yardstick for `lutgemm bench`; torch's own matmul stays below the memory's speed there.
#pragma once

#include <cstdint>

#include "../params.h"

namespace lutgemm::host {

// y[N] = W[N, K] x[K], sums in fp32, W contiguous fp32 or bf16 (given as 16-bit words), one thread.
// `isa` must be one that this CPU runs.
void dense_gemv(const float* weight, const float* x, float* y, int64_t N, int64_t K, Isa isa);
void dense_gemv(const uint16_t* weight, const float* x, float* y, int64_t N, int64_t K, Isa isa);

}  // namespace lutgemm::host
