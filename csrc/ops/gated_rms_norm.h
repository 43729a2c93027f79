// RMSNorm with a gate, as in linear attention and state space models:
//
//   y = round(x * rstd(x) * weight * act(gate))                        norm_before_gate
//   y = round(s * rstd(s) * weight),   s = x * act(gate) in float32    else
//
// act is silu, or the logistic function with `sigmoid`; without a gate it is 1. rstd is as in rms_norm.h, of each group of
// `group_size` elements by itself. With round_each_step the products are rounded one by one: round(round(round(x * rstd) * weight)
// * act(gate)) and round(round(s * rstd) * weight).
#pragma once

#include "../core/op_info.h"
#include "variants.h"

namespace gemma_norm {

// What is normalised is gated.
struct GatedInputRmsNorm : Form<GatedSource, formulas::Scale> {
  static constexpr bool kFloat32Rows = true, kWeightIsOptional = false, kGemma = false, kGroups = true;
};

struct GatedRmsNorm : Form<InputSource, formulas::ScaleAndGate> {
  static constexpr bool kWeightIsOptional = false, kGemma = false, kGroups = true;
  template <class Visit>
  static void with_form(const RowParams& p, const Visit& visit) {
    p.norm_before_gate ? visit(GatedRmsNorm()) : visit(GatedInputRmsNorm());
  }
  static constexpr OperandRule kRules[] = {kXRule, kWeightRule, optional(like_x(kGate)), output(kOut, Use::kNew, kX)};
  static constexpr OperandRule kOutRules[] = {kXRule, kWeightRule, optional(like_x(kGate)), output(kOut, Use::kWritten, kX)};
  static constexpr OpInfo kInfos[] = {
      {"gated_rms_norm", "gated_rms_norm",
       "(Tensor x, Tensor? gate, Tensor weight, float eps=1e-6, bool sigmoid=False, bool norm_before_gate=True, "
       "int? group_size=None, bool round_each_step=False) -> Tensor",
       "gated_rms_norm", kRules},
      {"gated_rms_norm", "gated_rms_norm.out",
       "(Tensor x, Tensor? gate, Tensor weight, float eps=1e-6, bool sigmoid=False, bool norm_before_gate=True, "
       "int? group_size=None, bool round_each_step=False, *, Tensor(a!) out) -> Tensor(a!)",
       "gated_rms_norm without out", kOutRules},
  };
};

}  // namespace gemma_norm
