// What a kernel is told: the checked, collapsed form of a Call (made by check.cpp), the same for every device.
#pragma once

#include <cstdint>

#include "../gemma_norm.h"

namespace gemma_norm {

constexpr int kMaxRowDims = 2;

// The leading dimensions, collapsed together for all tensors of the call: row r has the coordinates of r in `sizes`, the last
// of them fastest. One dimension is the common case (every tensor's rows lie at one stride), two are the heads of a q or k that
// is a slice of a fused buffer; what has more is launched in slices (check.h), because a kernel spends time on finding rows too.
// With groups, a row is one group, `hidden` its size, and the weight has a stride along the dimension of the groups.
struct RowParams {
  void* data[kOperands];                    // null where the call has no such tensor
  int64_t strides[kOperands][kMaxRowDims];  // in elements; 0 for what all rows share
  DType dtypes[kOperands];                  // kOther where the call has no such tensor

  int64_t first_row;  // of this launch: a grid that would be too large is cut
  int64_t rows;
  int64_t hidden;
  int64_t sizes[kMaxRowDims];
  int32_t row_dims;  // 1 .. kMaxRowDims

  float eps;
  float inv_hidden;     // 1 / hidden
  float weight_offset;  // 1 for gemma; else -0, the one value that leaves every weight's bits as they are
  int32_t round_each_step, sigmoid, norm_before_gate;  // see Options; 32 bits, which AMD's scalar loads take
};

}  // namespace gemma_norm
