// The launch plan: which kernel computes a row, with how many threads. It is a pure function of hidden size, dtype,
// operator and device facts. It does not depend on the number of rows, so a row has the same bits whatever else is in
// the batch. (spread() does look at the number of rows, but it only distributes the same work over more threads.)
// Nothing here needs a GPU runtime, so the tests run without one.
#pragma once

#include <cstdint>
#include <string>

#include "../core/check.h"
#include "../device/facts.h"
#include "tuning.h"

namespace gemma_norm {

struct LaunchPlan {
  int32_t kernel;             // an index into kKernels
  Held held;                  // what the kernel's threads hold
  Scope scope;                // of the kernel
  int32_t vectors;            // vectors that a slot owns (kTwoPasses: it holds one at a time)
  int32_t slots;              // slots that a row is cut into
  int32_t slot_threads;       // threads that share a slot: 1, or one for each of its vectors (see spread())
  int32_t group_threads;      // threads of a row: a power of two (kWave), whole waves, or whole blocks (kCluster)
  int32_t block_threads;      // threads of a block
  int32_t max_block_threads;  // the largest block that the kernel is compiled for
  int32_t cluster;            // blocks of a row: 1 except for kCluster
  bool whole_vectors;         // hidden is a multiple of the number of elements in a vector
  // Rows of a block, or of a cluster.
  int32_t rows_per_block() const { return cluster > 1 ? 1 : block_threads / group_threads; }
};

LaunchPlan make_plan(int64_t hidden, DType dtype, const DeviceFacts& device, Held held = Held::kRow);

// The plan for `rows` rows, each of which reads and writes `row_bytes`. Few rows leave most of a GPU idle. Then the
// threads of a row are spread over the blocks of a cluster, or a small row with gates gets two threads for each slot,
// one for each of the slot's vectors. Each slot owns the same elements as before, and the slots are added in the same
// tree, so the bits are the same. Only GPUs with clusters do this, since it was measured on no others.
LaunchPlan spread(const LaunchPlan& plan, int64_t rows, int64_t row_bytes, const DeviceFacts& device);

// How the threads of a row find the largest elements of its groups, when it is quantised.
struct GroupPlan {
  bool held;             // the kernel that holds the row can; otherwise a block takes each row, in passes
  int32_t log2_vectors;  // of a group
  int32_t lanes;         // neighbouring lanes that have vectors of one group
};
GroupPlan plan_groups(const LaunchPlan& plan, const RowParams& params, DType row_dtype);

// The plan with a block for each row, whatever its kernel was. The slots and hence the bits are the same.
LaunchPlan one_row_a_block(const LaunchPlan& plan, const DeviceFacts& device);

// Whether every access can be a whole, aligned vector. This depends on the addresses and strides of the call. It
// decides which instructions access memory, but never the shape, and so no bits. A vector takes 16 bytes, or 8 in an
// operand whose elements are half as wide as those of s.
bool is_aligned(const RowParams& params, bool whole_vectors, DType row_dtype);

// The largest number of blocks (kCluster: of clusters) that one launch may have.
int64_t max_blocks(const LaunchPlan& plan, const DeviceFacts& device);

// Calls launch() with the rows of each launch, until it returns an error: with all rows or, in turn, with parts of at
// most `most` rows (1 or more) and less than 2^31. A part is a rectangle of the two dimensions.
template <class Launch>
auto each_launch(const RowParams& p, int64_t most, const Launch& launch) {
  if (most > INT32_MAX) most = INT32_MAX;
  if (p.rows <= most) return launch(p);
  const int64_t inner = p.sizes[1] < most ? p.sizes[1] : most, sizes[kMaxRowDims] = {most / inner, inner};
  decltype(launch(p)) error{};
  for (int64_t i = 0; i < p.sizes[0] && !error; i += sizes[0])
    for (int64_t j = 0; j < p.sizes[1] && !error; j += sizes[1]) error = launch(select_rows(p, i, j, sizes));
  return error;
}

// For example "block: 250 of 256 threads a row, 1 rows a block, 2 x 8 consecutive elements a thread". `dtype` is that
// of s.
std::string describe(const LaunchPlan& plan, DType dtype);

// If the environment has GEMMA_NORM_PRINT_PLAN=1, each plan is written to stderr the first time it is used.
bool prints_plans();
void print_plan(const OpInfo& op, const RowParams& params, DType row_dtype, const LaunchPlan& plan, bool aligned);

}  // namespace gemma_norm
