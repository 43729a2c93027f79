// The gradients of the gated RMSNorm. a is the activation of the gate, act(gate), and a' its derivative there.
//
//   s = x,      u = dout * a                                     with norm_before_gate
//   s = x * a,  u = dout                                         without
//
// From these, rstd, n and ds are those of rms_norm_backward.h, with s for x and u for dout. Then
//
//   dx = round(ds),      dgate = round(dout * n * weight * a')   with norm_before_gate
//   dx = round(ds * a),  dgate = round(ds * x * a')              without
//   dweight = round(sum over all rows of u * n)
//
// With group_size, a row is a group, and dweight is summed for each group.
#pragma once

#include "../core/op_info.h"

namespace gemma_norm {

struct GatedRmsNormBackward {
  static constexpr bool kGated = true;
  static constexpr OperandRule kRules[] = {
      kXRule,
      kWeightRule,
      like_x(kDOut),
      like_x(kGate),
      output(kDX, Use::kNew, kX),
      output(kDGate, Use::kNew, kGate),
      new_like_weight(kDWeight),
  };
  static constexpr OperandRule kInputRules[] = {
      kXRule, kWeightRule, like_x(kDOut), like_x(kGate), output(kDX, Use::kNew, kX), output(kDGate, Use::kNew, kGate),
  };
  static constexpr OpInfo kInfos[] = {
      {"gated_rms_norm_backward", "gated_rms_norm_backward",
       "(Tensor dout, Tensor x, Tensor gate, Tensor weight, float eps=1e-6, bool sigmoid=False, bool "
       "norm_before_gate=True, int? group_size=None) -> (Tensor, Tensor, Tensor)",
       "gated_rms_norm", kRules},
      {"gated_rms_norm_backward_input", "gated_rms_norm_backward_input",
       "(Tensor dout, Tensor x, Tensor gate, Tensor weight, float eps=1e-6, bool sigmoid=False, bool "
       "norm_before_gate=True, int? group_size=None) -> (Tensor, Tensor)",
       "gated_rms_norm", kInputRules},
  };
};

}  // namespace gemma_norm
