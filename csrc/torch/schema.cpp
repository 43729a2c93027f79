// Defines the operators' schemas. This is in the CPU library, because that is always loaded, and before the others.
#include <torch/csrc/stable/library.h>

#include <string>

#include "../ops/ops.h"

STABLE_TORCH_LIBRARY(gemma_norm, m) {
  gemma_norm::Ops::each_info(
      [&](const gemma_norm::OpInfo& op) { m.def((std::string(op.torch_name) + op.schema).c_str()); });
}
