// Runs a case on a target, and checks all that docs/contract.md says of it. Does not know GoogleTest.
#pragma once

#include <initializer_list>
#include <string>
#include <utility>

#include "reference.h"
#include "target.h"

namespace gemma_norm {

// Values for the case. Rows of an expanded tensor share memory, hence are equal.
Tensors make_inputs(const Case& c);

// Returns the outputs. If anything goes wrong, `error` says what: a status, or a changed byte that belongs to no
// output.
Tensors run_case(Target& target, const Case& c, const Tensors& inputs, std::string* error);

// "" if the results are right, and if each row has the bits that it has in a call of plain_case() with other rows
// around it; else what is wrong. With `alike`, the results are right if that target has the same bits: whoever gives
// one checks it too, without another beside it.
std::string check_case(Target& target, const Case& c, Target* alike = nullptr);

// The same for gradients: "" if they are right, and have the same bits again, in other orders and pieces. With `alike`,
// that target is the one to have them again, and they are right if it is, as above.
std::string check_gradients(Target& target, const Case& c, Target* alike = nullptr);

// "" if the outputs of both are the same, bit for bit, else the first difference.
std::string compare_outputs(const Case& c, const Tensors& want, const Tensors& got);

// A call of an operator with these tensors, and no others.
Call make_call(const OpInfo* op, std::initializer_list<std::pair<Operand, const Tensor*>> tensors,
               const Options& options = {});

// "" if a call of the case's rows, `times` times one after another, gives the same bits each time.
std::string check_repeated(Target& target, const Case& c, int64_t times);

// Adds elements to a hash (FNV-1a). All NaNs count as the same.
constexpr uint64_t kHashOfNothing = 0xcbf29ce484222325;
void add_to_hash(DType dtype, const Packed& elements, uint64_t* hash);

}  // namespace gemma_norm
