// The CUDA library's kernels and its entry of the C interface.
#include "../kernels/dispatch.cuh"

gemma_norm::Status gemma_norm_cuda(const gemma_norm::NormArgs* args, void* stream, gemma_norm::Message* message) {
  return gemma_norm::kernels::run(*args, static_cast<cudaStream_t>(stream), message);
}
