// RMSNorm with a gate whose result is quantised: y is that of gated_rms_norm.h, but not rounded to x's dtype, unless
// round_first is set. The scales and q are those of rms_norm_quant.h. A scale belongs to elements of one group of
// group_size.
#pragma once

#include "gated_rms_norm.h"
#include "quant_overloads.h"

namespace gemma_norm {

// The form without norm_before_gate: the input is gated, then normalised.
struct GatedInputRmsNormQuant : GatedInputRmsNorm {
  static constexpr bool kQuantizes = true;
};

struct GatedRmsNormQuant : Form<InputSource, formulas::ScaleAndGate> {
  static constexpr bool kWeightIsOptional = false, kGemma = false, kGroups = true, kQuantizes = true;
  template <class Visit>
  static void with_form(const RowParams& p, const Visit& visit) {
    p.norm_before_gate ? visit(GatedRmsNormQuant()) : visit(GatedInputRmsNormQuant());
  }
  struct Own {
    static constexpr char kName[] = "gated_rms_norm_quant", kDifferentiable[] = "gated_rms_norm";
    static constexpr char kTensors[] = "Tensor x, Tensor? gate, Tensor weight", kWeightDefault[] = "";
    static constexpr char kOptions[] =
        "float eps=1e-6, bool sigmoid=False, bool norm_before_gate=True, int? group_size=None, "
        "bool round_each_step=False";
    static constexpr OperandRule kInputs[] = {kXRule, kWeightRule, optional(like_x(kGate))};
    static constexpr OperandRule kOutputs[] = {{}};
  };
  static constexpr OpInfo kInfos[] = {QuantOverload<Own, false, false>::kInfo, QuantOverload<Own, true, false>::kInfo,
                                      QuantOverload<Own, false, true>::kInfo, QuantOverload<Own, true, true>::kInfo};
};

}  // namespace gemma_norm
