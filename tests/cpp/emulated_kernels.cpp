// The kernels, compiled for the host by its own compiler, and their entry of the C interface.
#include <vector>

#include "cases.h"
#include "emulated_machine.h"
#include "gpu/entry.h"
#include "gpu/launch.cuh"

namespace gemma_norm::gpu {
template Status run<RmsNorm>(const Call&, device::Stream, Message*);
template Status run<AddRmsNorm>(const Call&, device::Stream, Message*);
}  // namespace gemma_norm::gpu

namespace gemma_norm {

namespace {

template <class Op>
void add_reachable(int64_t most_hidden, std::set<const void*>* all) {
  for (const auto& [x, weight] : kDTypePairs)
    for (const int32_t max_cluster : {1, kMaxCluster})
      for (int64_t hidden = 1; hidden <= most_hidden; ++hidden) {
        const DeviceFacts facts{32, int64_t{1} << 42, false, max_cluster, 132};
        const LaunchPlan whole = make_plan(hidden, x, facts, Op::Source::kTwoRows);
        int64_t most_bytes = 0;
        for (const OperandRule& rule : Op::kInfos[0]) most_bytes += hidden * size_of(rule.operand == kWeight ? weight : x);
        const auto add = [&](bool aligned, const LaunchPlan& plan) {
          all->insert(reinterpret_cast<const void*>(gpu::choose_kernel<Op>(x, weight, aligned, plan).function));
        };
        add(false, whole);
        for (const int64_t rows : {1, 1000000})
          if (whole.whole_vectors) add(true, spread(whole, rows, most_bytes, facts));
      }
}

}  // namespace

std::set<const void*> reachable_kernels(int64_t most_hidden) {
  std::set<const void*> all;
  add_reachable<RmsNorm>(most_hidden, &all);
  add_reachable<AddRmsNorm>(most_hidden, &all);
  return all;
}

}  // namespace gemma_norm

gemma_norm::Status gemma_norm_emulated(const gemma_norm::Call* call, const gemma_norm::EmulatedGpu* machine,
                                       gemma_norm::Message* message) {
  using namespace gemma_norm;
  device::set_machine(*machine);
  return gpu::run(*call, {}, message);
}
