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

// s = x * activation(gate) in float32, or x if there is no gate. It is stored nowhere.
struct GatedSource {
  static constexpr bool kTwoRows = true;
};

// Formulas. V is a float (an element in a GPU's lane) or a vector of them (on a CPU). Each operation rounds by itself, as IEEE
// says: no product may be contracted with a sum. Several instruction sets instantiate these templates. Each V is a type in an
// unnamed namespace, so every instantiation has a name of its own and the linker cannot replace one by another.
namespace formulas {

// `round` is to x's dtype, or nothing where a call rounds once, at the end. `factor` is the weight, 1 + weight, or 1.

struct Scale {
  static constexpr bool kGated = false;
  template <class V, class Round>
  GEMMA_NORM_ANYWHERE static V apply(const V& s, const V& rstd, const V& factor, const Round& round) {
    return round(s * rstd) * factor;
  }
};

struct ScaleAndGate {
  static constexpr bool kGated = true;
  template <class V, class Round>
  GEMMA_NORM_ANYWHERE static V apply(const V& s, const V& rstd, const V& factor, const V& activation, const Round& round) {
    return round(round(s * rstd) * factor) * activation;
  }
};

}  // namespace formulas
}  // namespace gemma_norm
