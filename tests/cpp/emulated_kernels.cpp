// The kernels, compiled for the host by its own compiler, and their entry of the C interface.
#include "cases.h"
#include "emulated_machine.h"
#include "kernels/dispatch.cuh"

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
        for (const bool aligned : {false, whole.whole_vectors})
          for (const int64_t rows : {1, 1000000})
            for (const bool add : {false, true}) {
              const int64_t most_bytes = hidden * ((add ? 5 : 2) * size_of(x) + size_of(weight));
              const LaunchPlan plan = aligned ? spread(whole, rows, most_bytes, facts) : whole;
              kernels::with_dtypes(x, weight, [&](auto x, auto w) {
                return kernels::with_bool(add, [&](auto add) {
                  return kernels::with_bool(aligned, [&](auto aligned) {
                    const auto kernel = kernels::choose_kernel<typename decltype(x)::type, typename decltype(w)::type,
                                                               decltype(add)::value, decltype(aligned)::value>(plan);
                    all.insert(reinterpret_cast<const void*>(kernel.function));
                    return device::kSuccess;
                  });
                });
              });
            }
      }
  return all;
}

}  // namespace gemma_norm

gemma_norm::Status gemma_norm_emulated(const gemma_norm::NormArgs* args, const gemma_norm::EmulatedGpu* gpu,
                                       gemma_norm::Message* message) {
  namespace kernels = gemma_norm::kernels;
  gemma_norm::device::set_machine(*gpu, {{kernels::partials, sizeof kernels::partials}, {&kernels::inbox, sizeof kernels::inbox}});
  return kernels::run(*args, {}, message);
}
