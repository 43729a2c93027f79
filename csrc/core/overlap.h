// Do two strided tensors share memory? Exact for any strides, and a few compares when their extents are apart.
#pragma once

#include "../gemma_norm.h"

namespace gemma_norm {

// The same bytes in the same order.
bool same_memory(const Tensor& a, const Tensor& b);

// Some byte belongs to both. A last dimension of stride 1 is taken for granted, as is a size of at least 1 everywhere.
bool overlap(const Tensor& a, const Tensor& b);

// Two indices of the tensor name the same byte (an expanded tensor, for one).
bool overlaps_itself(const Tensor& a);

}  // namespace gemma_norm
