// The kernels of bit_planes.cuh for the uniform kind: integers of all planes in one mma.
#include "cuda/bit_planes.cuh"

namespace lutgemm::cuda {

void launch_merged_planes(const PlanesArguments& arguments, const LaunchShape& shape) {
  launch_bit_planes<true>(arguments, shape);
}

}  // namespace lutgemm::cuda
