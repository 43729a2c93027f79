// What a kernel is told: the checked, collapsed form of NormArgs (made by check.cpp), the same for every device.
#pragma once

#include <cstdint>

#include "../gemma_norm.h"

namespace gemma_norm {

constexpr int kMaxRowDims = 2;

// The leading dimensions, collapsed together for all tensors of the call: row r has the coordinates of r in `sizes`, the last
// of them fastest. One dimension is the common case (every tensor's rows lie at one stride), two are the heads of a q or k that
// is a slice of a fused buffer; what has more is launched in slices (check.h), as a kernel's time goes into finding rows too.
struct RowParams {
  const void* x;                       // [rows, hidden], as are residual, post, out and residual_out
  const void* residual;                // null: no addition
  const void* post_residual_addition;  // null: not added
  const void* weight;                  // [hidden]
  void* out;
  void* residual_out;  // null exactly when residual is

  int64_t first_row;  // of this launch: a grid that would be too large is cut
  int64_t rows;
  int64_t hidden;
  int32_t row_dims;  // 1 .. kMaxRowDims
  int64_t sizes[kMaxRowDims];
  int64_t x_strides[kMaxRowDims];  // in elements
  int64_t residual_strides[kMaxRowDims];
  int64_t post_strides[kMaxRowDims];
  int64_t out_strides[kMaxRowDims];
  int64_t residual_out_strides[kMaxRowDims];

  float eps;
  float inv_hidden;     // 1 / hidden
  float weight_offset;  // 1 for gemma; else -0, the one value that leaves every weight's bits as they are

  DType dtype;         // of x, residual, post_residual_addition, out and residual_out
  DType weight_dtype;  // dtype or kFloat32
};

}  // namespace gemma_norm
