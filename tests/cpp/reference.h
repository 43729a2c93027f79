// The numerical contract in double precision (csrc/ops/rms_norm.h, gated_rms_norm.h), and how far from it a device may be.
#pragma once

#include <string>

#include "operand.h"

namespace gemma_norm {

// The tensors of a case, those that it has not empty: what it reads, or what it has written.
struct Tensors {
  Packed of[kOperands];
  Packed& operator[](Operand o) { return of[o]; }
  const Packed& operator[](Operand o) const { return of[o]; }
};

// "" if the sum is right to the bit and its norm to its roundings and float32's arithmetic, else the first element that is not.
std::string compare_with_reference(const Case& c, const Tensors& inputs, const Tensors& got);

// "" if the elements are the same bit for bit (a NaN is any NaN), else the first that differs.
std::string compare_bits(DType dtype, int64_t hidden, const Packed& want, const Packed& got);

}  // namespace gemma_norm
