#include "../gpu/launch.cuh"
#include "../ops/rms_norm_quant.h"

template gemma_norm::Status gemma_norm::gpu::launch_op<gemma_norm::AddRmsNormQuant>(const Call&, device::Stream,
                                                                                    Message*);
