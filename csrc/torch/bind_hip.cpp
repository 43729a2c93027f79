// ROCm builds of PyTorch dispatch their GPUs under the key CUDA too.
#include "bind_gpu.h"

STABLE_TORCH_LIBRARY_IMPL(gemma_norm, CUDA, m) { gemma_norm::binding::register_ops<gemma_norm::binding::Gpu<&gemma_norm_hip>>(m); }
