#include "plan.h"

#include <algorithm>
#include <iterator>

namespace gemma_norm {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The ladder: rows of up to `row_vectors` 16-byte vectors use this shape. Chosen on an H200 (docs/performance.md): few vectors a
// thread make one row quick, and of many rows 48 to 96 KB should be in flight on a multiprocessor, by several blocks, lest they
// all load, then all store. The rungs with clusters are for GPUs that have them, in place of the next without. What is larger is
// streamed.
struct Rung {
  int64_t row_vectors;
  Scope scope;
  int32_t vectors;
  int32_t most_threads;  // of a block; kWave: exactly
};
constexpr Rung kLadder[] = {
    {64, Scope::kWave, 2, 128},       {128, Scope::kWave, 4, 64},     {512, Scope::kBlock, 2, 256},
    {1024, Scope::kBlock, 4, 256},    {1536, Scope::kBlock, 8, 192},  {2048, Scope::kBlock, 8, 256},
    {16384, Scope::kCluster, 8, 256}, {8192, Scope::kBlock, 8, 1024}, {65536, Scope::kCluster, 8, 1024},
};

constexpr int32_t kStreamThreads = 512, kClusterBlockThreads = 256;

// Bytes that one multiprocessor moves in about the time of a cluster's exchange of sums: with no more of a row, nothing is gained
// by spreading it (docs/performance.md).
constexpr int64_t kWorthSpreading = 24 * 1024;

// Over blocks of `threads`, or of more where a cluster has too few blocks for that. A power of two, so that the tree over the slots
// is as that of one block.
void use_cluster(LaunchPlan* plan, int32_t threads) {
  while (threads * kMaxCluster < plan->slots) threads *= 2;
  plan->scope = Scope::kCluster;
  plan->block_threads = threads;
  plan->cluster = static_cast<int32_t>(divide_up(plan->slots, threads));
  plan->group_threads = plan->cluster * threads;
}

}  // namespace

LaunchPlan make_plan(int64_t hidden, DType dtype, const DeviceFacts& device) {
  const int64_t items = kVectorBytes / size_of(dtype);
  const int64_t row_vectors = divide_up(hidden, items);
  LaunchPlan plan{};
  plan.cluster = 1;
  plan.whole_vectors = hidden % items == 0;
  const bool clusters = device.max_cluster == kMaxCluster;
  const Rung* rung = std::find_if(std::begin(kLadder), std::end(kLadder), [&](const Rung& r) {
    return row_vectors <= r.row_vectors && (clusters || r.scope != Scope::kCluster);
  });
  if (rung == std::end(kLadder)) {
    plan.scope = Scope::kStream;
    plan.slots = plan.group_threads = plan.block_threads = plan.most_threads = kStreamThreads;
    plan.vectors = static_cast<int32_t>(std::min<int64_t>(divide_up(row_vectors, plan.slots), INT32_MAX));
    return plan;
  }
  plan.scope = rung->scope;
  plan.vectors = rung->vectors;
  plan.most_threads = rung->most_threads;
  plan.slots = static_cast<int32_t>(divide_up(row_vectors, rung->vectors));
  switch (plan.scope) {
    case Scope::kWave:
      plan.group_threads = 1;
      while (plan.group_threads < plan.slots) plan.group_threads *= 2;
      plan.block_threads = rung->most_threads;
      break;
    case Scope::kCluster: use_cluster(&plan, kClusterBlockThreads); break;
    default:
      plan.group_threads = static_cast<int32_t>(divide_up(plan.slots, device.wave_width) * device.wave_width);
      plan.block_threads = plan.group_threads;
  }
  return plan;
}

LaunchPlan spread(const LaunchPlan& plan, int64_t rows, int64_t row_bytes, const DeviceFacts& device) {
  if (device.max_cluster != kMaxCluster || (plan.scope != Scope::kBlock && plan.scope != Scope::kCluster)) return plan;
  LaunchPlan wide = plan;
  use_cluster(&wide, device.wave_width);
  wide.most_threads = kClusterBlockThreads;  // what has larger blocks is not spread
  // Starting blocks takes time as well: the larger a row, the more of them pay. Beyond two a multiprocessor none do.
  const int64_t blocks_a_processor = row_bytes < 2 * kWorthSpreading ? 1 : 2;
  const bool pays = row_bytes > kWorthSpreading && rows * wide.cluster <= blocks_a_processor * device.processors;
  return pays && wide.block_threads < plan.block_threads ? wide : plan;
}

int64_t max_blocks(const LaunchPlan& plan, const DeviceFacts& device) {
  return std::min<int64_t>(INT32_MAX, device.max_threads / plan.block_threads) / plan.cluster;
}

std::string describe(const LaunchPlan& plan, DType dtype) {
  const char* scope = plan.scope == Scope::kWave      ? "wave"
                      : plan.scope == Scope::kBlock   ? "block"
                      : plan.scope == Scope::kCluster ? "cluster"
                                                      : "stream";
  const auto items = std::to_string(kVectorBytes / size_of(dtype));
  return std::string(scope) + ": " + std::to_string(plan.slots) + " of " + std::to_string(plan.group_threads) + " threads a row, " +
         std::to_string(plan.rows_per_block()) + " rows a block, " + std::to_string(plan.vectors) + " x " + items +
         (plan.whole_vectors ? " consecutive" : " interleaved") + " elements a thread";
}

}  // namespace gemma_norm
