// RMSNorm, plain or fused with the addition of the residual stream:
//
//   s = x                                    rms_norm
//   s = round(x + residual)                  add_rms_norm, fused_add_rms_norm
//   s = round(x + round(residual + post))    the same with post_residual_addition
//   y = round(s * rstd * (gemma ? 1 + weight : weight)),   rstd = 1 / sqrt(mean(s^2) + eps)
//
// round() is to x's dtype, nearest even; everything else is float32. y goes to `out`, s to `residual_out`.
#pragma once

#include "../core/op_info.h"
#include "parts.h"

namespace gemma_norm {

struct RmsNorm {
  using Source = InputSource;
  using Formula = formulas::Scale;
  static constexpr OperandRule kRules[] = {kXRule, kWeightRule, output(kOut, Use::kNew, kX)};
  static constexpr OperandRule kOutRules[] = {kXRule, kWeightRule, output(kOut, Use::kWritten, kX)};
  static constexpr OpInfo kInfos[] = {
      {"rms_norm", "rms_norm", "(Tensor x, Tensor weight, float eps=1e-6, bool gemma=False) -> Tensor", "rms_norm", kRules},
      {"rms_norm", "rms_norm.out", "(Tensor x, Tensor weight, float eps=1e-6, bool gemma=False, *, Tensor(a!) out) -> Tensor(a!)",
       "rms_norm without out", kOutRules},
  };
};

struct AddRmsNorm {
  using Source = ResidualSource;
  using Formula = formulas::Scale;
  static constexpr OperandRule kRules[] = {
      kXRule,
      kWeightRule,
      like_x(kResidual),
      optional(like_x(kPost)),
      output(kOut, Use::kNew, kX),
      output(kResidualOut, Use::kNew, kResidual),
  };
  static constexpr OperandRule kFusedRules[] = {
      kXRule,
      kWeightRule,
      like_x(kResidual),
      optional(like_x(kPost)),
      output(kOut, Use::kInPlace, kX),
      output(kResidualOut, Use::kInPlace, kResidual),
  };
  static constexpr OpInfo kInfos[] = {
      {"add_rms_norm", "add_rms_norm",
       "(Tensor x, Tensor residual, Tensor weight, float eps=1e-6, bool gemma=False, Tensor? post_residual_addition=None)"
       " -> (Tensor, Tensor)",
       "add_rms_norm", kRules},
      {"fused_add_rms_norm", "fused_add_rms_norm",
       "(Tensor(a!) x, Tensor(b!) residual, Tensor weight, float eps=1e-6, bool gemma=False, "
       "Tensor? post_residual_addition=None) -> ()",
       "add_rms_norm", kFusedRules},
  };
};

}  // namespace gemma_norm
