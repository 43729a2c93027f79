// Storage types, the same on every platform. They hold bits; the device layer converts them (platform.h).
#pragma once

#include <cstdint>

namespace gemma_norm {

struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

struct alignas(16) Vector16 {
  uint32_t word[4];
};
struct alignas(8) Vector8 {
  uint32_t word[2];
};

}  // namespace gemma_norm
