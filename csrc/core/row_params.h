// The parameters of a kernel: the checked and collapsed form of a Call, by collapse.cpp, the same for every device.
#pragma once

#include <cstdint>

#include "../gemma_norm.h"
#include "quantized.h"

namespace gemma_norm {

constexpr int kMaxRowDims = 2;

// The leading dimensions are collapsed together for all tensors of a call. Row r has the coordinates of r in `sizes`,
// of which the last varies fastest. Usually one dimension is left: in each tensor, one stride leads from row to row.
// It is the last of `sizes`, and those before it have size 1 and no strides. There are two for the heads of a q or k
// that is a slice of a fused buffer. A call with more is launched in slices (check.h), because finding a row takes a
// kernel's time. With groups, a row is one group, `hidden` is the group's size, and the weight has a stride along the
// dimension of the groups, the last.
struct RowParams {
  void* data[kOperands];                    // null where the call has no such tensor
  int64_t strides[kOperands][kMaxRowDims];  // in elements; 0 for what all rows share
  DType dtypes[kOperands];                  // kOther where the call has no such tensor

  int64_t rows;
  int64_t hidden;
  int64_t sizes[kMaxRowDims];

  float eps;
  float inv_hidden;     // 1 / hidden
  float weight_offset;  // 1 with gemma; otherwise -0, because adding +0 would turn a weight of -0 into +0
  // See Options; 32 bits, so that AMD's scalar loads can read them. `sigmoid` comes first: then one of these loads
  // brings it with the three numbers above, which is all that a gated kernel needs of them.
  int32_t sigmoid, round_each_step, norm_before_gate;

  // Of an operator that quantises.
  int32_t round_first, scale_ue8m0;  // see Options
  int64_t scale_group;               // elements that share a scale; 0 if the scale is given
  int64_t scale_groups;              // of a row
  int64_t scale_stride;              // from a group's scale to the next group's
  DType scale_dtype;                 // see Options
  QuantizedFormat format;
};

}  // namespace gemma_norm
