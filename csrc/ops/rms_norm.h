// RMSNorm, plain or fused with the addition of the residual stream:
//
//   s = x                                    rms_norm
//   s = round(x + residual)                  add_rms_norm, fused_add_rms_norm
//   s = round(x + round(residual + post))    the same with post_residual_addition
//   y = round(s * rstd * (gemma ? 1 + weight : weight)),   rstd = 1 / sqrt(mean(s^2) + eps)
//   y = round(round(s * rstd) * weight)      with round_each_step
//
// round() rounds to nearest even: y to x's dtype, and s to the residual's, which may be float32. All arithmetic is in
// float32. y is written to `out`, s to `residual_out`.
#pragma once

#include "../core/op_info.h"
#include "variants.h"

namespace gemma_norm {

struct RmsNorm : Form<InputSource, formulas::Scale> {
  template <class Visit>
  static void with_form(const RowParams&, const Visit& visit) {
    visit(RmsNorm());
  }
  static constexpr OperandRule kRules[] = {kXRule, optional(kWeightRule), output(kOut, Use::kNew, kX)};
  static constexpr OperandRule kOutRules[] = {kXRule, optional(kWeightRule), output(kOut, Use::kWritten, kX)};
  static constexpr OpInfo kInfos[] = {
      {"rms_norm", "rms_norm",
       "(Tensor x, Tensor? weight=None, float eps=1e-6, bool gemma=False, bool round_each_step=False) -> Tensor",
       "rms_norm", kRules},
      {"rms_norm", "rms_norm.out",
       "(Tensor x, Tensor? weight=None, float eps=1e-6, bool gemma=False, bool round_each_step=False, *, Tensor(a!) "
       "out)"
       " -> Tensor(a!)",
       "rms_norm without out", kOutRules},
  };
};

// The form of AddRmsNorm for a float32 residual and a 16-bit x.
struct AddToFloat32RmsNorm : Form<ResidualSource, formulas::Scale> {
  static constexpr bool kFloat32Rows = true, kTakesFloat32 = false;
};

struct AddRmsNorm : Form<ResidualSource, formulas::Scale> {
  template <class Visit>
  static void with_form(const RowParams& p, const Visit& visit) {
    p.dtypes[kResidual] == p.dtypes[kX] ? visit(AddRmsNorm()) : visit(AddToFloat32RmsNorm());
  }
  static constexpr OperandRule kRules[] = {
      kXRule,
      optional(kWeightRule),
      like_x(kResidual, DTypes::kXOrFloat32),
      optional(like_x(kPost, DTypes::kLikeResidual)),
      output(kOut, Use::kNew, kX),
      output(kResidualOut, Use::kNew, kResidual, DTypes::kLikeResidual),
  };
  static constexpr OperandRule kFusedRules[] = {
      kXRule,
      optional(kWeightRule),
      like_x(kResidual, DTypes::kXOrFloat32),
      optional(like_x(kPost, DTypes::kLikeResidual)),
      output(kOut, Use::kInPlace, kX),
      output(kResidualOut, Use::kInPlace, kResidual, DTypes::kLikeResidual),
  };
  static constexpr OpInfo kInfos[] = {
      {"add_rms_norm", "add_rms_norm",
       "(Tensor x, Tensor residual, Tensor? weight=None, float eps=1e-6, bool gemma=False, "
       "Tensor? post_residual_addition=None, bool round_each_step=False) -> (Tensor, Tensor)",
       "add_rms_norm", kRules},
      {"fused_add_rms_norm", "fused_add_rms_norm",
       "(Tensor(a!) x, Tensor(b!) residual, Tensor? weight=None, float eps=1e-6, bool gemma=False, "
       "Tensor? post_residual_addition=None, bool round_each_step=False) -> ()",
       "add_rms_norm", kFusedRules},
  };
};

}  // namespace gemma_norm
