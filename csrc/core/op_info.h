// The tensors of an operator and the rules for each, as data. check.cpp interprets these rules, so a new operator needs
// no new checks.
#pragma once

#include <cstdint>

#include "../gemma_norm.h"

namespace gemma_norm {

enum class Extent : int8_t {
  kRows,    // [..., hidden]: that of x, which determines the shapes of all other operands
  kLikeX,   // x's shape, with strides of its own and a contiguous last dimension
  kHidden,  // [hidden], contiguous, the same for all rows
  // Of operators whose rows are the heads of tokens. `...` are the tokens.
  kRowsOfHeads,  // [..., heads, hidden]: that of x, which determines the shapes of all other operands
  kHeads,        // [..., any number, hidden]
  kAngles,       // [..., rotary], with a contiguous last dimension
  kTable,        // [any number, rotary], with a contiguous last dimension; the same for all rows
  kPositions,    // [...], or with mrope_section [3, ...]
  kOne,          // one element, any number of dimensions
  kScales,       // [..., groups], where `...` are x's leading dimensions; any strides
  kCodes,        // x's shape; of float4, which has two elements in one, half of the last dimension
};

enum class DTypes : int8_t {
  kFloat,         // float32, float16 or bfloat16
  kLikeX,         // x's
  kXOrFloat32,    // x's or float32
  kWeight,        // x's or float32; if x is float32, any of kFloat
  kLikeResidual,  // residual's
  kLikeWeight,    // weight's
  kXOrNarrower,   // x's; if x is float32, any of kFloat
  kLikeCos,       // cos's
  kInteger,       // int32 or int64
  kFloat32,       // float32
  kQuantized,     // that of the option dtype
  kScales,        // that of the option scale_dtype
};

enum class Use : int8_t {
  kRead,     // an argument
  kNew,      // an output: a new tensor, which is returned
  kWritten,  // an output: an argument, which is returned
  kInPlace,  // an output: the memory of the argument `in_place_of`
};

struct OperandRule {
  Operand operand;
  Extent extent;
  DTypes dtypes;
  Use use = Use::kRead;
  Operand in_place_of = kNoOperand;  // of an output: the input that messages name if both are the same memory
  bool optional = false;
  const char* name = nullptr;  // in the schema and in messages; null: that of kOperandNames

  constexpr bool written() const { return use != Use::kRead; }
  // It has rows that are normalised, or their results.
  constexpr bool has_rows() const {
    return extent == Extent::kRows || extent == Extent::kLikeX || extent == Extent::kRowsOfHeads ||
           extent == Extent::kHeads || extent == Extent::kCodes;
  }
  // Its elements differ between rows, or between tokens.
  constexpr bool moves() const {
    return has_rows() || extent == Extent::kAngles || extent == Extent::kPositions || extent == Extent::kScales;
  }
  constexpr const char* name_of() const { return name ? name : kOperandNames[operand]; }
};

// Rules that several operators use.
constexpr OperandRule kXRule = {kX, Extent::kRows, DTypes::kFloat};
constexpr OperandRule kWeightRule = {kWeight, Extent::kHidden, DTypes::kWeight};
constexpr OperandRule like_x(Operand operand, DTypes dtypes = DTypes::kLikeX) {
  return {operand, Extent::kLikeX, dtypes};
}
constexpr OperandRule output(Operand operand, Use use, Operand in_place_of, DTypes dtypes = DTypes::kLikeX) {
  return {operand, Extent::kLikeX, dtypes, use, in_place_of};
}
constexpr OperandRule like_weight(Operand operand) { return {operand, Extent::kHidden, DTypes::kLikeWeight}; }
constexpr OperandRule new_like_weight(Operand operand) {
  return {operand, Extent::kHidden, DTypes::kLikeWeight, Use::kNew};
}
constexpr OperandRule optional(OperandRule rule) {
  rule.optional = true;
  return rule;
}
constexpr OperandRule named(const char* name, OperandRule rule) {
  rule.name = name;
  return rule;
}

// Operands are checked in the order of their rules. That order is: x, with which all others are compared; the weight;
// the other inputs in the order of the schema; the outputs.
struct OpInfo {
  const char* name;            // for messages, such as "rms_norm"
  const char* torch_name;      // in torch.ops.gemma_norm, with the overload, such as "rms_norm.out"
  const char* schema;          // what follows the torch_name in the schema: arguments and results
  const char* differentiable;  // for messages: what has a derivative, after "gemma_norm."
  const OperandRule* rules;
  int32_t rule_count;
  uint64_t operands = 0;  // bit o is set if the operator has Operand o

  template <int kCount>
  constexpr OpInfo(const char* name, const char* torch_name, const char* schema, const char* differentiable,
                   const OperandRule (&rules)[kCount])
      : name(name),
        torch_name(torch_name),
        schema(schema),
        differentiable(differentiable),
        rules(rules),
        rule_count(kCount) {
    for (const OperandRule& rule : rules) operands |= uint64_t{1} << rule.operand;
  }
  constexpr bool has(Operand operand) const { return operands >> operand & 1; }
  // Rows are the heads of tokens.
  constexpr bool has_heads() const { return rules[0].extent == Extent::kRowsOfHeads; }
  constexpr bool quantizes() const {
    for (int i = 0; i < rule_count; ++i)
      if (rules[i].dtypes == DTypes::kQuantized) return true;
    return false;
  }
  constexpr const char* name_of(Operand operand) const {
    for (int i = 0; i < rule_count; ++i)
      if (rules[i].operand == operand) return rules[i].name_of();
    return kOperandNames[operand];
  }
  const OperandRule* begin() const { return rules; }
  const OperandRule* end() const { return rules + rule_count; }
};

}  // namespace gemma_norm
