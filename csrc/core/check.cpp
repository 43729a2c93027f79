#include "check.h"

#include <cmath>
#include <cstdarg>
#include <cstdio>

#include "checker.h"

namespace gemma_norm {

bool Checker::passes() {
  for (const OperandRule& rule : *call_.op) {
    const Tensor* const t = call_.tensors[rule.operand];
    if (!t && !rule.optional) return invalid("%s is needed, got none", rule.name_of());
    if (rule.optional && rule.in_place_of != kNoOperand && !t != !call_.tensors[rule.in_place_of])
      return invalid("%s and %s must both be given or both be left out, got one of them",
                     call_.op->name_of(rule.in_place_of), rule.name_of());
    if (t && !check_operand(rule, *t)) return false;
  }
  return check_no_others() && check_options() && (!call_.op->has(kPositions) || check_angles()) &&
         (empty() || check_memory());
}

bool Checker::invalid(const char* format, ...) {
  const int n = std::snprintf(message_->text, sizeof message_->text, "%s: ", call_.op->name);
  va_list list;
  va_start(list, format);
  std::vsnprintf(message_->text + n, sizeof message_->text - n, format, list);
  va_end(list);
  return false;
}

bool Checker::check_operand(const OperandRule& rule, const Tensor& t) {
  switch (rule.extent) {
    case Extent::kRows: return check_dtype(rule, t) && check_rows(rule, t) && check_last_dimension(rule, t);
    case Extent::kLikeX: return check_dtype(rule, t) && check_shape_of_x(rule, t) && check_last_dimension(rule, t);
    case Extent::kHidden: return check_hidden(rule, t) && check_dtype(rule, t) && check_contiguous(rule, t);
    case Extent::kRowsOfHeads:
      return check_dtype(rule, t) && check_rows_of_heads(rule, t) && check_last_dimension(rule, t);
    case Extent::kHeads: return check_dtype(rule, t) && check_heads(rule, t) && check_last_dimension(rule, t);
    case Extent::kAngles:
      return check_dtype(rule, t) && check_shape_of_angles(rule, t) && check_rotary(rule, t) &&
             check_last_dimension(rule, t);
    case Extent::kTable:
      return check_dtype(rule, t) && check_table(rule, t) && check_rotary(rule, t) && check_last_dimension(rule, t);
    case Extent::kPositions:
      return check_dtype(rule, t) && check_shape_of_positions(rule, t) &&
             (t.dims == 0 || check_last_dimension(rule, t));
    case Extent::kOne: return check_dtype(rule, t) && check_one(rule, t);
    case Extent::kScales: return check_dtype(rule, t) && check_scales(rule, t);
    case Extent::kCodes: return check_dtype(rule, t) && check_codes(rule, t) && check_last_dimension(rule, t);
  }
  return false;
}

bool Checker::check_dtype(const OperandRule& rule, const Tensor& t) {
  switch (rule.dtypes) {
    case DTypes::kFloat:
      return is_float(t.dtype) ||
             invalid("%s must have dtype float32, float16 or bfloat16, got %s", name_of(rule), t.dtype_name);
    case DTypes::kLikeX:
      return t.dtype == x().dtype ||
             invalid("%s must have %s's dtype %s, got %s", name_of(rule), name_of(kX), x().dtype_name, t.dtype_name);
    case DTypes::kXOrFloat32:
      return t.dtype == x().dtype || t.dtype == DType::kFloat32 ||
             (x().dtype == DType::kFloat32 ? invalid("%s must have dtype float32, got %s", name_of(rule), t.dtype_name)
                                           : invalid("%s must have dtype %s (%s's) or float32, got %s", name_of(rule),
                                                     x().dtype_name, name_of(kX), t.dtype_name));
    case DTypes::kWeight: {
      OperandRule one = rule;  // with its name
      one.dtypes = x().dtype == DType::kFloat32 ? DTypes::kFloat : DTypes::kXOrFloat32;
      return check_dtype(one, t);
    }
    case DTypes::kXOrNarrower: {
      OperandRule one = rule;
      one.dtypes = x().dtype == DType::kFloat32 ? DTypes::kFloat : DTypes::kLikeX;
      return check_dtype(one, t);
    }
    case DTypes::kLikeWeight: return check_dtype_of(rule, t, kWeight);
    case DTypes::kLikeResidual: return check_dtype_of(rule, t, kResidual);
    case DTypes::kLikeCos: return check_dtype_of(rule, t, kCos);
    case DTypes::kInteger:
      return t.dtype == DType::kInt32 || t.dtype == DType::kInt64 ||
             invalid("%s must have dtype int32 or int64, got %s", name_of(rule), t.dtype_name);
    case DTypes::kFloat32:
      return t.dtype == DType::kFloat32 || invalid("%s must have dtype float32, got %s", name_of(rule), t.dtype_name);
    case DTypes::kQuantized:
      return t.dtype == call_.options.dtype || !is_quantized(call_.options.dtype) ||
             invalid("%s must have dtype %s, got %s", name_of(rule), call_.options.dtype_name, t.dtype_name);
    case DTypes::kScales:
      return t.dtype == call_.options.scale_dtype || !is_of_scales(call_.options.scale_dtype) ||
             invalid("%s must have dtype %s, got %s", name_of(rule), call_.options.scale_dtype_name, t.dtype_name);
  }
  return false;
}

// If the other operand is missing, the call is refused for that.
bool Checker::check_dtype_of(const OperandRule& rule, const Tensor& t, Operand operand) {
  const Tensor* const other = call_.tensors[operand];
  return !other || t.dtype == other->dtype ||
         invalid("%s must have %s's dtype %s, got %s", name_of(rule), name_of(operand), other->dtype_name,
                 t.dtype_name);
}

bool Checker::check_rows(const OperandRule& rule, const Tensor& t) {
  if (t.dims < 1) return invalid("%s must have at least one dimension, got shape []", name_of(rule));
  if (t.dims > kMaxDims)
    return invalid("%s must have at most %d dimensions, got %d", name_of(rule), kMaxDims, static_cast<int>(t.dims));
  return t.sizes[t.dims - 1] >= 1 ||
         invalid("%s must have a last dimension of at least 1, got shape %s", name_of(rule), ShapeText(t).text);
}

bool Checker::check_shape_of_x(const OperandRule& rule, const Tensor& t) {
  bool same = t.dims == x().dims;
  for (int d = 0; same && d < t.dims; ++d) same = t.sizes[d] == x().sizes[d];
  return same || invalid("%s must have %s's shape %s, got %s", name_of(rule), name_of(kX), ShapeText(x()).text,
                         ShapeText(t).text);
}

bool Checker::check_hidden(const OperandRule& rule, const Tensor& t) {
  const int64_t size = hidden();
  return check_shape(rule, t, &size, 1);
}

bool Checker::check_shape(const OperandRule& rule, const Tensor& t, const int64_t* sizes, int dims) {
  bool same = t.dims == dims;
  for (int d = 0; same && d < t.dims; ++d) same = t.sizes[d] == sizes[d];
  const Tensor want{nullptr, sizes, nullptr, dims, t.dtype, ""};
  return same || invalid("%s must have shape %s, got %s", name_of(rule), ShapeText(want).text, ShapeText(t).text);
}

bool Checker::check_last_dimension(const OperandRule& rule, const Tensor& t) {
  return is_contiguous(t) || invalid("%s must have a contiguous last dimension (stride 1), got stride %lld",
                                     name_of(rule), static_cast<long long>(t.strides[t.dims - 1]));
}

bool Checker::check_contiguous(const OperandRule& rule, const Tensor& t) {
  return is_contiguous(t) || invalid("%s must be contiguous (stride 1), got stride %lld", name_of(rule),
                                     static_cast<long long>(t.strides[0]));
}

bool Checker::check_no_others() {
  for (int o = 0; o < kOperands; ++o)
    if (call_.tensors[o] && !call_.op->has(static_cast<Operand>(o)))
      return invalid("there is no operand %s, got a tensor", kOperandNames[o]);
  return true;
}

bool Checker::check_options() {
  const Options& options = call_.options;
  const Tensor* const weight = call_.tensors[kWeight];
  if (!std::isfinite(static_cast<float>(options.eps)) || options.eps < 0)
    return invalid("eps must be finite in float32 and at least 0, got %g", options.eps);
  if (options.gemma && !weight) return invalid("gemma must be False without a weight, got True");
  if (options.round_each_step && options.gemma)
    return invalid("round_each_step must be False with gemma=True, got True");
  if (options.round_each_step && weight && weight->dtype != x().dtype)
    return invalid("%s must have %s's dtype %s with round_each_step=True, got %s", name_of(kWeight), name_of(kX),
                   x().dtype_name, weight->dtype_name);
  return check_group("group_size", options.group_size) && (!call_.op->quantizes() || check_quantization());
}

bool Checker::check_group(const char* name, int64_t size) {
  return size == kWholeRow || (size > 0 && hidden() % size == 0) ||
         invalid("%s must divide %s's last dimension %lld, got %lld", name, name_of(kX),
                 static_cast<long long>(hidden()), static_cast<long long>(size));
}

// A write must not change an element that another thread still has to read. The thread that writes an element of a
// row has read the same element of every input row before, so an output may be exactly such an input; otherwise they
// must not overlap. The weight is read for all rows, so no output may overlap it. Neither may one of q's heads be k,
// whose heads are other rows, nor the angles of a token, which are read for all its heads.
bool Checker::check_memory() {
  const OpInfo& op = *call_.op;
  if (const Tensor* const scales = call_.tensors[kScaleOut]) scales_.set(*scales);
  for (const OperandRule& a : op)
    for (const OperandRule* b = &a + 1; b < op.end(); ++b)
      if (writes(a) && writes(*b) && overlap(tensor(a), tensor(*b)))
        return invalid("%s must not overlap %s, which is also written, got overlapping memory", name_of(*b),
                       name_of(a));
  for (const OperandRule& out : op) {
    if (!writes(out)) continue;
    if (overlaps_itself(tensor(out)))
      return invalid("%s is written and must not overlap itself, got a tensor with shared elements", name_of(out));
    for (int rows = 0; rows < 2; ++rows)
      for (const OperandRule& in : op)
        if (!in.written() && same_rows(out, in) == (rows == 1) && call_.tensors[in.operand] && !check_apart(out, in))
          return false;
  }
  return true;
}

bool Checker::check_apart(const OperandRule& out, const OperandRule& in) {
  const char* const other = in.name_of();
  const bool rows = same_rows(out, in);
  if ((rows && same_memory(tensor(out), tensor(in))) || !overlap(tensor(out), one_dimension(tensor(in)))) return true;
  if (rows)
    return invalid("%s must be %s's memory exactly or not overlap it, got a partial overlap", name_of(out), other);
  return invalid("%s is written and must not overlap %s, got overlapping memory", name_of(out), other);
}

// The same elements with at least one dimension.
Tensor Checker::one_dimension(const Tensor& t) {
  static constexpr int64_t kOne = 1;
  return t.dims ? t : Tensor{t.data, &kOne, &kOne, 1, t.dtype, t.dtype_name};
}

const char* Checker::name_of(const OperandRule& rule) const {
  const Tensor* const place = rule.in_place_of == kNoOperand ? nullptr : call_.tensors[rule.in_place_of];
  return place && same_memory(tensor(rule), *place) ? call_.op->name_of(rule.in_place_of) : rule.name_of();
}

Status check(const Call& call, RowParams* params, RowSlices* slices, Message* message, bool readable) {
  Checker checker(call, message);
  if (!checker.passes()) return Status::kInvalidArgument;
  collapse(call, params, slices);
  if (readable && slices->count && !checker.check_position_values()) return Status::kInvalidArgument;
  if (call.before_write) call.before_write(call.context);
  return Status::kOk;
}

}  // namespace gemma_norm
