#include "emulated_op.cuh"
#include "ops/gated_rms_norm_quant.h"

template gemma_norm::Status gemma_norm::gpu::launch_op<gemma_norm::GatedRmsNormQuant>(const Call&, device::Stream,
                                                                                      Message*);
template const void* gemma_norm::kernel_function<gemma_norm::GatedRmsNormQuant>(const RowParams&, bool, int32_t);
