#include "check.h"

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>

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

bool Checker::check_rows_of_heads(const OperandRule& rule, const Tensor& t) {
  if (t.dims < 2)
    return invalid("%s must have at least two dimensions, heads and their elements, got shape %s", name_of(rule),
                   ShapeText(t).text);
  if (t.dims > kMaxDims)
    return invalid("%s must have at most %d dimensions, got %d", name_of(rule), kMaxDims, static_cast<int>(t.dims));
  if (t.sizes[t.dims - 1] < 1 || t.sizes[t.dims - 1] > kMaxHeadDim)
    return invalid("%s must have a last dimension of 1 to %d, got shape %s", name_of(rule),
                   static_cast<int>(kMaxHeadDim), ShapeText(t).text);
  return has_head(rule, t);
}

bool Checker::has_head(const OperandRule& rule, const Tensor& t) {
  return t.sizes[leading()] >= 1 ||
         invalid("%s must have at least one head, got shape %s", name_of(rule), ShapeText(t).text);
}

bool Checker::check_heads(const OperandRule& rule, const Tensor& t) {
  bool same = t.dims == x().dims;
  for (int d = 0; same && d < t.dims; ++d) same = d == leading() || t.sizes[d] == x().sizes[d];
  if (!same)
    return invalid("%s must have %s's shape %s, but for the number of heads, got %s", name_of(rule), name_of(kX),
                   ShapeText(x()).text, ShapeText(t).text);
  return has_head(rule, t);
}

bool Checker::check_shape_of_angles(const OperandRule& rule, const Tensor& t) {
  bool same = t.dims == leading() + 1;
  for (int d = 0; same && d < leading(); ++d) same = t.sizes[d] == x().sizes[d];
  if (!same) {
    Tensor tokens = x();
    tokens.dims = leading();
    const ShapeText text(tokens);
    const int length = static_cast<int>(std::strlen(text.text)) - 1;  // without the bracket
    return invalid("%s must have shape %.*s%srotary], got %s", name_of(rule), length, text.text, leading() ? ", " : "",
                   ShapeText(t).text);
  }
  const Tensor* const cos = call_.tensors[kCos];
  return !cos || t.sizes[leading()] == cos->sizes[cos->dims - 1] ||
         invalid("%s must have cos's shape %s, got %s", name_of(rule), ShapeText(*cos).text, ShapeText(t).text);
}

bool Checker::check_table(const OperandRule& rule, const Tensor& t) {
  if (t.dims != 2) return invalid("%s must have shape [positions, rotary], got %s", name_of(rule), ShapeText(t).text);
  return t.sizes[0] >= 1 || invalid("%s must have at least one row, got shape %s", name_of(rule), ShapeText(t).text);
}

bool Checker::check_rotary(const OperandRule& rule, const Tensor& t) {
  const int64_t rotary = t.sizes[t.dims - 1];
  return (rotary % 2 == 0 && rotary >= 2 && rotary <= hidden()) ||
         invalid("%s must have a last dimension that is even and from 2 to %s's %lld, got shape %s", name_of(rule),
                 name_of(kX), static_cast<long long>(hidden()), ShapeText(t).text);
}

bool Checker::check_shape_of_positions(const OperandRule& rule, const Tensor& t) {
  int64_t sizes[kMaxDims + 1];
  const int axes = call_.options.mrope_section.count ? 1 : 0;
  if (axes) sizes[0] = Sections::kAxes;
  for (int d = 0; d < leading(); ++d) sizes[axes + d] = x().sizes[d];
  const Tensor want{nullptr, sizes, nullptr, axes + leading(), t.dtype, ""};
  bool same = t.dims == want.dims;
  for (int d = 0; same && d < t.dims; ++d) same = t.sizes[d] == sizes[d];
  return same || invalid("%s must have shape %s, got %s", name_of(rule), ShapeText(want).text, ShapeText(t).text);
}

// Of an operator with a rotation: which tensors it has, and its options.
bool Checker::check_angles() {
  const Options& options = call_.options;
  const auto given = [&](Operand operand) { return call_.tensors[operand] != nullptr; };
  if (given(kWeight) != given(kKeyWeight))
    return invalid("q_weight and k_weight must both be given or both be None, got one of them");
  const bool has_angles = given(kCos) && given(kSin) && !given(kCosSinCache) && !given(kPositions);
  const bool has_cache = !given(kCos) && !given(kSin) && given(kCosSinCache) && given(kPositions);
  if (!has_angles && !has_cache) {
    std::string names;
    for (const Operand o : {kCos, kSin, kCosSinCache, kPositions})
      if (given(o)) names += (names.empty() ? "" : " and ") + std::string(name_of(o));
    return invalid("either cos and sin or cos_sin_cache and positions must be given, got %s",
                   names.empty() ? "none" : names.c_str());
  }
  if (options.round_each_step && !options.round_rotation)
    return invalid("round_rotation must be True with round_each_step=True, got False");
  const Sections& sections = options.mrope_section;
  if (!sections.count)
    return !options.mrope_interleaved || invalid("mrope_interleaved must be False without mrope_section, got True");
  const int64_t* const sizes = sections.sizes;
  std::string text = "[";
  for (int i = 0; i < sections.count && i < Sections::kAxes; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  text += sections.count > Sections::kAxes ? ", ...]" : "]";
  if (!has_cache) return invalid("mrope_section must be None without positions, got %s", text.c_str());
  const int64_t pairs = call_.tensors[kCosSinCache]->sizes[1] / 2;
  const bool fits = sections.count == Sections::kAxes && sizes[0] >= 0 && sizes[1] >= 0 && sizes[2] >= 0 &&
                    sizes[0] <= pairs && sizes[1] <= pairs && sizes[2] <= pairs &&
                    sizes[0] + sizes[1] + sizes[2] == pairs;
  return fits || invalid(
                     "mrope_section must be three sizes that add up to half of cos_sin_cache's last dimension, "
                     "%lld, got %s",
                     static_cast<long long>(pairs), text.c_str());
}

bool Checker::check_hidden(const OperandRule& rule, const Tensor& t) {
  return (t.dims == 1 && t.sizes[0] == hidden()) || invalid("%s must have shape [%lld], got %s", name_of(rule),
                                                            static_cast<long long>(hidden()), ShapeText(t).text);
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

// Whether every position is a row of the cache.
bool check_positions(const Call& call, Message* message) {
  const Tensor* const positions = call.tensors[kPositions];
  if (!positions) return true;
  const int64_t rows = call.tensors[kCosSinCache]->sizes[0];
  const Tensor& t = *positions;
  int64_t at[kMaxDims + 1] = {}, offset = 0;
  for (int d = 0; d >= 0;) {
    const int64_t position = t.dtype == DType::kInt32 ? static_cast<const int32_t*>(t.data)[offset]
                                                      : static_cast<const int64_t*>(t.data)[offset];
    if (position < 0 || position >= rows) {
      std::snprintf(message->text, sizeof message->text,
                    "%s: positions must be at least 0 and less than cos_sin_cache's %lld rows, got %lld", call.op->name,
                    static_cast<long long>(rows), static_cast<long long>(position));
      return false;
    }
    for (d = t.dims - 1; d >= 0; --d) {
      offset += t.strides[d];
      if (++at[d] < t.sizes[d]) break;
      offset -= t.sizes[d] * t.strides[d];
      at[d] = 0;
    }
  }
  return true;
}

}  // namespace

Status check(const Call& call, RowParams* params, RowSlices* slices, Message* message, bool readable) {
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
  if (call.op->quantizes()) {
    p.round_first = options.round_first && x.dtype != DType::kFloat32;
    p.scale_ue8m0 =
        options.scale_ue8m0 || options.scale_dtype == DType::kFloat8E8M0FNU || options.scale_dtype == DType::kInt32;
    p.scale_dtype = options.scale_dtype;
    p.format = format_of(options.dtype);
    if (const Tensor* const scales = call.tensors[kScaleOut]) {
      const int64_t size = options.scale_group_size, hidden = x.sizes[x.dims - 1];
      p.scale_group = size < hidden ? size : hidden;
      p.scale_stride = scales->strides[scales->dims - 1];
    }
  }

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
  if (readable && slices->count && !check_positions(call, message)) return Status::kInvalidArgument;
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
