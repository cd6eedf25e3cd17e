// The kernels of sign_planes.cuh for the uniform kind: integers of all planes in one mma.
#include "cuda/sign_planes.cuh"

namespace lutgemm::cuda {

void launch_sign_integers(const PlanesArguments& arguments, const LaunchShape& shape) {
  launch_sign_planes<true>(arguments, shape);
}

}  // namespace lutgemm::cuda
