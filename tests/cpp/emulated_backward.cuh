// A backward operator's kernels, compiled for the host by a source of their own, as in emulated_op.cuh.
#pragma once

#include "device/emulated.h"
#include "gpu/backward_launch.cuh"

#include <set>
#include <utility>

namespace gemma_norm {

// Every kernel of the operator.
template <class Op>
std::set<const void*> all_backward_kernels() {
  std::set<const void*> all = {reinterpret_cast<const void*>(&gpu::sum_chunks)};
  const auto add = [&](DType x, DType dout) {
    RowParams p{};
    p.dtypes[kX] = x;
    p.dtypes[kDOut] = dout;
    for (BackwardPlan plan{}; plan.kernel < kBackwardKernelCount; ++plan.kernel)
      for (const auto& [aligned, one_row] : {std::pair{false, false}, {true, false}, {true, true}}) {
        plan.one_row = one_row;
        if (const auto function = gpu::find_backward_kernel<Op>(p, plan, aligned))
          all.insert(reinterpret_cast<const void*>(function));
      }
    gpu::visit_terms<Op>(p, [&](auto terms) {
      all.insert(reinterpret_cast<const void*>(&gpu::sum_rows<decltype(terms), false>));
      all.insert(reinterpret_cast<const void*>(&gpu::sum_rows<decltype(terms), true>));
    });
  };
  for (const DType x : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) add(x, x);
  if (!Op::kGated) add(DType::kFloat32, DType::kFloat16), add(DType::kFloat32, DType::kBFloat16);
  return all;
}

}  // namespace gemma_norm
