#include "plan.h"

#include <algorithm>

namespace gemma_norm {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The ladder: rows of up to `row_vectors` 16-byte vectors use this shape. Chosen on an H200 (docs/performance.md): four vectors a
// thread keep enough bytes in flight to saturate memory; fewer threads a row than that idle at the barrier, more starve. Beyond
// the last rung a row is streamed.
struct Rung {
  int64_t row_vectors;
  Scope scope;
  int32_t vectors;
  int32_t block_threads;  // kWave; a multiprocessor holds 32 blocks, so small rows want larger ones
};
constexpr Rung kLadder[] = {
    {8, Scope::kWave, 2, 128},
    {128, Scope::kWave, 4, 64},
    {1024, Scope::kBlock, 4, 0},
    {4096, Scope::kBlock, 8, 0},
};

// Rows past the ladder where blocks can form clusters: few enough vectors a block that several blocks share a multiprocessor.
constexpr int32_t kClusterBlockThreads = 256;
constexpr int32_t kClusterVectors = 8;

}  // namespace

LaunchPlan make_plan(int64_t hidden, DType dtype, const DeviceFacts& device) {
  const int64_t items = kVectorBytes / size_of(dtype);
  const int64_t row_vectors = divide_up(hidden, items);
  LaunchPlan plan{};
  plan.cluster = 1;
  plan.whole_vectors = hidden % items == 0;
  const Rung* rung =
      std::find_if(std::begin(kLadder), std::end(kLadder), [&](const Rung& r) { return row_vectors <= r.row_vectors; });
  if (rung == std::end(kLadder)) {
    while (plan.cluster * kClusterBlockThreads * kClusterVectors < row_vectors && plan.cluster < device.max_cluster)
      plan.cluster *= 2;
    if (plan.cluster * kClusterBlockThreads * kClusterVectors >= row_vectors) {
      plan.scope = Scope::kCluster;
      plan.vectors = kClusterVectors;
      plan.slots = static_cast<int32_t>(divide_up(row_vectors, kClusterVectors));
      plan.block_threads = kClusterBlockThreads;
      plan.group_threads = plan.cluster * plan.block_threads;
      return plan;
    }
    plan.cluster = 1;
    plan.scope = Scope::kStream;
    plan.slots = plan.group_threads = plan.block_threads = kMaxBlockThreads;
    plan.vectors = static_cast<int32_t>(std::min<int64_t>(divide_up(row_vectors, plan.slots), INT32_MAX));
    return plan;
  }
  plan.scope = rung->scope;
  plan.vectors = rung->vectors;
  plan.slots = static_cast<int32_t>(divide_up(row_vectors, rung->vectors));
  if (rung->scope == Scope::kWave) {
    plan.group_threads = 1;
    while (plan.group_threads < plan.slots) plan.group_threads *= 2;
    plan.block_threads = rung->block_threads;
  } else {
    plan.group_threads = static_cast<int32_t>(divide_up(plan.slots, device.wave_width) * device.wave_width);
    plan.block_threads = plan.group_threads;
  }
  return plan;
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
