// Whether two strided tensors share memory. The answer is exact for any strides. It takes a few comparisons if the two
// address ranges are disjoint, the usual case.
#pragma once

#include "../gemma_norm.h"

namespace gemma_norm {

// Both tensors have the same elements at the same addresses.
bool same_memory(const Tensor& a, const Tensor& b);

// Some byte belongs to both tensors. The last dimension must be contiguous, and no dimension empty.
bool overlap(const Tensor& a, const Tensor& b);

// Two elements of the tensor share a byte, as in an expanded tensor. The same conditions.
bool overlaps_itself(const Tensor& a);

}  // namespace gemma_norm
