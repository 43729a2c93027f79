#include "check.h"

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <utility>

#include "overlap.h"

namespace gemma_norm {
namespace {

// Each check returns true if the call passes it. Otherwise it writes the message and returns false.
class Checker {
 public:
  Checker(const Call& call, Message* message) : call_(call), message_(message) {}

  bool passes() {
    for (const OperandRule& rule : *call_.op) {
      const Tensor* const t = call_.tensors[rule.operand];
      if (!t && !rule.optional) return invalid("%s is needed, got none", kOperandNames[rule.operand]);
      if (t && !check_operand(rule, *t)) return false;
    }
    return check_no_others() && check_options() && (empty() || check_memory());
  }

 private:
  bool invalid(const char* format, ...) {
    const int n = std::snprintf(message_->text, sizeof message_->text, "%s: ", call_.op->name);
    va_list list;
    va_start(list, format);
    std::vsnprintf(message_->text + n, sizeof message_->text - n, format, list);
    va_end(list);
    return false;
  }

  struct ShapeText {
    char text[256];
    explicit ShapeText(const Tensor& t) {
      int n = std::snprintf(text, sizeof text, "[");
      for (int d = 0; d < t.dims && n < static_cast<int>(sizeof text) - 32; ++d)
        n += std::snprintf(text + n, sizeof text - n, "%s%lld", d ? ", " : "", static_cast<long long>(t.sizes[d]));
      std::snprintf(text + n, sizeof text - n, "]");
    }
  };

  const Tensor& x() const { return *call_.tensors[kX]; }
  int64_t hidden() const { return x().sizes[x().dims - 1]; }
  bool empty() const {
    for (int d = 0; d < x().dims; ++d)
      if (x().sizes[d] == 0) return true;
    return false;
  }

  bool check_operand(const OperandRule& rule, const Tensor& t) {
    switch (rule.extent) {
      case Extent::kRows: return check_dtype(rule, t) && check_rows(rule, t) && check_last_dimension(rule, t);
      case Extent::kLikeX: return check_dtype(rule, t) && check_shape_of_x(rule, t) && check_last_dimension(rule, t);
      case Extent::kHidden: return check_hidden(rule, t) && check_dtype(rule, t) && check_contiguous(rule, t);
    }
    return false;
  }

  bool check_dtype(const OperandRule& rule, const Tensor& t) {
    switch (rule.dtypes) {
      case DTypes::kFloat:
        return t.dtype != DType::kOther ||
               invalid("%s must have dtype float32, float16 or bfloat16, got %s", name_of(rule), t.dtype_name);
      case DTypes::kLikeX:
        return t.dtype == x().dtype ||
               invalid("%s must have x's dtype %s, got %s", name_of(rule), x().dtype_name, t.dtype_name);
      case DTypes::kXOrFloat32:
        return t.dtype == x().dtype || t.dtype == DType::kFloat32 ||
               invalid("%s must have dtype %s%s, got %s", name_of(rule), x().dtype_name,
                       x().dtype == DType::kFloat32 ? "" : " (x's) or float32", t.dtype_name);
      case DTypes::kWeight: {
        const DTypes dtypes = x().dtype == DType::kFloat32 ? DTypes::kFloat : DTypes::kXOrFloat32;
        return check_dtype({rule.operand, rule.extent, dtypes}, t);
      }
      case DTypes::kXOrNarrower: {
        const DTypes dtypes = x().dtype == DType::kFloat32 ? DTypes::kFloat : DTypes::kLikeX;
        return check_dtype({rule.operand, rule.extent, dtypes}, t);
      }
      case DTypes::kLikeWeight: {
        const Tensor& weight = *call_.tensors[kWeight];
        return t.dtype == weight.dtype ||
               invalid("%s must have weight's dtype %s, got %s", name_of(rule), weight.dtype_name, t.dtype_name);
      }
      case DTypes::kLikeResidual: {
        const Tensor& residual = *call_.tensors[kResidual];
        return t.dtype == residual.dtype ||
               invalid("%s must have residual's dtype %s, got %s", name_of(rule), residual.dtype_name, t.dtype_name);
      }
    }
    return false;
  }

  bool check_rows(const OperandRule& rule, const Tensor& t) {
    if (t.dims < 1) return invalid("%s must have at least one dimension, got shape []", name_of(rule));
    if (t.dims > kMaxDims)
      return invalid("%s must have at most %d dimensions, got %d", name_of(rule), kMaxDims, static_cast<int>(t.dims));
    return t.sizes[t.dims - 1] >= 1 ||
           invalid("%s must have a last dimension of at least 1, got shape %s", name_of(rule), ShapeText(t).text);
  }

  bool check_shape_of_x(const OperandRule& rule, const Tensor& t) {
    bool same = t.dims == x().dims;
    for (int d = 0; same && d < t.dims; ++d) same = t.sizes[d] == x().sizes[d];
    return same || invalid("%s must have x's shape %s, got %s", name_of(rule), ShapeText(x()).text, ShapeText(t).text);
  }

  bool check_hidden(const OperandRule& rule, const Tensor& t) {
    return (t.dims == 1 && t.sizes[0] == hidden()) || invalid("%s must have shape [%lld], got %s", name_of(rule),
                                                              static_cast<long long>(hidden()), ShapeText(t).text);
  }

  bool check_last_dimension(const OperandRule& rule, const Tensor& t) {
    return is_contiguous(t) || invalid("%s must have a contiguous last dimension (stride 1), got stride %lld",
                                       name_of(rule), static_cast<long long>(t.strides[t.dims - 1]));
  }

  bool check_contiguous(const OperandRule& rule, const Tensor& t) {
    return is_contiguous(t) || invalid("%s must be contiguous (stride 1), got stride %lld", name_of(rule),
                                       static_cast<long long>(t.strides[0]));
  }

  static bool is_contiguous(const Tensor& t) { return t.strides[t.dims - 1] == 1 || t.sizes[t.dims - 1] == 1; }

  bool check_no_others() {
    for (int o = 0; o < kOperands; ++o)
      if (call_.tensors[o] && !call_.op->has(static_cast<Operand>(o)))
        return invalid("there is no operand %s, got a tensor", kOperandNames[o]);
    return true;
  }

  bool check_options() {
    const Options& options = call_.options;
    const Tensor* const weight = call_.tensors[kWeight];
    if (!std::isfinite(static_cast<float>(options.eps)) || options.eps < 0)
      return invalid("eps must be finite in float32 and at least 0, got %g", options.eps);
    if (options.gemma && !weight) return invalid("gemma must be False without a weight, got True");
    if (options.round_each_step && options.gemma)
      return invalid("round_each_step must be False with gemma=True, got True");
    if (options.round_each_step && weight && weight->dtype != x().dtype)
      return invalid("weight must have x's dtype %s with round_each_step=True, got %s", x().dtype_name,
                     weight->dtype_name);
    return options.group_size == kWholeRow || (options.group_size > 0 && hidden() % options.group_size == 0) ||
           invalid("group_size must divide x's last dimension %lld, got %lld", static_cast<long long>(hidden()),
                   static_cast<long long>(options.group_size));
  }

  // A write must not change an element that another thread still has to read. The thread that writes an element of a
  // row has read the same element of every input row before, so an output may be exactly such an input; otherwise they
  // must not overlap. The weight is read for all rows, so no output may overlap it.
  bool check_memory() {
    const OpInfo& op = *call_.op;
    for (const OperandRule& a : op)
      for (const OperandRule* b = &a + 1; b < op.end(); ++b)
        if (a.written() && b->written() && overlap(tensor(a), tensor(*b)))
          return invalid("%s must not overlap %s, which is also written, got overlapping memory", name_of(*b),
                         name_of(a));
    for (const OperandRule& out : op) {
      if (!out.written()) continue;
      if (overlaps_itself(tensor(out)))
        return invalid("%s is written and must not overlap itself, got a tensor with shared elements", name_of(out));
      for (int rows = 0; rows < 2; ++rows)
        for (const OperandRule& in : op)
          if (!in.written() && in.has_rows() == (rows == 1) && call_.tensors[in.operand] && !check_apart(out, in))
            return false;
    }
    return true;
  }

  bool check_apart(const OperandRule& out, const OperandRule& in) {
    const char* const other = kOperandNames[in.operand];
    if ((in.has_rows() && same_memory(tensor(out), tensor(in))) || !overlap(tensor(out), tensor(in))) return true;
    if (in.has_rows())
      return invalid("%s must be %s's memory exactly or not overlap it, got a partial overlap", name_of(out), other);
    return invalid("%s is written and must not overlap %s, got overlapping memory", name_of(out), other);
  }

  const Tensor& tensor(const OperandRule& rule) const { return *call_.tensors[rule.operand]; }

  const char* name_of(const OperandRule& rule) const {
    const Tensor* const place = rule.in_place_of == kNoOperand ? nullptr : call_.tensors[rule.in_place_of];
    return kOperandNames[place && same_memory(tensor(rule), *place) ? rule.in_place_of : rule.operand];
  }

  const Call& call_;
  Message* message_;
};

// The leading dimensions, collapsed: those of x's smallest strides come first, and a dimension is merged with the one
// before it if in every tensor one stride leads through both. If each row consists of several groups of `hidden`
// elements, the groups are the first dimension. No other is merged with it, since the weight has a stride along the
// groups and along no other dimension.
struct Dimensions {
  int count = 0;
  int64_t sizes[kMaxDims + 1], strides[kOperands][kMaxDims + 1];

  Dimensions(const Call& call, int64_t hidden) {
    Operand with_rows[kOperands];
    int operands = 0;
    for (const OperandRule& rule : *call.op)
      if (rule.has_rows() && call.tensors[rule.operand]) with_rows[operands++] = rule.operand;
    const Tensor& x = *call.tensors[kX];
    if (const int64_t groups = x.sizes[x.dims - 1] / hidden; groups > 1) {
      sizes[count] = groups;
      for (auto& s : strides) s[count] = 0;
      for (int i = 0; i < operands; ++i) strides[with_rows[i]][count] = hidden;
      strides[kWeight][count++] = hidden;
    }
    const int groups = count;
    int order[kMaxDims];
    const int leading = by_stride(x, order);
    for (int i = 0; i < leading; ++i) {
      const int d = order[i];
      bool joins = count > groups;
      for (int k = 0; joins && k < operands; ++k) {
        const Operand o = with_rows[k];
        joins = call.tensors[o]->strides[d] == strides[o][count - 1] * sizes[count - 1];
      }
      if (joins) {
        sizes[count - 1] *= x.sizes[d];
        continue;
      }
      sizes[count] = x.sizes[d];
      for (auto& s : strides) s[count] = 0;
      for (int k = 0; k < operands; ++k) strides[with_rows[k]][count] = call.tensors[with_rows[k]]->strides[d];
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
  static int by_stride(const Tensor& x, int (&order)[kMaxDims]) {
    int count = 0;
    for (int d = x.dims - 2; d >= 0; --d) {
      if (x.sizes[d] == 1) continue;
      int at = count++;
      for (; at > 0 && x.strides[order[at - 1]] > x.strides[d]; --at) order[at] = order[at - 1];
      order[at] = d;
    }
    return count;
  }
};

}  // namespace

Status check(const Call& call, RowParams* params, RowSlices* slices, Message* message) {
  if (!Checker(call, message).passes()) return Status::kInvalidArgument;

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

  const Dimensions dims(call, p.hidden);
  p.row_dims = dims.count < kMaxRowDims ? dims.count : kMaxRowDims;
  p.rows = 1;
  for (int d = 0; d < p.row_dims; ++d) {
    p.rows *= p.sizes[p.row_dims - 1 - d] = dims.sizes[d];
    for (int o = 0; o < kOperands; ++o) p.strides[o][p.row_dims - 1 - d] = dims.strides[o][d];
  }
  slices->count = p.rows == 0 ? 0 : 1;
  slices->dims = dims.count - p.row_dims;
  for (int d = 0; d < slices->dims; ++d) {
    slices->count *= slices->sizes[d] = dims.sizes[p.row_dims + d];
    for (int o = 0; o < kOperands; ++o) slices->strides[o][d] = dims.strides[o][p.row_dims + d];
  }
  if (call.before_write) call.before_write(call.context);
  return Status::kOk;
}

RowParams select_slice(const RowParams& params, const RowSlices& slices, int64_t index) {
  RowParams p = params;
  for (int d = 0; d < slices.dims; ++d) {
    for (int o = 0; o < kOperands; ++o)
      if (p.data[o])
        p.data[o] =
            static_cast<char*>(p.data[o]) + index % slices.sizes[d] * slices.strides[o][d] * size_of(p.dtypes[o]);
    index /= slices.sizes[d];
  }
  return p;
}

}  // namespace gemma_norm
