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

#include "quant_overloads.h"
#include "rms_norm.h"
#include "variants.h"

namespace gemma_norm {

struct RmsNormQuant : Form<InputSource, formulas::Scale> {
  static constexpr bool kQuantizes = true;
  template <class Visit>
  static void with_form(const RowParams&, const Visit& visit) {
    visit(RmsNormQuant());
  }
  struct Own {
    static constexpr char kName[] = "rms_norm_quant", kDifferentiable[] = "rms_norm";
    static constexpr char kTensors[] = "Tensor x, Tensor? weight", kWeightDefault[] = "=None";
    static constexpr char kOptions[] = "float eps=1e-6, bool gemma=False, bool round_each_step=False";
    static constexpr OperandRule kInputs[] = {kXRule, optional(kWeightRule)};
    static constexpr OperandRule kOutputs[] = {{}};
  };
  static constexpr OpInfo kInfos[] = {QuantOverload<Own, false, false>::kInfo, QuantOverload<Own, true, false>::kInfo,
                                      QuantOverload<Own, false, true>::kInfo, QuantOverload<Own, true, true>::kInfo};
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
  struct Own : RmsNormQuant::Own {
    static constexpr char kName[] = "add_rms_norm_quant", kDifferentiable[] = "add_rms_norm";
    static constexpr char kTensors[] = "Tensor x, Tensor residual, Tensor? weight";
    static constexpr OperandRule kInputs[] = {kXRule, optional(kWeightRule), like_x(kResidual, DTypes::kXOrFloat32)};
    static constexpr OperandRule kOutputs[] = {output(kResidualOut, Use::kNew, kResidual, DTypes::kLikeResidual), {}};
  };
  struct Fused : Own {
    static constexpr char kName[] = "fused_add_rms_norm_quant";
    static constexpr char kTensors[] = "Tensor x, Tensor(a!) residual, Tensor? weight";
    static constexpr OperandRule kOutputs[] = {output(kResidualOut, Use::kInPlace, kResidual, DTypes::kLikeResidual),
                                               {}};
  };
  static constexpr OpInfo kInfos[] = {
      QuantOverload<Own, false, false>::kInfo,   QuantOverload<Own, true, false>::kInfo,
      QuantOverload<Own, false, true>::kInfo,    QuantOverload<Own, true, true>::kInfo,
      QuantOverload<Fused, false, false>::kInfo, QuantOverload<Fused, true, false>::kInfo,
      QuantOverload<Fused, false, true>::kInfo,  QuantOverload<Fused, true, true>::kInfo,
  };
};

}  // namespace gemma_norm
