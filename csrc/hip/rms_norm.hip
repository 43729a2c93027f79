#include "../gpu/launch.cuh"
#include "../ops/rms_norm.h"

template gemma_norm::Status gemma_norm::gpu::launch_op<gemma_norm::RmsNorm>(const Call&, device::Stream, Message*);
