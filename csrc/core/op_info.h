// What an operator takes and gives, as data. check.cpp interprets it and names no operator and no operand.
#pragma once

#include <cstdint>

#include "../gemma_norm.h"

namespace gemma_norm {

enum class Extent : int8_t {
  kRows,    // [..., hidden], from which the shapes of all others follow: x's
  kLikeX,   // x's shape, any strides, the last dimension contiguous
  kHidden,  // [hidden], contiguous, shared by all rows
};

enum class DTypes : int8_t {
  kFloat,         // float32, float16 or bfloat16
  kLikeX,         // x's
  kXOrFloat32,    // x's or float32
  kWeight,        // x's or float32; where x is float32, any of kFloat
  kLikeResidual,  // residual's
};

enum class Use : int8_t {
  kRead,     // an argument
  kNew,      // written: a new tensor, which is returned
  kWritten,  // written: an argument, which is returned
  kInPlace,  // written: the memory of the argument `in_place_of`
};

struct OperandRule {
  Operand operand;
  Extent extent;
  DTypes dtypes;
  Use use = Use::kRead;
  Operand in_place_of = kNoOperand;  // of an output: the input that messages name where the two are the same memory
  bool optional = false;

  constexpr bool written() const { return use != Use::kRead; }
  constexpr bool has_rows() const { return extent != Extent::kHidden; }
};

// The rules that operators share.
constexpr OperandRule kXRule = {kX, Extent::kRows, DTypes::kFloat};
constexpr OperandRule kWeightRule = {kWeight, Extent::kHidden, DTypes::kWeight};
constexpr OperandRule like_x(Operand operand, DTypes dtypes = DTypes::kLikeX) { return {operand, Extent::kLikeX, dtypes}; }
constexpr OperandRule output(Operand operand, Use use, Operand in_place_of, DTypes dtypes = DTypes::kLikeX) {
  return {operand, Extent::kLikeX, dtypes, use, in_place_of};
}
constexpr OperandRule optional(OperandRule rule) {
  rule.optional = true;
  return rule;
}

// Operands are checked in the order of their rules: x first, as all others are compared with it, then the weight, then the other
// inputs in the schema's order, then the outputs.
struct OpInfo {
  const char* name;            // in messages: "rms_norm"
  const char* torch_name;      // with its overload: "rms_norm.out"
  const char* schema;          // of the arguments and results, after torch_name
  const char* differentiable;  // what to call instead where a derivative is wanted, after "gemma_norm."
  const OperandRule* rules;
  int32_t rule_count;
  uint64_t operands = 0;  // a bit for each

  template <int kCount>
  constexpr OpInfo(const char* name, const char* torch_name, const char* schema, const char* differentiable,
                   const OperandRule (&rules)[kCount])
      : name(name), torch_name(torch_name), schema(schema), differentiable(differentiable), rules(rules), rule_count(kCount) {
    for (const OperandRule& rule : rules) operands |= uint64_t{1} << rule.operand;
  }
  constexpr bool has(Operand operand) const { return operands >> operand & 1; }
  const OperandRule* begin() const { return rules; }
  const OperandRule* end() const { return rules + rule_count; }
};

}  // namespace gemma_norm
