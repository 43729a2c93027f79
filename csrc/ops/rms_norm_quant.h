// RMSNorm whose result is quantised, for a matrix product in 8 bits:
//
//   s, y = those of rms_norm.h, but y is not rounded to x's dtype, unless round_first is set
//   scale = max(|y|) / largest               of each group of scale_group_size elements, or of the row
//   q = round(y / scale)                     as y * (1 / scale); limited to the format's range
//
// The largest number of the format is 448 (float8_e4m3fn), 240 (float8_e4m3fnuz), 57344 (float8_e5m2) or 127 (int8).
// With scale_ub, the maximum is at most that. With scale_ue8m0, the scale is rounded up to a power of two. The overload
// `static` is given one scale for all elements. core/quantized.h has the rounding.
#pragma once

#include "../core/op_info.h"
#include "rms_norm.h"
#include "variants.h"

namespace gemma_norm {

constexpr OperandRule kGivenScaleRule = {kScale, Extent::kOne, DTypes::kFloat32};
constexpr OperandRule kScaleBoundRule = optional(named("scale_ub", kGivenScaleRule));
constexpr OperandRule kQuantizedRule = {kOut, Extent::kLikeX, DTypes::kQuantized, Use::kNew, kX};
constexpr OperandRule kScalesRule = {kScaleOut, Extent::kScales, DTypes::kFloat32, Use::kNew};

struct RmsNormQuant : Form<InputSource, formulas::Scale> {
  static constexpr bool kQuantizes = true;
  template <class Visit>
  static void with_form(const RowParams&, const Visit& visit) {
    visit(RmsNormQuant());
  }
  static constexpr OperandRule kRules[] = {kXRule, optional(kWeightRule), kScaleBoundRule, kQuantizedRule, kScalesRule};
  static constexpr OperandRule kStaticRules[] = {kXRule, optional(kWeightRule), kGivenScaleRule, kQuantizedRule};
  static constexpr OpInfo kInfos[] = {
      {"rms_norm_quant", "rms_norm_quant",
       "(Tensor x, Tensor? weight=None, float eps=1e-6, bool gemma=False, bool round_each_step=False, *, "
       "ScalarType? dtype=None, int? scale_group_size=None, Tensor? scale_ub=None, bool round_first=False, "
       "bool scale_ue8m0=False, bool column_major_scale=False) -> (Tensor, Tensor)",
       "rms_norm", kRules},
      {"rms_norm_quant", "rms_norm_quant.static",
       "(Tensor x, Tensor? weight, Tensor scale, float eps=1e-6, bool gemma=False, bool round_each_step=False, *, "
       "ScalarType? dtype=None, bool round_first=False) -> Tensor",
       "rms_norm", kStaticRules},
  };
};

// The form of AddRmsNormQuant for a float32 residual and a 16-bit x.
struct AddToFloat32RmsNormQuant : AddToFloat32RmsNorm {
  static constexpr bool kQuantizes = true;
};

struct AddRmsNormQuant : Form<ResidualSource, formulas::Scale> {
  static constexpr bool kQuantizes = true;
  template <class Visit>
  static void with_form(const RowParams& p, const Visit& visit) {
    p.dtypes[kResidual] == p.dtypes[kX] ? visit(AddRmsNormQuant()) : visit(AddToFloat32RmsNormQuant());
  }
  static constexpr OperandRule kResidualRule = like_x(kResidual, DTypes::kXOrFloat32);
  static constexpr OperandRule kSumRule = output(kResidualOut, Use::kNew, kResidual, DTypes::kLikeResidual);
  static constexpr OperandRule kSumInPlaceRule = output(kResidualOut, Use::kInPlace, kResidual, DTypes::kLikeResidual);
  static constexpr OperandRule kRules[] = {kXRule,         optional(kWeightRule), kResidualRule, kScaleBoundRule,
                                           kQuantizedRule, kScalesRule,           kSumRule};
  static constexpr OperandRule kStaticRules[] = {kXRule,          optional(kWeightRule), kResidualRule,
                                                 kGivenScaleRule, kQuantizedRule,        kSumRule};
  static constexpr OperandRule kFusedRules[] = {kXRule,         optional(kWeightRule), kResidualRule,  kScaleBoundRule,
                                                kQuantizedRule, kScalesRule,           kSumInPlaceRule};
  static constexpr OperandRule kFusedStaticRules[] = {kXRule,          optional(kWeightRule), kResidualRule,
                                                      kGivenScaleRule, kQuantizedRule,        kSumInPlaceRule};
  static constexpr OpInfo kInfos[] = {
      {"add_rms_norm_quant", "add_rms_norm_quant",
       "(Tensor x, Tensor residual, Tensor? weight=None, float eps=1e-6, bool gemma=False, bool round_each_step=False, "
       "*, ScalarType? dtype=None, int? scale_group_size=None, Tensor? scale_ub=None, bool round_first=False, "
       "bool scale_ue8m0=False, bool column_major_scale=False) -> (Tensor, Tensor, Tensor)",
       "add_rms_norm", kRules},
      {"add_rms_norm_quant", "add_rms_norm_quant.static",
       "(Tensor x, Tensor residual, Tensor? weight, Tensor scale, float eps=1e-6, bool gemma=False, "
       "bool round_each_step=False, *, ScalarType? dtype=None, bool round_first=False) -> (Tensor, Tensor)",
       "add_rms_norm", kStaticRules},
      {"fused_add_rms_norm_quant", "fused_add_rms_norm_quant",
       "(Tensor x, Tensor(a!) residual, Tensor? weight=None, float eps=1e-6, bool gemma=False, "
       "bool round_each_step=False, *, ScalarType? dtype=None, int? scale_group_size=None, "
       "Tensor? scale_ub=None, bool round_first=False, bool scale_ue8m0=False, bool column_major_scale=False) "
       "-> (Tensor, Tensor)",
       "add_rms_norm", kFusedRules},
      {"fused_add_rms_norm_quant", "fused_add_rms_norm_quant.static",
       "(Tensor x, Tensor(a!) residual, Tensor? weight, Tensor scale, float eps=1e-6, bool gemma=False, "
       "bool round_each_step=False, *, ScalarType? dtype=None, bool round_first=False) -> Tensor",
       "add_rms_norm", kFusedStaticRules},
  };
};

}  // namespace gemma_norm
