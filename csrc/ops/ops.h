// The table of operators. A new one is a file in this folder and a name in this list.
#pragma once

#include "rms_norm.h"

namespace gemma_norm {

template <class... Op>
struct OpList {
  static constexpr int kCount = sizeof...(Op);

  // Calls visit(op, info) for every operator of torch.
  template <class Visit>
  static void each(const Visit& visit) {
    const auto visit_infos = [&](auto op) {
      for (const OpInfo& info : op.kInfos) visit(op, info);
    };
    (visit_infos(Op{}), ...);
  }
};

using Ops = OpList<RmsNorm, AddRmsNorm>;

}  // namespace gemma_norm
