#include "../ops/qk_norm_rope.h"

#include "../gpu/rope_launch.cuh"

template gemma_norm::Status gemma_norm::gpu::launch_op<gemma_norm::QkNormRope>(const Call&, device::Stream, Message*);
