// Which kernel a row gets, and on how many threads: a pure function of hidden size, dtype, operator and device facts, never of the
// number of rows, so that a row's bits do not depend on what else is in the batch. (How many blocks share those threads may: see
// spread().) Knows nothing of any GPU runtime: tested without one.
#pragma once

#include <cstdint>
#include <string>

#include "../core/op_info.h"
#include "../core/row_params.h"
#include "../device/facts.h"
#include "tuning.h"

namespace gemma_norm {

struct LaunchPlan {
  int32_t kernel;             // of kKernels
  Held held;                  // by its threads
  Scope scope;                // the kernel's
  int32_t vectors;            // that a slot owns (kStream: of which one is held at a time)
  int32_t slots;              // that own part of a row
  int32_t slot_threads;       // threads of a slot: 1, or as many as it has vectors (see spread())
  int32_t group_threads;      // threads that work on a row: rounded up to a power of two (kWave) or to whole waves or blocks
  int32_t block_threads;      // threads of a block
  int32_t max_block_threads;  // what the kernel is compiled for
  int32_t cluster;            // blocks that work on a row: 1 but for kCluster
  bool whole_vectors;         // hidden is a multiple of the vector
  int32_t rows_per_block() const { return cluster > 1 ? 1 : block_threads / group_threads; }  // of each block, or cluster
};

LaunchPlan make_plan(int64_t hidden, DType dtype, const DeviceFacts& device, Held held = Held::kRow);

// The plan for this many rows, of `row_bytes` to read and write each. Where they leave most of the GPU idle, a row's threads are
// spread over the blocks of a cluster, or a small row with gates gets two threads a slot, one for each of its vectors: the same
// slots, which own the same elements, in the same tree. The same bits, therefore. On GPUs with clusters alone: it was measured on
// those.
LaunchPlan spread(const LaunchPlan& plan, int64_t rows, int64_t row_bytes, const DeviceFacts& device);

// The most blocks (kCluster: clusters) that one launch may have.
int64_t max_blocks(const LaunchPlan& plan, const DeviceFacts& device);

// Such as "block: 250 of 256 threads a row, 1 rows a block, 2 x 8 consecutive elements a thread". The dtype is that of s.
std::string describe(const LaunchPlan& plan, DType dtype);

// With GEMMA_NORM_PRINT_PLAN=1 in the environment, writes each plan to stderr the first time that it is used.
bool prints_plans();
void print_plan(const OpInfo& op, const RowParams& params, DType row_dtype, const LaunchPlan& plan, bool aligned);

}  // namespace gemma_norm
