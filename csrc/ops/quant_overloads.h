// The overloads of an operator whose result is quantised. Each is made of the operator's own arguments. It computes its
// scales or is given one ("static"). What returns y as well is an operator of its own ("..._y"), and not an overload:
// TorchScript tells overloads apart by their arguments alone.
#pragma once

#include <initializer_list>
#include <string_view>

#include "../core/op_info.h"

namespace gemma_norm {

constexpr OperandRule kGivenScaleRule = {kScale, Extent::kOne, DTypes::kFloat32};
constexpr OperandRule kScaleBoundRule = optional(named("scale_ub", kGivenScaleRule));
constexpr OperandRule kQuantizedRule = {kOut, Extent::kCodes, DTypes::kQuantized, Use::kNew, kX};
constexpr OperandRule kScalesRule = {kScaleOut, Extent::kScales, DTypes::kScales, Use::kNew};
constexpr OperandRule kGlobalScaleRule = optional({kGlobalScale, Extent::kOne, DTypes::kFloat32});
constexpr OperandRule kYRule = output(kYOut, Use::kNew, kX);

// Text that the compiler puts together.
struct Text {
  char text[512] = {};

  constexpr Text(std::initializer_list<std::string_view> parts) {
    char* end = text;
    for (const std::string_view part : parts)
      for (const char c : part) *end++ = c;
  }
};

template <int kCount>
struct QuantRules {
  OperandRule all[kCount];
  int results;  // those that are returned
};

// The rules of an overload's tensors. `Own` has what the operator has beside these overloads:
//
//   kName, kDifferentiable   see OpInfo
//   kTensors, kWeightDefault, kOptions   of the schema: the tensors, the default of the last, such as "=None", and the
//                                        options
//   kInputs                  the rules of those tensors
//   kOutputs                 of the results after q, the scales and y; the last entry is none, because an array has at
//                            least one
template <class Own, bool kIsGiven, bool kReturnsY>
constexpr auto quant_rules() {
  constexpr int kInputs = sizeof Own::kInputs / sizeof Own::kInputs[0];
  constexpr int kOutputs = sizeof Own::kOutputs / sizeof Own::kOutputs[0] - 1;
  QuantRules<kInputs + 2 + 2 * !kIsGiven + kReturnsY + kOutputs> rules{};
  OperandRule* end = rules.all;
  for (const OperandRule& rule : Own::kInputs) *end++ = rule;
  *end++ = kIsGiven ? kGivenScaleRule : kScaleBoundRule;
  if (!kIsGiven) *end++ = kGlobalScaleRule;
  *end++ = kQuantizedRule;
  if (!kIsGiven) *end++ = kScalesRule;
  if (kReturnsY) *end++ = kYRule;
  for (int i = 0; i < kOutputs; ++i) *end++ = Own::kOutputs[i];
  for (const OperandRule& rule : rules.all) rules.results += rule.use == Use::kNew;
  return rules;
}

template <class Own, bool kIsGiven, bool kReturnsY>
struct QuantOverload {
 private:
  static constexpr auto kRules = quant_rules<Own, kIsGiven, kReturnsY>();
  static constexpr std::string_view kResults[4] = {"Tensor", "(Tensor, Tensor)", "(Tensor, Tensor, Tensor)",
                                                   "(Tensor, Tensor, Tensor, Tensor)"};
  static constexpr Text kTorchName{Own::kName, kReturnsY ? "_y" : "", kIsGiven ? ".static" : ""};
  static constexpr Text kSchema{
      "(",
      Own::kTensors,
      kIsGiven ? ", Tensor scale, " : Own::kWeightDefault,
      kIsGiven ? "" : ", ",
      Own::kOptions,
      ", *, ScalarType? dtype=None",
      kIsGiven ? "" : ", int? scale_group_size=None, Tensor? scale_ub=None",
      ", bool round_first=False",
      kIsGiven ? ""
               : ", bool scale_ue8m0=False, bool column_major_scale=False, ScalarType? scale_dtype=None, "
                 "Tensor? global_scale=None",
      ") -> ",
      kResults[kRules.results - 1]};

 public:
  static constexpr OpInfo kInfo{Own::kName, kTorchName.text, kSchema.text, Own::kDifferentiable, kRules.all};
};

}  // namespace gemma_norm
