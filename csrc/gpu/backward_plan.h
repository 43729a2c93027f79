// Which kernel computes the gradients of a call, and how its rows are cut into chunks.
#pragma once

#include "../core/row_params.h"
#include "backward_tuning.h"

namespace gemma_norm {

struct BackwardPlan {
  int32_t kernel;         // an index into kBackwardKernels
  Scope scope;            // of that kernel; kTwoPasses also for unaligned rows of more than a wave
  int32_t slots;          // that a row is cut into; see shapes.h
  int32_t vectors;        // that a slot owns
  int32_t log2_slots;     // kWave: log2 of `slots` rounded up to a power of two
  int32_t block_threads;  // threads of a block
  bool whole_vectors;     // hidden is a multiple of the number of elements in a vector
  int64_t chunks;         // of the rows: one for each block of the launch
  bool one_row;           // rows are aligned, and each group of a block has at most one of them, for which there are
                          // kernels without a loop

  // Rows that a block works on at a time.
  int32_t groups() const { return scope == Scope::kWave ? block_threads >> log2_slots : 1; }
};

// The groups of a row with group_size, or 1. `params` has two row dimensions, of which they are the second.
int64_t groups_of(const RowParams& params);

// A pure function of the rows, hidden and x's dtype, of whether the rows are aligned, and of the wave width, to which
// blocks are rounded up.
BackwardPlan make_backward_plan(const RowParams& params, bool aligned, int32_t wave_width);

}  // namespace gemma_norm
