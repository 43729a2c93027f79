// Runs a case on a target and checks all that the numerical contract says of it. Knows nothing of GoogleTest.
#pragma once

#include <string>

#include "reference.h"

namespace gemma_norm {

// Values for the case; in an expanded tensor, rows that share memory are equal.
Tensors make_inputs(const Case& c);

// `error` says what went wrong, if anything did: a status, or a byte changed that is no output's.
Tensors run_case(Target& target, const Case& c, const Tensors& inputs, std::string* error);

// "" if the results are right, and each row's bits those of the same row in a plain, packed, aligned call of other rows, else
// what is wrong.
std::string check_case(Target& target, const Case& c);

// "" if the case's rows, written `times` times one after another into one call, come out the same each time.
std::string check_repeated(Target& target, const Case& c, int64_t times);

// FNV-1a, of more and more elements. A NaN is any NaN.
constexpr uint64_t kHashOfNothing = 0xcbf29ce484222325;
void add_to_hash(DType dtype, const Packed& elements, uint64_t* hash);

}  // namespace gemma_norm
