// The formulas of csrc/ops/rms_norm_backward.h and gated_rms_norm_backward.h in double precision, and how far from them
// a device may be.
#pragma once

#include <string>

#include "reference.h"

namespace gemma_norm {

// "" if the gradients are as near to the exact ones as their rounding and float32's arithmetic allow; else the first
// element for which that is not so.
std::string compare_gradients_with_reference(const Case& c, const Tensors& inputs, const Tensors& got);

}  // namespace gemma_norm
