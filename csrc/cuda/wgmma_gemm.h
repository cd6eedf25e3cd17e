// The Hopper form of dequant_gemm: see wgmma_gemm.cu.
#pragma once

#include "cuda/dequant_gemm.h"

namespace lutgemm::cuda {

// Whether the device has wgmma and this build has code for it (sm_90a).
bool has_wgmma(const Gpu& gpu);

// stages is 0 for a device with too little shared memory.
DequantGemmPlan plan_wgmma_gemm(const DequantGemmProblem& problem, const Gpu& gpu);

void launch_wgmma_gemm(const GemmArguments& arguments, const Gpu& gpu);

}  // namespace lutgemm::cuda
