// From the dtypes and options of a call, known at run time, to the code that was compiled for them.
#pragma once

#include <type_traits>

#include "../core/row_params.h"
#include "parts.h"

namespace gemma_norm {

// What an operator computes. These are the defaults; an operator's own form overrides some. An operator whose options
// or dtypes select between different computations has a Form for each.
template <class Source_, class Formula_>
struct Form {
  using Source = Source_;
  using Formula = Formula_;
  static constexpr bool kTwoRows = Source::kTwoRows;
  static constexpr bool kNormsX = Source::kNormsX;  // x has a norm of its own, with a weight of its own
  static constexpr bool kGated = Formula::kGated || std::is_same_v<Source, GatedSource>;
  static constexpr bool kFloat32Rows = false;  // s is float32 even if x is not
  static constexpr bool kTakesFloat32 = true;  // x may be float32
  static constexpr bool kWeightIsOptional = true;
  static constexpr bool kGemma = true;       // the operator has the option gemma
  static constexpr bool kGroups = false;     // the operator has the option group_size: rows may have different weights
  static constexpr bool kQuantizes = false;  // out has 8 bits
};

struct NoWeight {};

template <class Form_, class X_, class W_, bool kRoundEachStep_>
struct Variant {
  using Form = Form_;
  using X = X_;                                                // the element type of x, gate and out
  using S = std::conditional_t<Form::kFloat32Rows, float, X>;  // of s, residual, post and residual_out
  using W = W_;                                                // of the weight, or NoWeight
  static constexpr bool kRoundEachStep = kRoundEachStep_;
  static constexpr bool kHasWeight = !std::is_same_v<W, NoWeight>;
};

template <class Form, class X, class Float16, class BFloat16, class Visit>
void with_weight(const RowParams& p, const Visit& visit) {
  if (p.dtypes[kWeight] == DType::kOther) {
    if constexpr (Form::kWeightIsOptional) visit(Variant<Form, X, NoWeight, false>());
  } else if (p.dtypes[kWeight] == DType::kFloat32) {
    visit(Variant<Form, X, float, false>());
  } else if constexpr (sizeof(X) == sizeof(float)) {
    if (p.dtypes[kWeight] == DType::kFloat16)
      visit(Variant<Form, X, Float16, false>());
    else
      visit(Variant<Form, X, BFloat16, false>());
  } else {
    if (p.round_each_step)
      visit(Variant<Form, X, X, true>());
    else
      visit(Variant<Form, X, X, false>());
  }
}

// Calls visit(Variant()) for the parameters of a checked call of Op. Float16 and BFloat16 are the device's element
// types.
template <class Op, class Float16, class BFloat16, class Visit>
void with_variant(const RowParams& p, const Visit& visit) {
  Op::with_form(p, [&](auto form) {
    using Form = decltype(form);
    switch (p.dtypes[kX]) {
      case DType::kFloat32:
        if constexpr (Form::kTakesFloat32) with_weight<Form, float, Float16, BFloat16>(p, visit);
        break;
      case DType::kFloat16: return with_weight<Form, Float16, Float16, BFloat16>(p, visit);
      case DType::kBFloat16: return with_weight<Form, BFloat16, Float16, BFloat16>(p, visit);
      default: break;  // check() refuses it
    }
  });
}

}  // namespace gemma_norm
