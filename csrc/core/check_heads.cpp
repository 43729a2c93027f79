// The rules of operators whose rows are the heads of tokens, which are rotated: heads, angles, positions.
#include <cstring>
#include <string>

#include "checker.h"

namespace gemma_norm {

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
  return check_shape(rule, t, sizes, axes + leading());
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

bool Checker::check_position_values() {
  const Tensor* const positions = call_.tensors[kPositions];
  if (!positions) return true;
  const int64_t rows = call_.tensors[kCosSinCache]->sizes[0];
  const Tensor& t = *positions;
  int64_t at[kMaxDims + 1] = {}, offset = 0;
  for (int d = 0; d >= 0;) {
    const int64_t position = t.dtype == DType::kInt32 ? static_cast<const int32_t*>(t.data)[offset]
                                                      : static_cast<const int64_t*>(t.data)[offset];
    if (position < 0 || position >= rows)
      return invalid("positions must be at least 0 and less than cos_sin_cache's %lld rows, got %lld",
                     static_cast<long long>(rows), static_cast<long long>(position));
    for (d = t.dims - 1; d >= 0; --d) {
      offset += t.strides[d];
      if (++at[d] < t.sizes[d]) break;
      offset -= t.sizes[d] * t.strides[d];
      at[d] = 0;
    }
  }
  return true;
}

}  // namespace gemma_norm
