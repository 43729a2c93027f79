#include "emulated_op.cuh"
#include "ops/rms_norm_quant.h"

template gemma_norm::Status gemma_norm::gpu::launch_op<gemma_norm::RmsNormQuant>(const Call&, device::Stream, Message*);
template const void* gemma_norm::kernel_function<gemma_norm::RmsNormQuant>(const RowParams&, bool, int32_t);
