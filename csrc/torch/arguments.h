// Which argument of an operator is at which position, read from the schema, and how the value of an option gets into
// the C interface.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "../core/op_info.h"
#include "dtypes.h"

namespace gemma_norm::binding {

template <class T>
T argument(StableIValue value) {
  return torch::stable::detail::to<T>(value);
}

// An option as schemas declare it, and the member of Options that takes its value. One of the pointers is set.
struct OptionField {
  std::string_view declared;
  double Options::* number = nullptr;
  bool Options::* flag = nullptr;
  int64_t Options::* count = nullptr;      // the value may be None, which leaves the default
  Sections Options::* sections = nullptr;  // likewise
  DType Options::* dtype = nullptr;        // likewise
  const char* Options::* dtype_name = nullptr;
};
constexpr OptionField kOptionFields[] = {
    {"float eps", &Options::eps},
    {"bool gemma", nullptr, &Options::gemma},
    {"bool round_each_step", nullptr, &Options::round_each_step},
    {"bool sigmoid", nullptr, &Options::sigmoid},
    {"bool norm_before_gate", nullptr, &Options::norm_before_gate},
    {"int? group_size", nullptr, nullptr, &Options::group_size},
    {"bool round_rotation", nullptr, &Options::round_rotation},
    {"bool interleaved", nullptr, &Options::interleaved},
    {"bool mrope_interleaved", nullptr, &Options::mrope_interleaved},
    {"int[]? mrope_section", nullptr, nullptr, nullptr, &Options::mrope_section},
    {"ScalarType? dtype", nullptr, nullptr, nullptr, nullptr, &Options::dtype, &Options::dtype_name},
    {"int? scale_group_size", nullptr, nullptr, &Options::scale_group_size},
    {"bool round_first", nullptr, &Options::round_first},
    {"bool scale_ue8m0", nullptr, &Options::scale_ue8m0},
    {"bool column_major_scale", nullptr, &Options::column_major_scale},
    {"ScalarType? scale_dtype", nullptr, nullptr, nullptr, nullptr, &Options::scale_dtype, &Options::scale_dtype_name},
};

// The arguments of an operator in order, read from a schema such as "(Tensor x, float eps=1e-6, *, Tensor(a!) out) ->
// ...". The compiler evaluates this, and reports an error if an argument is unknown.
struct Arguments {
  struct Argument {
    Operand operand = kNoOperand;         // if it is a tensor
    bool optional = false;                // if it is a tensor that may be None
    const OptionField* option = nullptr;  // if it is an option
  } list[kOperands + sizeof kOptionFields / sizeof kOptionFields[0]];
  int count = 0;

  constexpr explicit Arguments(const OpInfo& op) {
    std::string_view rest = std::string_view(op.schema).substr(1);
    rest = rest.substr(0, rest.find(") ->"));
    while (!rest.empty()) {
      const std::string_view one = rest.substr(0, rest.find(", "));
      rest.remove_prefix(one.size() < rest.size() ? one.size() + 2 : rest.size());
      if (one != "*") list[count++] = read(op, one.substr(0, one.find('=')));
    }
  }

 private:
  static constexpr Argument read(const OpInfo& op, std::string_view declared) {
    for (const OptionField& option : kOptionFields)
      if (declared == option.declared) return {kNoOperand, false, &option};
    const size_t space = declared.rfind(' ');
    const std::string_view type = declared.substr(0, space), name = declared.substr(space + 1);
    for (int operand = 0; operand < kOperands; ++operand)
      if (type.substr(0, 6) == "Tensor" && op.has(static_cast<Operand>(operand)) &&
          name == op.name_of(static_cast<Operand>(operand)))
        return {static_cast<Operand>(operand), type == "Tensor?", nullptr};
    throw "an argument of the schema that is neither an operand nor an option";
  }
};

// Whether the operator is one that records derivatives; it then has a twin without them (schema.cpp).
constexpr bool has_twin(const OpInfo& op) {
  const std::string_view name = op.torch_name;
  for (int i = 0; i < op.rule_count; ++i)
    if (op.rules[i].use == Use::kWritten || op.rules[i].use == Use::kInPlace) return false;
  return name.substr(0, name.find('.')) == op.differentiable;
}

inline void set_sections(Sections* sections, const std::optional<std::vector<int64_t>>& sizes) {
  if (!sizes) return;
  // A count that no list should have stands for an empty list, because 0 stands for None.
  sections->count = sizes->empty() ? Sections::kAxes + 1 : static_cast<int32_t>(sizes->size());
  for (size_t i = 0; i < sizes->size() && i < Sections::kAxes; ++i) sections->sizes[i] = (*sizes)[i];
}

inline void set_dtype(Options* options, const OptionField& field, const std::optional<int64_t>& dtype) {
  if (dtype) options->*field.dtype = to_dtype(static_cast<int32_t>(*dtype));
  options->*field.dtype_name = dtype_name(dtype ? static_cast<int32_t>(*dtype) : to_scalar_type(options->*field.dtype));
}

inline void set_option(Options* options, const OptionField& field, StableIValue value) {
  if (field.number)
    options->*field.number = argument<double>(value);
  else if (field.flag)
    options->*field.flag = argument<bool>(value);
  else if (field.sections)
    set_sections(&(options->*field.sections), argument<std::optional<std::vector<int64_t>>>(value));
  else if (field.dtype)
    set_dtype(options, field, argument<std::optional<int64_t>>(value));
  else if (const auto count = argument<std::optional<int64_t>>(value))
    options->*field.count = *count == kWholeRow ? kWholeRow - 1 : *count;  // kWholeRow is None; neither divides a row
}

}  // namespace gemma_norm::binding
