// The kernels of bit_planes.cuh for the uniform kind: integers of all planes in one mma.
#include "cuda/bit_planes.cuh"

namespace lutgemm::cuda {

void launch_merged_planes(const BitPlanesProblem& problem, const BitPlanesPlan& plan, float* partial,
                          const LaunchShape& shape) {
  launch_bit_planes<true>(problem, plan, partial, shape);
}

}  // namespace lutgemm::cuda
