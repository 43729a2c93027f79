// The gradients of RMSNorm, plain or fused with the addition of the residual stream. For a row,
//
//   rstd = 1 / sqrt(mean(x^2) + eps),   n = x * rstd,   g = dout * (gemma ? 1 + weight : weight)
//
//   dx      = round(rstd * (g - n * mean(g * n)) + dsum)
//   dweight = round(sum over all rows of dout * n)
//
// x is what was normalised: the norm's input, or the sum s that add_rms_norm returned. dsum is the gradient of that
// sum, or absent. All arithmetic is in float32. Roundings of the forward pass have the derivative 1.
#pragma once

#include "../core/op_info.h"

namespace gemma_norm {

struct RmsNormBackward {
  static constexpr bool kGated = false;
  static constexpr OperandRule kRules[] = {
      kXRule,
      kWeightRule,
      like_x(kDOut, DTypes::kXOrNarrower),
      optional(like_x(kDSum)),
      output(kDX, Use::kNew, kX),
      new_like_weight(kDWeight),
  };
  static constexpr OperandRule kInputRules[] = {
      kXRule,
      optional(kWeightRule),
      like_x(kDOut, DTypes::kXOrNarrower),
      optional(like_x(kDSum)),
      output(kDX, Use::kNew, kX),
  };
  static constexpr OpInfo kInfos[] = {
      {"rms_norm_backward", "rms_norm_backward",
       "(Tensor dout, Tensor x, Tensor weight, Tensor? dsum=None, float eps=1e-6, bool gemma=False) -> (Tensor, "
       "Tensor)",
       "rms_norm", kRules},
      {"rms_norm_backward_input", "rms_norm_backward_input",
       "(Tensor dout, Tensor x, Tensor? weight=None, Tensor? dsum=None, float eps=1e-6, bool gemma=False) -> Tensor",
       "rms_norm", kInputRules},
  };
};

}  // namespace gemma_norm
