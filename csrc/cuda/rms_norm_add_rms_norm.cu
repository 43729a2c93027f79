#include "../gpu/launch.cuh"
#include "../ops/rms_norm_add_rms_norm.h"

template gemma_norm::Status gemma_norm::gpu::launch_op<gemma_norm::RmsNormAddRmsNorm>(const Call&, device::Stream,
                                                                                      Message*);
