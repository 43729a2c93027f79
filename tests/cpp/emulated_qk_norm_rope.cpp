// The kernels of qk_norm_rope, compiled for the host, as in emulated_op.cuh.
#include <set>

#include "device/emulated.h"
#include "gpu/rope_launch.cuh"
#include "ops/qk_norm_rope.h"

template gemma_norm::Status gemma_norm::gpu::launch_op<gemma_norm::QkNormRope>(const Call&, device::Stream, Message*);

namespace gemma_norm {

std::set<const void*> rope_kernels() {
  std::set<const void*> all;
  const auto function = [](const auto& kernel) { return reinterpret_cast<const void*>(kernel.function); };
  const auto add = [&](DType x, DType weight, DType angles) {
    for (const int vectors : {2, 4})
      for (const gpu::Partner partner :
           {gpu::Partner::kInVector, gpu::Partner::kInThread, gpu::Partner::kInOtherLane, gpu::Partner::kInMemory})
        all.insert(partner != gpu::Partner::kInMemory
                       ? function(gpu::find_rope_kernel<true>(x, weight, angles, vectors, partner))
                       : function(gpu::find_rope_kernel<false>(x, weight, angles, vectors, partner)));
  };
  for (const DType weight : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
    add(DType::kFloat32, weight, DType::kFloat32);
  for (const DType x : {DType::kFloat16, DType::kBFloat16})
    for (const DType weight : {x, DType::kFloat32})
      for (const DType angles : {x, DType::kFloat32}) add(x, weight, angles);
  return all;
}

}  // namespace gemma_norm
