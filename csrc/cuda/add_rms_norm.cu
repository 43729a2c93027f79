#include "../gpu/launch.cuh"

template gemma_norm::Status gemma_norm::gpu::run<gemma_norm::AddRmsNorm>(const Call&, device::Stream, Message*);
