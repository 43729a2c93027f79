// The numerical contract in double precision (DESIGN, section 3), and how far from it a device may be.
#pragma once

#include <string>

#include "operand.h"

namespace gemma_norm {

struct Inputs {
  Packed x, residual, post, weight;  // those that the case has not are empty
};

struct Outputs {
  Packed out, sum;  // sum is empty without residual
};

// "" if the sum is right to the bit and its norm to one rounding and float32's arithmetic, else the first element that is not.
std::string compare_with_reference(const Case& c, const Inputs& inputs, const Outputs& got);

// "" if the elements are the same bit for bit (a NaN is any NaN), else the first that differs.
std::string compare_bits(DType dtype, int64_t hidden, const Packed& want, const Packed& got);

}  // namespace gemma_norm
