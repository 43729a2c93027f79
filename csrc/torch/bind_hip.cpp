// ROCm builds of PyTorch, too, dispatch the operators of their GPUs under the key CUDA.
#include "bind_gpu.h"

STABLE_TORCH_LIBRARY_IMPL(gemma_norm, CUDA, m) {
  gemma_norm::binding::register_ops<gemma_norm::binding::GpuEntry<&gemma_norm_hip>>(m);
}
