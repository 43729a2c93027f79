// The HIP library's kernels and its entry of the C interface. Native HIP, compiled as it is.
#include "../gpu/launch.cuh"

gemma_norm::Status gemma_norm_hip(const gemma_norm::Call* call, void* stream, gemma_norm::Message* message) {
  return gemma_norm::kernels::run(*call, static_cast<hipStream_t>(stream), message);
}
