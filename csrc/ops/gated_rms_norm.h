// RMSNorm with a gate, as in linear attention and state space models:
//
//   y = round(x * rstd(x) * weight * act(gate))                        with norm_before_gate
//   y = round(s * rstd(s) * weight),   s = x * act(gate) in float32    without
//
// act is silu, or the logistic function with `sigmoid`. Without a gate it is 1. rstd is that of rms_norm.h, for each
// group of `group_size` elements separately. With round_each_step, each product is rounded:
//
//   y = round(round(round(x * rstd(x)) * weight) * act(gate))
//   y = round(round(s * rstd(s)) * weight)
#pragma once

#include "../core/op_info.h"
#include "variants.h"

namespace gemma_norm {

// The form without norm_before_gate: the input is gated, then normalised.
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
  static constexpr OperandRule kOutRules[] = {kXRule, kWeightRule, optional(like_x(kGate)),
                                              output(kOut, Use::kWritten, kX)};
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
