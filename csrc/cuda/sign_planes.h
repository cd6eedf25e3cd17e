// BCQ on fp16 tensor cores, with fp32 sums: planes of signs (or the integers of the uniform kind) against activations
// that are not rounded.
#pragma once

#include "cuda/bit_planes.h"

namespace lutgemm::cuda {

constexpr int kSignColumns = 16;  // most n columns of a pass over the weights: two n tiles of an mma

struct SignPlanesProblem {
  BitPlanesProblem weight;  // with its io; workspace is of sign_planes_workspace bytes
  Accuracy accuracy;
};

// Throws std::runtime_error for a device with too little shared memory.
BitPlanesPlan plan_sign_planes(const SignPlanesProblem& problem, const Gpu& gpu);

int64_t sign_planes_workspace(const SignPlanesProblem& problem, const Gpu& gpu);

// y = x @ W.T + bias for any M; plan.tokens tokens read the weights once.
void sign_planes(const SignPlanesProblem& problem, const Gpu& gpu);

}  // namespace lutgemm::cuda
