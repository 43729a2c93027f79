// The hidden sizes and dtypes for which every plan is tested.
#pragma once

#include <cstdint>
#include <vector>

#include "gemma_norm.h"

namespace gemma_norm {

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

inline const std::vector<int64_t>& hidden_sizes() {
  static const auto all = [] {
    std::vector<int64_t> sizes(20000);
    for (size_t i = 0; i < sizes.size(); ++i) sizes[i] = i + 1;
    for (const int64_t size : {32768, 32769, 65535, 65536, 65537, 100003, 262143, 262144, 1000000, 16777216, 16777219})
      sizes.push_back(size);
    return sizes;
  }();
  return all;
}

}  // namespace gemma_norm
