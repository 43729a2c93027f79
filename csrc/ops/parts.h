// The parts that operators are made of: where s comes from, and what is made of it once 1 / rms is known. Each is written once, for
// GPU kernels (gpu/policies.cuh) and CPU kernels (cpu/row_kernel.h) alike.
#pragma once

#include "../device/anywhere.h"

namespace gemma_norm {

// s is x.
struct InputSource {
  static constexpr bool kTwoRows = false;
};

// s = round(x + residual), or round(x + round(residual + post)) if there is a post. It is stored in residual_out.
struct ResidualSource {
  static constexpr bool kTwoRows = true;
};

// Formulas. V is a float (an element in a GPU's lane) or a vector of them (on a CPU). Each operation rounds by itself, as IEEE
// says: no product may be contracted with a sum. Several instruction sets instantiate these templates. Each V is a type in an
// unnamed namespace, so every instantiation has a name of its own and the linker cannot replace one by another.
namespace formulas {

// The norm, scaled. `factor` is the weight, or 1 + weight.
struct Scale {
  template <class V>
  GEMMA_NORM_ANYWHERE static V apply(V s, V rstd, V factor) {
    return s * rstd * factor;
  }
};

}  // namespace formulas
}  // namespace gemma_norm
