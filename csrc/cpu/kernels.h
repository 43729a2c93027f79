// All kernels of an instruction set, given its vector type.
#pragma once

#include "backward_kernel.h"
#include "gated_backward_kernel.h"
#include "isa.h"
#include "rope_kernel.h"
#include "row_kernel.h"

namespace gemma_norm {
namespace {

template <class V>
constexpr BackwardKernels backward_kernels() {
  return {&compute_factors<V>, &run_chunks<V>, &run_gated_chunks<V>, &sum_column_steps<V>};
}

template <class V, class... Op>
constexpr CpuKernels cpu_kernels(OpList<Op...>) {
  return {{&compute_rows<V, Op>...}, backward_kernels<V>(), &compute_heads<V>};
}

}  // namespace
}  // namespace gemma_norm
