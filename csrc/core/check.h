// All checks of a call's arguments. Depends on neither PyTorch nor any device.
#pragma once

#include "op_info.h"
#include "row_params.h"

namespace gemma_norm {

constexpr int kMaxDims = 64;
constexpr int64_t kMaxHeadDim = 512;  // elements of a head; a wave of a GPU has room for so many

// Checks `call` by its operator's rules and writes its collapsed form into `params`. On kInvalidArgument, `message`
// reads like "rms_norm: weight must have shape [4096], got [4095]", and nothing may be launched. On kOk,
// call.before_write has been called.
//
// If several arguments are wrong, the first failed check is reported. The order is: each operand in the order of the
// rules (dtype, shape, strides), then the options, then overlapping memory. python/gemma_norm/_checks.py has the same
// order and the same messages.
//
// If more than kMaxRowDims dimensions are left after collapsing, the call is cut into slices->count launches of equal
// size; select_slice gives the parameters of each. The count is 0 if the tensors are empty.
struct RowSlices {
  int64_t count;
  int32_t dims;
  int64_t sizes[kMaxDims + 1];  // one more, because the groups of a row can be a dimension as well
  int64_t strides[kOperands][kMaxDims + 1];
};

// `readable`: the tensors are in memory that this function can read. It then also checks values: the positions, which a
// GPU's kernels have to bring into the range of the cache.
Status check(const Call& call, RowParams* params, RowSlices* slices, Message* message, bool readable = false);

// `params` with all pointers moved to slice `index`.
RowParams select_slice(const RowParams& params, const RowSlices& slices, int64_t index);

// `params` with the rows whose coordinates start at `outer` and `inner`, at most `most` of them along each dimension.
RowParams select_rows(const RowParams& params, int64_t outer, int64_t inner, const int64_t (&most)[kMaxRowDims]);

}  // namespace gemma_norm
