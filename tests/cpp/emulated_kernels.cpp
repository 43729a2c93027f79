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
          for (const int64_t rows : {1, 1000000}) {
            const LaunchPlan plan = aligned ? spread(whole, rows, hidden * (2 * size_of(x) + size_of(weight)), facts) : whole;
            kernels::with_dtypes(x, weight, [&](auto x, auto w) {
              using X = typename decltype(x)::type;
              using W = typename decltype(w)::type;
              return kernels::with_bool(aligned, [&](auto aligned) {
                constexpr bool kAligned = decltype(aligned)::value;
                for (const auto& kernel :
                     {kernels::choose_kernel<X, W, false, kAligned>(plan), kernels::choose_kernel<X, W, true, kAligned>(plan)})
                  all.insert(reinterpret_cast<const void*>(kernel.function));
                return device::kSuccess;
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
