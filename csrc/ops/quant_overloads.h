// The overloads of an operator whose result is quantised. Each is made of the operator's own arguments. It computes its
// scales or is given one ("static"), and it returns y as well ("y") or only what is quantised.
#pragma once

#include <initializer_list>
#include <string_view>

#include "../core/op_info.h"

namespace gemma_norm {

constexpr OperandRule kGivenScaleRule = {kScale, Extent::kOne, DTypes::kFloat32};
constexpr OperandRule kScaleBoundRule = optional(named("scale_ub", kGivenScaleRule));
constexpr OperandRule kQuantizedRule = {kOut, Extent::kLikeX, DTypes::kQuantized, Use::kNew, kX};
constexpr OperandRule kScalesRule = {kScaleOut, Extent::kScales, DTypes::kFloat32, Use::kNew};
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

// `Own` has what the operator has beside these overloads:
//
//   kName, kDifferentiable   see OpInfo
//   kTensors, kWeightDefault, kOptions   of the schema: the tensors up to the last, which is the weight or the gate's
//                                        weight; the default of that, such as "=None"; the options
//   kInputs                  the rules of those tensors
//   kOutputs                 of the results after q, the scales and y; the last is a rule without an operand
template <class Own, bool kIsGiven, bool kReturnsY>
struct QuantOverload {
 private:
  static constexpr int kInputs = sizeof Own::kInputs / sizeof Own::kInputs[0];
  static constexpr int kOutputs = sizeof Own::kOutputs / sizeof Own::kOutputs[0] - 1;
  struct Rules {
    OperandRule all[kInputs + 2 + !kIsGiven + kReturnsY + kOutputs] = {};
    int results = 0;

    constexpr Rules() {
      OperandRule* end = all;
      for (const OperandRule& rule : Own::kInputs) *end++ = rule;
      *end++ = kIsGiven ? kGivenScaleRule : kScaleBoundRule;
      *end++ = kQuantizedRule;
      if (!kIsGiven) *end++ = kScalesRule;
      if (kReturnsY) *end++ = kYRule;
      for (int i = 0; i < kOutputs; ++i) *end++ = Own::kOutputs[i];
      for (const OperandRule& rule : all) results += rule.use == Use::kNew;
    }
  };
  static constexpr Rules kRules{};
  static constexpr std::string_view kResults[] = {"Tensor", "(Tensor, Tensor)", "(Tensor, Tensor, Tensor)",
                                                  "(Tensor, Tensor, Tensor, Tensor)"};
  static constexpr Text kTorchName{Own::kName, kIsGiven && kReturnsY ? ".static_y"
                                               : kIsGiven            ? ".static"
                                               : kReturnsY           ? ".y"
                                                                     : ""};
  static constexpr Text kSchema{
      "(",
      Own::kTensors,
      kIsGiven ? ", Tensor scale, " : Own::kWeightDefault,
      kIsGiven ? "" : ", ",
      Own::kOptions,
      ", *, ScalarType? dtype=None",
      kIsGiven ? "" : ", int? scale_group_size=None, Tensor? scale_ub=None",
      ", bool round_first=False",
      kIsGiven ? "" : ", bool scale_ue8m0=False, bool column_major_scale=False",
      ") -> ",
      kResults[kRules.results - 1]};

 public:
  static constexpr OpInfo kInfo{Own::kName, kTorchName.text, kSchema.text, Own::kDifferentiable, kRules.all};
};

}  // namespace gemma_norm
