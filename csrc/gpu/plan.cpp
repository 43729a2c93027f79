#include "plan.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <mutex>
#include <set>

namespace gemma_norm {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Distributes the plan's slots over the blocks of a cluster. A block gets `threads` threads, doubled until kMaxCluster
// blocks suffice. The number stays a power of two, so that the tree over the slots, and with it every bit, is that of a
// single block.
void use_cluster(LaunchPlan* plan, int32_t threads) {
  while (threads * kMaxCluster < plan->slots) threads *= 2;
  plan->scope = Scope::kCluster;
  plan->block_threads = threads;
  plan->cluster = static_cast<int32_t>(divide_up(plan->slots, threads));
  plan->group_threads = plan->cluster * threads;
}

}  // namespace

LaunchPlan make_plan(int64_t hidden, DType dtype, const DeviceFacts& device, Held held) {
  const int64_t items = kVectorBytes / size_of(dtype);
  const int64_t row_vectors = divide_up(hidden, items);
  const bool has_clusters = device.max_cluster == kMaxCluster;
  const Shape* const shape = find_shape(row_vectors, has_clusters);
  const KernelTuning* const kernel = std::find_if(std::begin(kKernels), std::end(kKernels), [&](const KernelTuning& k) {
    return (shape ? row_vectors <= k.row_vectors : k.scope == Scope::kTwoPasses) &&
           (has_clusters || k.scope != Scope::kCluster) && k.resident_threads[static_cast<int>(held)];
  });
  LaunchPlan plan{};
  plan.kernel = static_cast<int32_t>(kernel - kKernels);
  plan.held = held;
  plan.scope = kernel->scope;
  plan.max_block_threads = kernel->max_block_threads;
  plan.cluster = 1;
  plan.slot_threads = 1;
  plan.whole_vectors = hidden % items == 0;
  plan.slots = shape ? static_cast<int32_t>(divide_up(row_vectors, shape->vectors)) : kTwoPassSlots;
  plan.vectors =
      shape ? shape->vectors : static_cast<int32_t>(std::min<int64_t>(divide_up(row_vectors, plan.slots), INT32_MAX));
  switch (plan.scope) {
    case Scope::kWave:
      plan.group_threads = 1;
      while (plan.group_threads < plan.slots) plan.group_threads *= 2;
      plan.block_threads = kernel->max_block_threads;
      break;
    case Scope::kCluster: use_cluster(&plan, kClusterBlockThreads); break;
    default:
      plan.group_threads = static_cast<int32_t>(divide_up(plan.slots, device.wave_width) * device.wave_width);
      plan.block_threads = plan.group_threads;
  }
  return plan;
}

LaunchPlan spread(const LaunchPlan& plan, int64_t rows, int64_t row_bytes, const DeviceFacts& device) {
  if (device.max_cluster != kMaxCluster || plan.scope == Scope::kTwoPasses) return plan;
  LaunchPlan wide = plan;
  if (plan.scope == Scope::kWave) {
    if (plan.vectors != 2 || 2 * plan.group_threads > device.wave_width) return plan;
    wide.slot_threads = 2;
    wide.group_threads *= 2;
    wide.kernel = find_kernel(Scope::kWave, 1, plan.max_block_threads);
    if (!kKernels[wide.kernel].resident_threads[static_cast<int>(plan.held)]) return plan;
    const bool pays = divide_up(rows, wide.rows_per_block()) <= int64_t{kWorthSharing} * device.processors;
    return pays ? wide : plan;
  }
  use_cluster(&wide, device.wave_width);
  const bool pays =
      row_bytes > kWorthSpreading && rows * wide.cluster <= int64_t{blocks_a_processor(row_bytes)} * device.processors;
  if (!pays || wide.block_threads >= plan.block_threads) return plan;
  wide.max_block_threads = kClusterBlockThreads;  // a row that needs larger blocks is not spread
  wide.kernel = find_kernel(Scope::kCluster, plan.vectors, kClusterBlockThreads);
  return wide;
}

GroupPlan plan_groups(const LaunchPlan& plan, const RowParams& p, DType row_dtype) {
  if (plan.max_block_threads == kMaxBlockThreads || plan.scope == Scope::kTwoPasses) return {};
  if (p.scale_group == 0 || p.scale_group == p.hidden) return {true, 0, 1};
  const int64_t items = kVectorBytes / size_of(row_dtype), vectors = p.scale_group / items;
  if (vectors * items != p.scale_group || vectors & (vectors - 1)) return {};
  int32_t lanes = 1;  // on all GPUs alike
  while (lanes < 32 && lanes < vectors && plan.slots % (2 * lanes) == 0) lanes *= 2;
  const bool held = lanes == vectors || (plan.scope == Scope::kBlock && p.hidden / p.scale_group <= kMaxGroups);
  return {held, __builtin_ctzll(vectors), lanes};
}

LaunchPlan one_row_a_block(const LaunchPlan& plan, const DeviceFacts& device) {
  LaunchPlan one = plan;
  one.kernel = kKernelCount - 1;
  one.scope = Scope::kTwoPasses;
  one.cluster = one.slot_threads = 1;
  one.max_block_threads = kMaxBlockThreads;
  one.block_threads = one.group_threads =
      static_cast<int32_t>(divide_up(plan.slots, device.wave_width) * device.wave_width);
  return one;
}

bool is_aligned(const RowParams& p, bool whole_vectors, DType row_dtype) {
  const int64_t items = kVectorBytes / size_of(row_dtype);
  bool aligned = whole_vectors;
  for (int o = 0; o < kOperands; ++o) {
    if (o == kScale || o == kGlobalScale || o == kScaleOut) continue;
    const int64_t item = size_of(p.dtypes[o]), bytes = items * item < kVectorBytes ? items * item : kVectorBytes;
    uint64_t bits = reinterpret_cast<uintptr_t>(p.data[o]);
    for (const int64_t stride : p.strides[o]) bits |= stride * item;
    aligned = aligned && bits % bytes == 0;
  }
  return aligned;
}

int64_t max_blocks(const LaunchPlan& plan, const DeviceFacts& device) {
  return std::min<int64_t>(INT32_MAX, device.max_threads / plan.block_threads) / plan.cluster;
}

std::string describe(const LaunchPlan& plan, DType dtype) {
  constexpr const char* kScopes[] = {"wave", "block", "cluster", "two passes"};
  const auto items = std::to_string(kVectorBytes / size_of(dtype));
  return std::string(kScopes[static_cast<int>(plan.scope)]) + ": " + std::to_string(plan.slots * plan.slot_threads) +
         " of " + std::to_string(plan.group_threads) + " threads a row, " + std::to_string(plan.rows_per_block()) +
         " rows a block, " + std::to_string(plan.vectors / plan.slot_threads) + " x " + items +
         (plan.whole_vectors ? " consecutive" : " interleaved") + " elements a thread";
}

bool prints_plans() {
  static const bool prints = [] {
    const char* const value = std::getenv("GEMMA_NORM_PRINT_PLAN");
    return value && std::string(value) == "1";
  }();
  return prints;
}

void print_plan(const OpInfo& op, const RowParams& params, DType row_dtype, const LaunchPlan& plan, bool aligned) {
  constexpr const char* kDTypes[] = {"float32", "float16", "bfloat16", "none"};
  const auto dtype = [&](Operand operand) { return kDTypes[static_cast<int>(params.dtypes[operand])]; };
  std::string text = std::string("gemma_norm: ") + op.name + ", hidden " + std::to_string(params.hidden) + ", " +
                     dtype(kX) + ", weight " + dtype(kWeight) + ": " + describe(plan, row_dtype);
  if (plan.cluster > 1) text += ", " + std::to_string(plan.cluster) + " blocks a cluster";
  text += aligned ? ", 16 bytes an access\n" : ", an element an access\n";
  static std::mutex mutex;
  static std::set<std::string> printed;
  const std::lock_guard<std::mutex> lock(mutex);
  if (printed.insert(text).second) std::fputs(text.c_str(), stderr);
}

}  // namespace gemma_norm
