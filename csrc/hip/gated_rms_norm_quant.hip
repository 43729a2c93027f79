#include "../gpu/launch.cuh"
#include "../ops/gated_rms_norm_quant.h"

template gemma_norm::Status gemma_norm::gpu::launch_op<gemma_norm::GatedRmsNormQuant>(const Call&, device::Stream,
                                                                                      Message*);
