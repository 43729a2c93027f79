// The collapsed form of a call: its rows, and what kernels read of its options.
#include <algorithm>
#include <utility>

#include "checker.h"

namespace gemma_norm {
namespace {

// The leading dimensions (where rows are heads, those of the tokens), collapsed: those of x's smallest strides come
// first, and a dimension is merged with the one before it if in every tensor one stride leads through both. If each row
// consists of several groups of `hidden` elements, the groups are the first dimension. No other is merged with it,
// since the weight has a stride along the groups and along no other dimension.
struct Dimensions {
  int count = 0;
  int64_t sizes[kMaxDims + 1], strides[kOperands][kMaxDims + 1];

  Dimensions(const Call& call, int64_t hidden) {
    const Tensor& x = *call.tensors[kX];
    const int heads = call.op->has_heads() ? 1 : 0, leading_dims = x.dims - 1 - heads;
    Operand with_rows[kOperands];
    const int64_t* leading_strides[kOperands];  // of the dimensions that are x's leading ones
    int operands = 0;
    for (const OperandRule& rule : *call.op) {
      const Tensor* const t = call.tensors[rule.operand];
      if (!rule.moves() || !t) continue;
      with_rows[operands++] = rule.operand;
      const bool has_axes = rule.extent == Extent::kPositions;  // before the dimensions of the tokens
      leading_strides[rule.operand] = t->strides + (has_axes ? t->dims - leading_dims : 0);
    }
    if (const int64_t groups = x.sizes[x.dims - 1] / hidden; groups > 1) {
      sizes[count] = groups;
      for (auto& s : strides) s[count] = 0;
      for (int i = 0; i < operands; ++i) strides[with_rows[i]][count] = hidden;
      if (call.op->quantizes() && is_packed(call.options.dtype)) strides[kOut][count] = hidden / 2;
      if (const Tensor* const scales = call.tensors[kScaleOut])
        strides[kScaleOut][count] = hidden / call.options.scale_group_size * scales->strides[scales->dims - 1] /
                                    (call.options.scale_dtype == DType::kInt32 ? 4 : 1);
      strides[kWeight][count++] = hidden;
    }
    const int groups = count;
    int order[kMaxDims];
    const int leading = by_stride(x, leading_dims, order);
    for (int i = 0; i < leading; ++i) {
      const int d = order[i];
      bool joins = count > groups;
      for (int k = 0; joins && k < operands; ++k) {
        const Operand o = with_rows[k];
        joins = leading_strides[o][d] == strides[o][count - 1] * sizes[count - 1];
      }
      if (joins) {
        sizes[count - 1] *= x.sizes[d];
        continue;
      }
      sizes[count] = x.sizes[d];
      for (auto& s : strides) s[count] = 0;
      for (int k = 0; k < operands; ++k) strides[with_rows[k]][count] = leading_strides[with_rows[k]][d];
      ++count;
    }
    // Each slice is a launch of its own, so the dimensions with the most rows stay in the kernel. The groups stay
    // first.
    for (int at = groups; count > kMaxRowDims && at < kMaxRowDims; ++at) {
      int largest = at;
      for (int d = at + 1; d < count; ++d)
        if (sizes[d] > sizes[largest]) largest = d;
      std::swap(sizes[at], sizes[largest]);
      for (auto& s : strides) std::swap(s[at], s[largest]);
    }
    if (count == 0) {  // one row
      sizes[0] = 1;
      for (auto& s : strides) s[0] = 0;
      count = 1;
    }
  }

 private:
  // Writes the leading dimensions of size > 1 into `order`, x's smallest stride first, and returns how many there are.
  // Rows are independent, so any order is right. This one puts dimensions that are neighbours in memory next to each
  // other, so they are merged also in a transposed tensor, such as [batch, heads, tokens, size] stored tokens first.
  static int by_stride(const Tensor& x, int leading_dims, int (&order)[kMaxDims]) {
    int count = 0;
    for (int d = leading_dims - 1; d >= 0; --d) {
      if (x.sizes[d] == 1) continue;
      int at = count++;
      for (; at > 0 && x.strides[order[at - 1]] > x.strides[d]; --at) order[at] = order[at - 1];
      order[at] = d;
    }
    return count;
  }
};

// Moves the pointers of all operands by `steps` times the stride that stride_of(operand) gives.
template <class StrideOf>
void move(RowParams* p, int64_t steps, const StrideOf& stride_of) {
  for (int o = 0; o < kOperands; ++o)
    if (p->data[o]) p->data[o] = static_cast<char*>(p->data[o]) + steps * stride_of(o) * size_of(p->dtypes[o]);
}

}  // namespace

void collapse(const Call& call, RowParams* params, RowSlices* slices) {
  RowParams& p = *params;
  p = {};
  for (int o = 0; o < kOperands; ++o) {
    p.data[o] = call.tensors[o] ? call.tensors[o]->data : nullptr;
    p.dtypes[o] = call.tensors[o] ? call.tensors[o]->dtype : DType::kOther;
  }
  const Tensor& x = *call.tensors[kX];
  const Options& options = call.options;
  p.hidden = options.group_size != kWholeRow ? options.group_size : x.sizes[x.dims - 1];
  p.eps = static_cast<float>(options.eps);
  p.inv_hidden = 1.0f / static_cast<float>(p.hidden);
  p.weight_offset = options.gemma ? 1.0f : -0.0f;
  // In float32 the option changes nothing: the arithmetic rounds each step to float32 anyway.
  p.round_each_step = options.round_each_step && x.dtype != DType::kFloat32;
  p.sigmoid = options.sigmoid;
  p.norm_before_gate = options.norm_before_gate;
  if (call.op->quantizes()) {
    // Without a weight, y is s * rstd, which kernels round only once they store y.
    const bool rounds_norm = options.round_each_step && !call.tensors[kWeight];
    p.round_first = (options.round_first || rounds_norm) && x.dtype != DType::kFloat32;
    p.scale_ue8m0 =
        options.scale_ue8m0 || options.scale_dtype == DType::kFloat8E8M0FNU || options.scale_dtype == DType::kInt32;
    p.scale_dtype = options.scale_dtype;
    p.format = format_of(options.dtype);
    if (const Tensor* const scales = call.tensors[kScaleOut]) {
      const int64_t size = options.scale_group_size, hidden = x.sizes[x.dims - 1];
      p.scale_group = size < hidden ? size : hidden;
      p.scale_groups = p.hidden / p.scale_group;
      p.scale_stride = scales->strides[scales->dims - 1];
    }
  }

  const Dimensions dims(call, p.hidden);
  const int row_dims = dims.count < kMaxRowDims ? dims.count : kMaxRowDims;
  for (int64_t& size : p.sizes) size = 1;
  p.rows = 1;
  for (int d = 0; d < row_dims; ++d) {
    p.rows *= p.sizes[kMaxRowDims - 1 - d] = dims.sizes[d];
    for (int o = 0; o < kOperands; ++o) p.strides[o][kMaxRowDims - 1 - d] = dims.strides[o][d];
  }
  slices->count = p.rows == 0 ? 0 : 1;
  slices->dims = dims.count - row_dims;
  for (int d = 0; d < slices->dims; ++d) {
    slices->count *= slices->sizes[d] = dims.sizes[row_dims + d];
    for (int o = 0; o < kOperands; ++o) slices->strides[o][d] = dims.strides[o][row_dims + d];
  }
}

RowParams select_slice(const RowParams& params, const RowSlices& slices, int64_t index) {
  RowParams p = params;
  for (int d = 0; d < slices.dims; ++d) {
    move(&p, index % slices.sizes[d], [&](int o) { return slices.strides[o][d]; });
    index /= slices.sizes[d];
  }
  return p;
}

RowParams select_rows(const RowParams& params, int64_t outer, int64_t inner, const int64_t (&most)[kMaxRowDims]) {
  RowParams p = params;
  const int64_t first[kMaxRowDims] = {outer, inner};
  p.rows = 1;
  for (int d = 0; d < kMaxRowDims; ++d) {
    p.rows *= p.sizes[d] = std::min(p.sizes[d] - first[d], most[d]);
    move(&p, first[d], [&](int o) { return p.strides[o][d]; });
  }
  return p;
}

}  // namespace gemma_norm
