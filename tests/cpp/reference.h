// docs/contract.md, "Definition" and "The gated norm", in double precision, and how far from it a device may be.
#pragma once

#include <string>
#include <vector>

#include "operand.h"

namespace gemma_norm {

// What a case reads, or what it has written. A tensor that the case has not is empty.
struct Tensors {
  Packed of[kOperands];
  Packed& operator[](Operand o) { return of[o]; }
  const Packed& operator[](Operand o) const { return of[o]; }
};

// The elements as numbers.
std::vector<double> values_of(DType dtype, const Packed& elements);

// "<what>[<row>, <column>] must be <want>, got <got>".
std::string difference(const char* what, int64_t row, int64_t column, double want, double got);

// "" if the sum has the right bits, and its norm is as near to the exact one as its roundings and float32's arithmetic
// allow; else the first element for which that is not so.
std::string compare_with_reference(const Case& c, const Tensors& inputs, const Tensors& got);

// "" if the elements are the same bit for bit, all NaNs counting as the same; else the first that differs.
std::string compare_bits(DType dtype, int64_t hidden, const Packed& want, const Packed& got);

}  // namespace gemma_norm
