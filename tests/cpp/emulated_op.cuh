// An operator's kernels, compiled for the host by its own compiler. Each operator has a source that instantiates what
// is here, as it has one in csrc/cuda and csrc/hip, so that they are compiled in parallel.
#pragma once

#include "device/emulated.h"
#include "gpu/launch.cuh"

namespace gemma_norm {

// The kernel that serves calls like `params` whose plan names kernel `kernel` of tuning.h, for aligned rows or for
// others.
template <class Op>
const void* kernel_function(const RowParams& params, bool aligned, int32_t kernel) {
  return reinterpret_cast<const void*>(gpu::find_kernels<Op>(params).by_alignment[aligned][kernel].function);
}

}  // namespace gemma_norm
