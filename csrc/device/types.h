// Storage types, the same on every platform: bits only, conversions are the device layer's.
#pragma once

#include <cstdint>

namespace gemma_norm {

struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

struct alignas(16) Words {
  uint32_t word[4];
};

// In the shared memory of a block of a cluster: a number from each of the cluster's blocks.
struct alignas(16) Inbox {
  float number[8];
  uint64_t barrier;
};

}  // namespace gemma_norm
