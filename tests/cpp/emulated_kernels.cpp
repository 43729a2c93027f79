// The kernels, compiled for the host by its own compiler, and their entry of the C interface.
#include <utility>

#include "cases.h"
#include "emulated_machine.h"
#include "gpu/entry.h"
#include "gpu/launch.cuh"

namespace gemma_norm::gpu {
template Status launch_op<RmsNorm>(const Call&, device::Stream, Message*);
template Status launch_op<AddRmsNorm>(const Call&, device::Stream, Message*);
template Status launch_op<GatedRmsNorm>(const Call&, device::Stream, Message*);
}  // namespace gemma_norm::gpu

namespace gemma_norm {

namespace {

// A kernel of tuning.h, for aligned rows or not.
using KernelOfPlan = std::pair<bool, int32_t>;

// What rows of up to so many elements can ask for. A row that is no multiple of the vector takes the kernel of the next one that
// is.
std::set<KernelOfPlan> kernels_of_plans(const Case& variant, int64_t most_hidden) {
  int64_t item_bytes = 0;  // of all operands together, those that may be left out too
  for (const OperandRule& rule : variant.op())
    if (rule.operand != kWeight || variant.weight_dtype != DType::kOther) item_bytes += size_of(variant.dtype_of(rule.operand));
  std::set<KernelOfPlan> all;
  const int64_t items = kVectorBytes / size_of(variant.row_dtype());
  for (const int32_t max_cluster : {1, kMaxCluster})
    for (int64_t hidden = items; hidden <= most_hidden; hidden += items) {
      const DeviceFacts facts{32, int64_t{1} << 42, false, max_cluster, 132};
      const LaunchPlan whole = make_plan(hidden, variant.row_dtype(), facts, variant.held());
      all.insert({false, whole.kernel});
      for (const int64_t rows : {1, 1000000}) all.insert({true, spread(whole, rows, hidden * item_bytes, facts).kernel});
    }
  return all;
}

template <class Op>
void add_reachable(const Case& variant, int64_t most_hidden, std::set<const void*>* all) {
  RowParams p{};
  for (const OperandRule& rule : variant.op()) p.dtypes[rule.operand] = variant.dtype_of(rule.operand);
  p.round_each_step = variant.round_each_step;
  p.norm_before_gate = variant.norm_before_gate;
  const gpu::VariantKernels kernels = gpu::find_kernels<Op>(p);
  for (const auto& [aligned, kernel] : kernels_of_plans(variant, most_hidden))
    all->insert(reinterpret_cast<const void*>(kernels.by_alignment[aligned][kernel].function));
}

}  // namespace

std::set<const void*> reachable_kernels(int64_t most_hidden) {
  std::set<const void*> all;
  for (const Case& variant : all_variants())
    Ops::visit(&variant.op(), [&](auto op) { add_reachable<decltype(op)>(variant, most_hidden, &all); });
  return all;
}

}  // namespace gemma_norm

gemma_norm::Status gemma_norm_emulated(const gemma_norm::Call* call, const gemma_norm::EmulatedGpu* machine,
                                       gemma_norm::Message* message) {
  using namespace gemma_norm;
  device::set_machine(*machine);
  return gpu::dispatch(*call, {}, message);
}
