// The rules of operators that quantise: the dtype and shape of what is quantised, its scales and their groups.
#include <string>

#include "checker.h"

namespace gemma_norm {

bool Checker::check_one(const OperandRule& rule, const Tensor& t) {
  int64_t elements = 1;
  for (int d = 0; d < t.dims; ++d) elements *= t.sizes[d];
  return elements == 1 || invalid("%s must have one element, got shape %s", name_of(rule), ShapeText(t).text);
}

// The number of scales of a row is checked with the option scale_group_size.
bool Checker::check_scales(const OperandRule& rule, const Tensor& t) {
  const int64_t size = call_.options.scale_group_size;
  if (size <= 0) return true;
  const int64_t groups = size < hidden() ? hidden() / size : 1;
  return check_last_size(rule, t, call_.options.scale_dtype == DType::kInt32 ? (groups + 3) / 4 : groups);
}

bool Checker::check_codes(const OperandRule& rule, const Tensor& t) {
  return check_last_size(rule, t, is_packed(call_.options.dtype) ? hidden() / 2 : hidden());
}

// x's shape, but for the last dimension.
bool Checker::check_last_size(const OperandRule& rule, const Tensor& t, int64_t size) {
  int64_t sizes[kMaxDims];
  for (int d = 0; d < x().dims; ++d) sizes[d] = x().sizes[d];
  sizes[x().dims - 1] = size;
  return check_shape(rule, t, sizes, x().dims);
}

bool Checker::check_quantization() {
  const Options& options = call_.options;
  if (!is_quantized(options.dtype))
    return invalid("dtype must be float8_e4m3fn, float8_e4m3fnuz, float8_e5m2, int8 or float4_e2m1fn_x2, got %s",
                   options.dtype_name);
  const int64_t norm = options.group_size, size = options.scale_group_size;
  const std::string got = size == kWholeRow ? "None" : std::to_string(size);
  if (!check_group("scale_group_size", size)) return false;
  if (is_packed(options.dtype)) {
    if (!call_.op->has(kScaleOut)) return invalid("scale must be None with float4_e2m1fn_x2, got a tensor");
    if (size == kWholeRow || size % 16 != 0)
      return invalid("scale_group_size must be a multiple of 16 with float4_e2m1fn_x2, got %s", got.c_str());
  }
  if (!call_.op->has(kScaleOut)) return true;
  const DType scales = options.scale_dtype;
  if (!is_of_scales(scales))
    return invalid("scale_dtype must be float32, float8_e8m0fnu, float8_e4m3fn or int32, got %s",
                   options.scale_dtype_name);
  if (options.scale_ue8m0 && scales == DType::kFloat8E4M3FN)
    return invalid("scale_ue8m0 must be False with scale_dtype=float8_e4m3fn, got True");
  if (call_.tensors[kGlobalScale] && scales != DType::kFloat8E4M3FN)
    return invalid("global_scale must be None unless scale_dtype is float8_e4m3fn, got a tensor");
  if (norm >= hidden()) return true;
  if (size == kWholeRow || norm % size != 0)
    return invalid("scale_group_size must divide group_size %lld, got %s", static_cast<long long>(norm), got.c_str());
  return scales != DType::kInt32 || norm / size % 4 == 0 ||
         invalid(
             "scale_dtype must not be int32 unless group_size is a multiple of four times scale_group_size, "
             "got int32");
}

}  // namespace gemma_norm
