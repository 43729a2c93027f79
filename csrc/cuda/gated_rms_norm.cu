#include "../gpu/launch.cuh"
#include "../ops/gated_rms_norm.h"

template gemma_norm::Status gemma_norm::gpu::launch_op<gemma_norm::GatedRmsNorm>(const Call&, device::Stream, Message*);
