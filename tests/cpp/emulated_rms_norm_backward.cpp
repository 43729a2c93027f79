#include "emulated_backward.cuh"
#include "ops/rms_norm_backward.h"

template gemma_norm::Status gemma_norm::gpu::launch_op<gemma_norm::RmsNormBackward>(const Call&, device::Stream,
                                                                                    Message*);
template std::set<const void*> gemma_norm::all_backward_kernels<gemma_norm::RmsNormBackward>();
