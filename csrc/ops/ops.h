// The table of operators. A new one is a file in this folder and a name in this list.
#pragma once

#include <iterator>

#include "rms_norm.h"

namespace gemma_norm {

// Each type has kernels of its own, which serve all of its kInfos.
template <class... Op>
struct OpList {
  static constexpr int kCount = sizeof...(Op);

  template <class Visit>
  static void each_info(const Visit& visit) {
    const auto visit_infos = [&](auto op) {
      for (const OpInfo& info : op.kInfos) visit(info);
    };
    (visit_infos(Op{}), ...);
  }

  // Calls visit(op) for the one whose info this is.
  template <class Visit>
  static void visit(const OpInfo* info, const Visit& visit) {
    const auto visit_if = [&](auto op) {
      if (info >= std::begin(op.kInfos) && info < std::end(op.kInfos)) visit(op);
    };
    (visit_if(Op{}), ...);
  }
};

using Ops = OpList<RmsNorm, AddRmsNorm>;

}  // namespace gemma_norm
