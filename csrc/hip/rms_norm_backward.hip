#include "../ops/rms_norm_backward.h"

#include "../gpu/backward_launch.cuh"

template gemma_norm::Status gemma_norm::gpu::launch_op<gemma_norm::RmsNormBackward>(const Call&, device::Stream,
                                                                                    Message*);
