// The only place that checks parameters. Knows nothing of torch or of any device.
#pragma once

#include "op_info.h"
#include "row_params.h"

namespace gemma_norm {

constexpr int kMaxDims = 64;

// Checks `call` by its operator's rules and collapses the leading dimensions into `params`. On kInvalidArgument `message` reads
// like "rms_norm: weight must have shape [4096], got [4095]" and nothing may be launched. On kOk, call.before_write has been
// called. The order of checks decides what is told where several things are wrong: each operand in the order of the rules (dtype,
// shape, strides), the options, then memory that is written and must not be shared. python/gemma_norm/_checks.py has the same order
// and the same words.
//
// More than kMaxRowDims dimensions that do not collapse are cut into `*slices` equal launches: call select_slice for each.
// `*slices` is 0 when there is nothing to do.
struct RowSlices {
  int64_t count;
  int32_t dims;
  int64_t sizes[kMaxDims + 1];  // the groups may be one more
  int64_t strides[kOperands][kMaxDims + 1];
};

Status check(const Call& call, RowParams* params, RowSlices* slices, Message* message);

// `params` with its pointers moved to slice `index`.
RowParams select_slice(const RowParams& params, const RowSlices& slices, int64_t index);

}  // namespace gemma_norm
