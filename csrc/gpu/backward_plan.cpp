#include "backward_plan.h"

#include <algorithm>
#include <iterator>

namespace gemma_norm {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

int64_t groups_of(const RowParams& p) { return p.strides[kWeight][1] != 0 ? p.sizes[1] : 1; }

BackwardPlan make_backward_plan(const RowParams& params, bool aligned, int32_t wave_width) {
  const int64_t items = kVectorBytes / size_of(params.dtypes[kX]), row_vectors = divide_up(params.hidden, items);
  const bool counts_in_32_bits = params.rows < INT32_MAX / 2;  // as all kernels but that of two passes do
  const BackwardTuning* const kernel =
      std::find_if(std::begin(kBackwardKernels), std::end(kBackwardKernels), [&](const BackwardTuning& k) {
        return row_vectors <= k.row_vectors && (aligned || k.scope != Scope::kBlock) &&
               (counts_in_32_bits || k.scope == Scope::kTwoPasses);
      });
  BackwardPlan plan{};
  plan.kernel = static_cast<int32_t>(kernel - kBackwardKernels);
  plan.scope = kernel->scope;
  plan.whole_vectors = params.hidden % items == 0;
  plan.vectors = kernel->vectors;
  plan.slots = static_cast<int32_t>(divide_up(row_vectors, kernel->vectors));
  plan.block_threads = kernel->max_block_threads;
  switch (plan.scope) {
    case Scope::kWave:
      while (1 << plan.log2_slots < plan.slots) ++plan.log2_slots;
      break;
    case Scope::kBlock:
      plan.block_threads = static_cast<int32_t>(divide_up(plan.slots, wave_width) * wave_width);
      break;
    default:
      plan.slots = kTwoPassSlots;
      plan.vectors = static_cast<int32_t>(std::min<int64_t>(divide_up(row_vectors, kTwoPassSlots), INT32_MAX));
  }
  // The rows of a chunk are the same group of their rows, so the number of groups divides that of the chunks.
  const int64_t groups = groups_of(params);
  plan.chunks = std::min<int64_t>(kernel->chunks, divide_up(params.rows, plan.groups()));
  plan.chunks = std::max(plan.chunks / groups * groups, std::min(groups, params.rows));
  plan.one_row = aligned && has_one_row_kernel(*kernel) && params.rows <= plan.chunks * plan.groups();
  return plan;
}

}  // namespace gemma_norm
