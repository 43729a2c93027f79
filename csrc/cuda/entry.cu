// The CUDA library's function of the C interface. The kernels are compiled in the other files of this folder.
#include "../gpu/entry.h"

gemma_norm::Status gemma_norm_cuda(const gemma_norm::Call* call, void* stream, gemma_norm::Message* message) {
  return gemma_norm::gpu::dispatch(*call, static_cast<cudaStream_t>(stream), message);
}
