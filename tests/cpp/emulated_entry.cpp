// The emulated device's entry of the C interface, and which kernels it can be asked for. The kernels are in
// emulated_<op>.cpp.
#include <utility>

#include "cases.h"
#include "emulated_machine.h"
#include "gpu/entry.h"
#include "gpu/plan.h"

namespace gemma_norm {

template <class Op>
const void* kernel_function(const RowParams& params, bool aligned, int32_t kernel);  // emulated_op.cuh
template <class Op>
std::set<const void*> all_backward_kernels();  // emulated_backward.cuh

namespace {

// Whether rows are aligned, and which kernel of tuning.h a plan names for them.
using KernelOfPlan = std::pair<bool, int32_t>;

// What the plans of rows of up to so many elements name. Lengths that are no multiple of a vector need no plans of
// their own: they have the kernel of the next multiple.
std::set<KernelOfPlan> kernels_of_plans(const Case& variant, int64_t most_hidden) {
  int64_t item_bytes = 0;  // an element of each operand, those that may be left out included
  for (const OperandRule& rule : variant.op())
    if (rule.operand != kWeight || variant.has(kWeight)) item_bytes += size_of(variant.dtype_of(rule.operand));
  std::set<KernelOfPlan> all;
  const int64_t items = kVectorBytes / size_of(variant.row_dtype());
  for (const int32_t max_cluster : {1, kMaxCluster})
    for (int64_t hidden = items; hidden <= most_hidden; hidden += items) {
      const DeviceFacts facts{32, int64_t{1} << 42, false, max_cluster, 132};
      const LaunchPlan whole = make_plan(hidden, variant.row_dtype(), facts, variant.held());
      all.insert({false, whole.kernel});
      for (const int64_t rows : {1, 1000000})
        all.insert({true, spread(whole, rows, hidden * item_bytes, facts).kernel});
    }
  return all;
}

template <class Op>
void add_reachable(const Case& variant, int64_t most_hidden, std::set<const void*>* all) {
  RowParams p{};
  for (const OperandRule& rule : variant.op()) p.dtypes[rule.operand] = variant.dtype_of(rule.operand);
  p.round_each_step = variant.round_each_step;
  p.norm_before_gate = variant.norm_before_gate;
  for (const auto& [aligned, kernel] : kernels_of_plans(variant, most_hidden))
    all->insert(kernel_function<Op>(p, aligned, kernel));
}

}  // namespace

std::set<const void*> reachable_kernels(int64_t most_hidden) {
  std::set<const void*> all;
  for (const Case& variant : all_variants())
    ForwardOps::visit(&variant.op(), [&](auto op) { add_reachable<decltype(op)>(variant, most_hidden, &all); });
  return all;
}

std::set<const void*> backward_kernels() {
  std::set<const void*> all = all_backward_kernels<RmsNormBackward>();
  all.merge(all_backward_kernels<GatedRmsNormBackward>());
  return all;
}

}  // namespace gemma_norm

gemma_norm::Status gemma_norm_emulated(const gemma_norm::Call* call, const gemma_norm::EmulatedGpu* machine,
                                       gemma_norm::Message* message) {
  using namespace gemma_norm;
  device::set_machine(*machine);
  return gpu::dispatch(*call, {}, message);
}
