// The norm of x, added to the residual stream, and the norm of the sum: what stands between two blocks of a model that
// normalises both what a block takes and what it gives (Gemma 2 to 4, GLM-4).
//
//   n = rms_norm(x, post_weight)
//   s = round(residual + n)
//   y = rms_norm(s, weight)
//
// rms_norm is that of rms_norm.h, with its roundings, and its options hold for both norms. So the bits are those of
// rms_norm followed by add_rms_norm. y is written to `out`, s to `residual_out`; n is not stored.
#pragma once

#include "../core/op_info.h"
#include "variants.h"

namespace gemma_norm {

struct RmsNormAddRmsNorm : Form<NormedResidualSource, formulas::Scale> {
  static constexpr bool kWeightIsOptional = false;
  template <class Visit>
  static void with_form(const RowParams&, const Visit& visit) {
    visit(RmsNormAddRmsNorm());
  }
  static constexpr OperandRule kRules[] = {
      kXRule,
      kWeightRule,
      like_x(kResidual),
      like_weight(kPostWeight),
      output(kOut, Use::kNew, kX),
      output(kResidualOut, Use::kNew, kResidual),
  };
  static constexpr OperandRule kFusedRules[] = {
      kXRule,
      kWeightRule,
      like_x(kResidual),
      like_weight(kPostWeight),
      output(kOut, Use::kInPlace, kX),
      output(kResidualOut, Use::kInPlace, kResidual),
  };
  static constexpr OpInfo kInfos[] = {
      {"rms_norm_add_rms_norm", "rms_norm_add_rms_norm",
       "(Tensor x, Tensor residual, Tensor post_weight, Tensor weight, float eps=1e-6, bool gemma=False, "
       "bool round_each_step=False) -> (Tensor, Tensor)",
       "rms_norm_add_rms_norm", kRules},
      {"fused_rms_norm_add_rms_norm", "fused_rms_norm_add_rms_norm",
       "(Tensor(a!) x, Tensor(b!) residual, Tensor post_weight, Tensor weight, float eps=1e-6, bool gemma=False, "
       "bool round_each_step=False) -> ()",
       "rms_norm_add_rms_norm", kFusedRules},
  };
};

}  // namespace gemma_norm
