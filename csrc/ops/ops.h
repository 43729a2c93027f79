// The table of operators. A new operator is a file in this folder and a name in Ops below.
#pragma once

#include "gated_rms_norm.h"
#include "gated_rms_norm_backward.h"
#include "gated_rms_norm_quant.h"
#include "qk_norm_rope.h"
#include "rms_norm.h"
#include "rms_norm_add_rms_norm.h"
#include "rms_norm_backward.h"
#include "rms_norm_quant.h"

namespace gemma_norm {

// Each type of the list has kernels of its own. They serve all operators of its kInfos, such as rms_norm and
// rms_norm.out.
template <class... Op>
struct OpList {
  static constexpr int kCount = sizeof...(Op);

  template <class One>
  static constexpr bool has(const OpInfo* info) {
    return info >= One::kInfos && info < One::kInfos + sizeof One::kInfos / sizeof One::kInfos[0];
  }

  // Calls visit(op) for each type.
  template <class Visit>
  static void each(const Visit& visit) {
    (visit(Op{}), ...);
  }
  template <class Visit>
  static void each_info(const Visit& visit) {
    const auto visit_infos = [&](auto op) {
      for (const OpInfo& info : op.kInfos) visit(info);
    };
    (visit_infos(Op{}), ...);
  }

  // The index of the type that has this info; -1 if none has.
  static int index(const OpInfo* info) {
    int i = 0, found = -1;
    ((found = has<Op>(info) ? i : found, ++i), ...);
    return found;
  }

  // Calls visit(op) for the type that has this info.
  template <class Visit>
  static void visit(const OpInfo* info, const Visit& visit) {
    const auto visit_if = [&](auto op) {
      if (has<decltype(op)>(info)) visit(op);
    };
    (visit_if(Op{}), ...);
  }
};

using ForwardOps =
    OpList<RmsNorm, AddRmsNorm, GatedRmsNorm, RmsNormAddRmsNorm, RmsNormQuant, AddRmsNormQuant, GatedRmsNormQuant>;
using Ops = OpList<RmsNorm, AddRmsNorm, GatedRmsNorm, RmsNormAddRmsNorm, RmsNormQuant, AddRmsNormQuant,
                   GatedRmsNormQuant, RmsNormBackward, GatedRmsNormBackward, QkNormRope>;

// Writes the message for a call whose operator is not in the table, and returns kInvalidArgument.
Status no_such_operator(const Call& call, Message* message);

}  // namespace gemma_norm
