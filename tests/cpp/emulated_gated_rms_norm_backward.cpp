#include "device/emulated.h"
#include "gpu/backward_launch.cuh"
#include "ops/gated_rms_norm_backward.h"

template gemma_norm::Status gemma_norm::gpu::launch_op<gemma_norm::GatedRmsNormBackward>(const Call&, device::Stream,
                                                                                         Message*);
