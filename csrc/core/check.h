// The only place that checks parameters. Knows nothing of torch or of any device.
#pragma once

#include "gemma_norm.h"
#include "kernels/row_params.h"

namespace gemma_norm {

// Checks `args` and collapses their leading dimensions into `params`. On kInvalidArgument `message` reads like
// "rms_norm: weight must have shape [4096], got [4095]" and nothing may be launched. On kOk, args.before_write has been called.
//
// More than kMaxRowDims dimensions that do not collapse are cut into `*slices` equal launches: call select_slice for each.
// `*slices` is 0 when there is nothing to do.
struct RowSlices {
  int64_t count;
  int32_t dims;
  int64_t sizes[64];
  int64_t strides[5][64];  // x, residual, post, out, residual_out
};

Status check(const NormArgs& args, RowParams* params, RowSlices* slices, Message* message);

// `params` with its pointers moved to slice `index`.
RowParams select_slice(const RowParams& params, const RowSlices& slices, int64_t index);

}  // namespace gemma_norm
