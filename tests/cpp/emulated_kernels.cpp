// The kernels, compiled for the host by its own compiler, and their entry of the C interface.
#include <vector>

#include "cases.h"
#include "emulated_machine.h"
#include "gpu/launch.cuh"

namespace gemma_norm::kernels {
// What GEMMA_NORM_SHARED declares.
Words partials[kMaxWaves / 4];
Inbox inbox;
}  // namespace gemma_norm::kernels

namespace gemma_norm {

std::set<const void*> reachable_kernels(int64_t most_hidden) {
  std::set<const void*> all;
  for (const auto& [x, weight] : kDTypePairs)
    for (const int32_t max_cluster : {1, kMaxCluster})
      for (int64_t hidden = 1; hidden <= most_hidden; ++hidden) {
        const DeviceFacts facts{32, int64_t{1} << 42, false, max_cluster, 132};
        const LaunchPlan whole = make_plan(hidden, x, facts);
        for (const bool add : {false, true}) {
          const int64_t most_bytes = hidden * ((add ? 5 : 2) * size_of(x) + size_of(weight));
          std::vector<kernels::Kernel> chosen = {kernels::choose_kernel(x, weight, add, false, whole)};
          for (const int64_t rows : {1, 1000000})
            if (whole.whole_vectors)
              chosen.push_back(kernels::choose_kernel(x, weight, add, true, spread(whole, rows, most_bytes, facts)));
          for (const kernels::Kernel& kernel : chosen) all.insert(reinterpret_cast<const void*>(kernel.function));
        }
      }
  return all;
}

}  // namespace gemma_norm

gemma_norm::Status gemma_norm_emulated(const gemma_norm::Call* call, const gemma_norm::EmulatedGpu* gpu,
                                       gemma_norm::Message* message) {
  namespace kernels = gemma_norm::kernels;
  gemma_norm::device::set_machine(*gpu, {{kernels::partials, sizeof kernels::partials}, {&kernels::inbox, sizeof kernels::inbox}});
  return kernels::run(*call, {}, message);
}
