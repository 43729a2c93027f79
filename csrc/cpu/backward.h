// The backward pass on CPUs; ops/rms_norm_backward.h and ops/gated_rms_norm_backward.h have the formulas.
//
// The rows are divided into chunks, whose number depends only on the number of rows and their length. Each chunk adds
// up dout * n (u * n of the gated norm) over its rows, in order, in a row of partial sums. The rows of partial sums are
// then added up, in order. So dweight has the same bits with any number of threads.
#pragma once

#include <cstdint>

#include "exact.h"  // before any formula

#include "../core/row_params.h"

namespace gemma_norm {

// A row of the gated norm is computed with the help of so many rows of float32.
constexpr int64_t kBufferRows = 2;

struct BackwardWork {
  RowParams params;
  float* factors;    // weight, 1 + weight or 1: `sections` times `columns`
  float* partials;   // as many floats for each chunk; null if no dweight is wanted
  float* buffers;    // for each chunk kBufferRows rows of `columns`; null but for the gated norm
  int64_t columns;   // hidden, rounded up to whole steps of a kernel, so that a group does not touch another's sums
  int64_t sections;  // the groups of a row of x, each with weights of its own; 1 without group_size
  int64_t chunks;

  float* partial(int64_t chunk) const { return partials ? partials + chunk * sections * columns : nullptr; }
  // The buffer of a thread whose first chunk is this one.
  float* buffer(int64_t chunk) const { return buffers + chunk * kBufferRows * columns; }
};

// Elements [begin, end) of something, on the calling thread.
using BackwardFunction = void (*)(const BackwardWork& work, int64_t begin, int64_t end);

struct BackwardKernels {
  BackwardFunction factors;       // computes the factors of sections [begin, end)
  BackwardFunction chunks;        // computes dx of chunks [begin, end), and adds to their partial sums
  BackwardFunction gated_chunks;  // the same, and dgate, for the gated norm
  BackwardFunction column_steps;  // adds up the partial sums of steps [begin, end) of kColumnStep columns
};

// A step of the sum over chunks. It is also what `columns` is a multiple of: no kernel has longer vectors or steps.
constexpr int64_t kColumnStep = 64;

// Chunks consist of whole groups of this many rows, but for the last. The kernel loads and stores the partial sums once
// for a group. Groups of 4 rows took up to 16 % more time, and single rows up to 19 % (docs/tuning-log.md, T85).
constexpr int64_t kGroupRows = 2;

// The first row of a chunk; that of chunk number `chunks` is the number of rows.
inline int64_t first_row(int64_t rows, int64_t chunks, int64_t chunk) {
  const int64_t groups = (rows + kGroupRows - 1) / kGroupRows;
  const int64_t row = chunk * groups / chunks * kGroupRows;
  return row < rows ? row : rows;
}

}  // namespace gemma_norm
