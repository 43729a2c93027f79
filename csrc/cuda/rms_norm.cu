// The CUDA library's kernels and its entry of the C interface.
#include "../gpu/launch.cuh"

gemma_norm::Status gemma_norm_cuda(const gemma_norm::Call* call, void* stream, gemma_norm::Message* message) {
  return gemma_norm::kernels::run(*call, static_cast<cudaStream_t>(stream), message);
}
