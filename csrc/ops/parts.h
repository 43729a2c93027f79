// The parts of operators: sources, which say how s is computed, and formulas, which say what is computed from s once
// rstd is known. gpu/policies.cuh and cpu/row_kernel.h implement the sources; the formulas are written here, once for
// GPUs and CPUs.
#pragma once

#include "../device/anywhere.h"

namespace gemma_norm {

// s = x.
struct InputSource {
  static constexpr bool kTwoRows = false, kNormsX = false;
};

// s = round(x + residual), or round(x + round(residual + post)) if the call has a post. It is stored in residual_out.
struct ResidualSource {
  static constexpr bool kTwoRows = true, kNormsX = false;
};

// s = round(n + residual), where n = round(Formula(x, rstd(x), post_weight)), the norm of x. It is stored in
// residual_out. A row has two exchanges: the squares of x, then those of s. s has x's dtype.
struct NormedResidualSource {
  static constexpr bool kTwoRows = true, kNormsX = true;
};

// s = x * activation(gate) in float32, or x if the call has no gate. It is not stored.
struct GatedSource {
  static constexpr bool kTwoRows = true, kNormsX = false;
};

// V is a float (an element in a GPU's lane) or a vector of floats (on a CPU). Each operation is rounded as IEEE 754
// says; a product must not be contracted with a sum. Several instruction sets instantiate these templates. Their types
// V are in unnamed namespaces, so each instantiation has a name of its own, and the linker cannot replace one by
// another.
namespace formulas {

// `round` rounds to x's dtype with round_each_step, and otherwise does nothing. `factor` is weight, 1 + weight, or 1.

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
  GEMMA_NORM_ANYWHERE static V apply(const V& s, const V& rstd, const V& factor, const V& activation,
                                     const Round& round) {
    return round(round(s * rstd) * factor) * activation;
  }
};

}  // namespace formulas
}  // namespace gemma_norm
