// The calls of the backward operators on which every device's kernels are tried.
#pragma once

#include <vector>

#include "cases.h"

namespace gemma_norm {

// The dtypes of x and dout: every pair that there is.
constexpr DType kGradientDTypes[][2] = {{DType::kFloat32, DType::kFloat32},
                                        {DType::kFloat16, DType::kFloat16},
                                        {DType::kBFloat16, DType::kBFloat16},
                                        {DType::kFloat32, DType::kFloat16},
                                        {DType::kFloat32, DType::kBFloat16}};

// The dtypes of x and dout that the gated norm has, and how many there are. Its dout has x's dtype.
constexpr size_t kGatedGradientDTypes = 3;

// So many contiguous, aligned rows of normal values, for tests to change. The weight has x's dtype.
Case simple_gradient_case(DType dtype, DType dout_dtype, int64_t rows, int64_t hidden);

// Few rows, of the gated norm or of the others: for each pair of dtypes, one or two cases at each hidden size at which
// a GPU's plan takes another kernel, at its neighbours, and at some small ones. What else there is to choose is random,
// or taken in turns.
std::vector<Case> few_rows_gradient_cases(bool gated);

// For each kernel of a GPU, and for aligned rows and others: so many rows that every block has at least two steps of
// its loop behind it when it comes to the last ones, of which there are too few for all blocks. (Not the gated norm's
// longest rows.)
std::vector<Case> many_rows_gradient_cases(bool gated);
// Of each dtype, and of each kernel for which few rows have a kernel of their own: so many rows that a block has two.
std::vector<Case> two_rows_gradient_cases(bool gated);
// Few rows of a group, but so many groups that a block has two.
std::vector<Case> grouped_gradient_cases();

// All of these.
std::vector<Case> gradient_cases();

}  // namespace gemma_norm
