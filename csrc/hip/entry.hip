// The HIP library's entry of the C interface. Its kernels are in the other files of this folder, native HIP, compiled as they are.
#include "../gpu/entry.h"

gemma_norm::Status gemma_norm_hip(const gemma_norm::Call* call, void* stream, gemma_norm::Message* message) {
  return gemma_norm::gpu::run(*call, static_cast<hipStream_t>(stream), message);
}
