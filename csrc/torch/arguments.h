// Which argument of an operator stands where, read from its schema, and how an option's value reaches the C interface.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>
#include <string_view>

#include "../core/op_info.h"

namespace gemma_norm::binding {

template <class T>
T argument(StableIValue value) {
  return torch::stable::detail::to<T>(value);
}

// An option as a schema declares it, and where its value goes: one of the three.
struct OptionField {
  std::string_view declared;
  double Options::* number = nullptr;
  bool Options::* flag = nullptr;
  int64_t Options::* count = nullptr;  // that may be None
};
constexpr OptionField kOptionFields[] = {
    {"float eps", &Options::eps},
    {"bool gemma", nullptr, &Options::gemma},
    {"bool round_each_step", nullptr, &Options::round_each_step},
    {"bool sigmoid", nullptr, &Options::sigmoid},
    {"bool norm_before_gate", nullptr, &Options::norm_before_gate},
    {"int? group_size", nullptr, nullptr, &Options::group_size},
};

// What stands where among an operator's arguments, read from its schema: "(Tensor x, float eps=1e-6, *, Tensor(a!) out) -> ...". It
// is worked out by the compiler, which stops at an argument that is not known here.
struct Arguments {
  struct Argument {
    Operand operand = kNoOperand;  // of a tensor
    bool optional = false;         // such a tensor may be None
    const OptionField* option = nullptr;
  } list[kOperands + sizeof kOptionFields / sizeof kOptionFields[0]];
  int count = 0;

  constexpr explicit Arguments(const OpInfo& op) {
    std::string_view rest = std::string_view(op.schema).substr(1);
    rest = rest.substr(0, rest.find(") ->"));
    while (!rest.empty()) {
      const std::string_view one = rest.substr(0, rest.find(", "));
      rest.remove_prefix(one.size() < rest.size() ? one.size() + 2 : rest.size());
      if (one != "*") list[count++] = read(one.substr(0, one.find('=')));
    }
  }

 private:
  static constexpr Argument read(std::string_view declared) {
    for (const OptionField& option : kOptionFields)
      if (declared == option.declared) return {kNoOperand, false, &option};
    const size_t space = declared.rfind(' ');
    const std::string_view type = declared.substr(0, space), name = declared.substr(space + 1);
    for (int operand = 0; operand < kOperands; ++operand)
      if (type.substr(0, 6) == "Tensor" && name == kOperandNames[operand])
        return {static_cast<Operand>(operand), type == "Tensor?", nullptr};
    throw "an argument of the schema that is neither an operand nor an option";
  }
};

inline void set_option(Options* options, const OptionField& field, StableIValue value) {
  if (field.number)
    options->*field.number = argument<double>(value);
  else if (field.flag)
    options->*field.flag = argument<bool>(value);
  else if (const auto count = argument<std::optional<int64_t>>(value))
    options->*field.count = *count;
}

}  // namespace gemma_norm::binding
