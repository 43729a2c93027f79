#include "check.h"

#include <cmath>
#include <cstdarg>
#include <cstdio>

#include "overlap.h"

namespace gemma_norm {
namespace {

constexpr int kMaxDims = 64;

// Writes the message; every check ends in `return invalid(...)` or passes.
class Checker {
 public:
  Checker(const NormArgs& args, Message* message) : args_(args), message_(message) {}

  Status run() {
    const bool in_place = same_memory(args_.out, args_.x);
    const char* out = in_place ? "x" : "out";
    if (!check_x() || !check_weight() || !check_like_x("out", args_.out) || !check_eps()) return Status::kInvalidArgument;
    if (!args_.residual) {
      if (args_.residual_out) return (invalid("residual_out needs residual, got none"), Status::kInvalidArgument);
      if (args_.post_residual_addition)
        return (invalid("post_residual_addition needs residual, got none"), Status::kInvalidArgument);
      return check_output(out, args_.out) ? Status::kOk : Status::kInvalidArgument;
    }
    if (!args_.residual_out) return (invalid("residual_out is needed with residual, got none"), Status::kInvalidArgument);
    const char* sum = same_memory(*args_.residual_out, *args_.residual) ? "residual" : "residual_out";
    if (!check_like_x("residual", *args_.residual) || !check_like_x(sum, *args_.residual_out)) return Status::kInvalidArgument;
    if (args_.post_residual_addition && !check_like_x("post_residual_addition", *args_.post_residual_addition))
      return Status::kInvalidArgument;
    if (!empty() && overlap(args_.out, *args_.residual_out))
      return (invalid("%s must not overlap %s, which is also written, got overlapping memory", sum, out), Status::kInvalidArgument);
    return check_output(out, args_.out) && check_output(sum, *args_.residual_out) ? Status::kOk : Status::kInvalidArgument;
  }

 private:
  bool invalid(const char* format, ...) {
    int n = std::snprintf(message_->text, sizeof message_->text, "%s: ", args_.op);
    va_list list;
    va_start(list, format);
    std::vsnprintf(message_->text + n, sizeof message_->text - n, format, list);
    va_end(list);
    return false;
  }

  struct Shape {
    char text[256];
    explicit Shape(const Tensor& t) {
      int n = std::snprintf(text, sizeof text, "[");
      for (int d = 0; d < t.dims && n < static_cast<int>(sizeof text) - 32; ++d)
        n += std::snprintf(text + n, sizeof text - n, "%s%lld", d ? ", " : "", static_cast<long long>(t.sizes[d]));
      std::snprintf(text + n, sizeof text - n, "]");
    }
  };

  bool empty() const {
    for (int d = 0; d < args_.x.dims; ++d)
      if (args_.x.sizes[d] == 0) return true;
    return false;
  }

  bool check_last_dimension(const char* name, const Tensor& t) {
    const int64_t stride = t.strides[t.dims - 1];
    if (stride == 1 || t.sizes[t.dims - 1] == 1) return true;
    return invalid("%s must have a contiguous last dimension (stride 1), got stride %lld", name, static_cast<long long>(stride));
  }

  bool check_x() {
    const Tensor& x = args_.x;
    if (x.dtype == DType::kOther) return invalid("x must have dtype float32, float16 or bfloat16, got %s", x.dtype_name);
    if (x.dims < 1) return invalid("x must have at least one dimension, got shape []");
    if (x.dims > kMaxDims) return invalid("x must have at most %d dimensions, got %d", kMaxDims, static_cast<int>(x.dims));
    if (x.sizes[x.dims - 1] < 1) return invalid("x must have a last dimension of at least 1, got shape %s", Shape(x).text);
    return check_last_dimension("x", x);
  }

  bool check_weight() {
    const Tensor &x = args_.x, &weight = args_.weight;
    const long long hidden = x.sizes[x.dims - 1];
    if (weight.dims != 1 || weight.sizes[0] != hidden)
      return invalid("weight must have shape [%lld], got %s", hidden, Shape(weight).text);
    if (weight.dtype != x.dtype && weight.dtype != DType::kFloat32)
      return invalid("weight must have dtype %s%s, got %s", x.dtype_name, x.dtype == DType::kFloat32 ? "" : " (x's) or float32",
                     weight.dtype_name);
    if (weight.strides[0] != 1 && hidden != 1)
      return invalid("weight must be contiguous (stride 1), got stride %lld", static_cast<long long>(weight.strides[0]));
    return true;
  }

  bool check_like_x(const char* name, const Tensor& t) {
    const Tensor& x = args_.x;
    if (t.dtype != x.dtype) return invalid("%s must have x's dtype %s, got %s", name, x.dtype_name, t.dtype_name);
    bool same = t.dims == x.dims;
    for (int d = 0; same && d < x.dims; ++d) same = t.sizes[d] == x.sizes[d];
    if (!same) return invalid("%s must have x's shape %s, got %s", name, Shape(x).text, Shape(t).text);
    return check_last_dimension(name, t);
  }

  bool check_eps() {
    if (std::isfinite(static_cast<float>(args_.eps)) && args_.eps >= 0) return true;
    return invalid("eps must be finite in float32 and at least 0, got %g", args_.eps);
  }

  // What is written must not disturb what is still to be read. Every element is read by the thread that writes it, so an output
  // may be an input of its own kind (x, residual, post), element for element, or lie apart from it.
  bool check_output(const char* name, const Tensor& out) {
    if (empty()) return true;
    if (overlaps_itself(out)) return invalid("%s is written and must not overlap itself, got a tensor with shared elements", name);
    if (overlap(out, args_.weight)) return invalid("%s is written and must not overlap weight, got overlapping memory", name);
    return check_apart(name, out, "x", &args_.x) && check_apart(name, out, "residual", args_.residual) &&
           check_apart(name, out, "post_residual_addition", args_.post_residual_addition);
  }

  bool check_apart(const char* name, const Tensor& out, const char* other_name, const Tensor* other) {
    if (!other || same_memory(out, *other) || !overlap(out, *other)) return true;
    return invalid("%s must be %s's memory exactly or not overlap it, got a partial overlap", name, other_name);
  }

  const NormArgs& args_;
  Message* message_;
};

}  // namespace

Status check(const NormArgs& args, RowParams* params, RowSlices* slices, Message* message) {
  const Status status = Checker(args, message).run();
  if (status != Status::kOk) return status;

  const Tensor& x = args.x;
  RowParams& p = *params;
  p = {};
  p.x = x.data;
  p.weight = args.weight.data;
  p.out = args.out.data;
  p.residual = args.residual ? args.residual->data : nullptr;
  p.post_residual_addition = args.post_residual_addition ? args.post_residual_addition->data : nullptr;
  p.residual_out = args.residual ? args.residual_out->data : nullptr;
  p.hidden = x.sizes[x.dims - 1];
  p.eps = static_cast<float>(args.eps);
  p.inv_hidden = 1.0f / static_cast<float>(p.hidden);
  p.weight_offset = args.gemma ? 1.0f : -0.0f;
  p.dtype = x.dtype;
  p.weight_dtype = args.weight.dtype;

  // Collapse: a dimension joins the one inside it when every tensor steps evenly over both. Built innermost first.
  constexpr int kTensors = 5;
  const Tensor* tensors[kTensors] = {&x, args.residual, args.post_residual_addition, &args.out, args.residual_out};
  int dims = 0;
  int64_t sizes[kMaxDims], strides[kTensors][kMaxDims];
  for (int d = x.dims - 2; d >= 0; --d) {
    if (x.sizes[d] == 1) continue;
    bool joins = dims > 0;
    for (int t = 0; joins && t < kTensors; ++t)
      joins = !tensors[t] || tensors[t]->strides[d] == strides[t][dims - 1] * sizes[dims - 1];
    if (joins) {
      sizes[dims - 1] *= x.sizes[d];
      continue;
    }
    sizes[dims] = x.sizes[d];
    for (int t = 0; t < kTensors; ++t) strides[t][dims] = tensors[t] ? tensors[t]->strides[d] : 0;
    ++dims;
  }
  if (dims == 0) {  // one row
    sizes[0] = 1;
    for (auto& s : strides) s[0] = 0;
    dims = 1;
  }

  p.row_dims = dims < kMaxRowDims ? dims : kMaxRowDims;
  p.rows = 1;
  int64_t* const to[kTensors] = {p.x_strides, p.residual_strides, p.post_strides, p.out_strides, p.residual_out_strides};
  for (int d = 0; d < p.row_dims; ++d) {
    p.rows *= p.sizes[p.row_dims - 1 - d] = sizes[d];
    for (int t = 0; t < kTensors; ++t) to[t][p.row_dims - 1 - d] = strides[t][d];
  }
  slices->count = p.rows == 0 ? 0 : 1;
  slices->dims = dims - p.row_dims;
  for (int d = 0; d < slices->dims; ++d) {
    slices->count *= slices->sizes[d] = sizes[p.row_dims + d];
    for (int t = 0; t < kTensors; ++t) slices->strides[t][d] = strides[t][p.row_dims + d];
  }
  if (args.before_write) args.before_write(args.context);
  return Status::kOk;
}

RowParams select_slice(const RowParams& params, const RowSlices& slices, int64_t index) {
  RowParams p = params;
  int64_t offset[5] = {};
  for (int d = 0; d < slices.dims; ++d) {
    for (int t = 0; t < 5; ++t) offset[t] += index % slices.sizes[d] * slices.strides[t][d];
    index /= slices.sizes[d];
  }
  const int64_t item = size_of(p.dtype);
  const auto moved = [item](const void* pointer, int64_t by) {
    return const_cast<char*>(static_cast<const char*>(pointer)) + by * item;
  };
  p.x = moved(p.x, offset[0]);
  if (p.residual) p.residual = moved(p.residual, offset[1]);
  if (p.post_residual_addition) p.post_residual_addition = moved(p.post_residual_addition, offset[2]);
  p.out = moved(p.out, offset[3]);
  if (p.residual_out) p.residual_out = moved(p.residual_out, offset[4]);
  return p;
}

}  // namespace gemma_norm
