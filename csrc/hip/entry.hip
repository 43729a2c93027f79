// The HIP library's function of the C interface. The kernels are compiled in the other files of this folder, as native
// HIP, without hipify.
#include "../gpu/entry.h"

gemma_norm::Status gemma_norm_hip(const gemma_norm::Call* call, void* stream, gemma_norm::Message* message) {
  return gemma_norm::gpu::dispatch(*call, static_cast<hipStream_t>(stream), message);
}
