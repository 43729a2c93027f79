// What quantising needs, without instructions for it: four floats in 8 bits each, and maxima.
#pragma once

#include "../core/quantized.h"

namespace gemma_norm::device {

GEMMA_NORM_DEVICE uint32_t quantize_by_hand(const float (&f)[4], const QuantizedFormat& format) {
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) word |= quantized::bits_of(f[i], format) << 8 * i;
  return word;
}

// The bits of positive floats are in the order of the numbers, and those of a NaN are greater than all others.
GEMMA_NORM_DEVICE float max_magnitude_by_bits(float a, float b) {
  const uint32_t a_bits = as_bits(a) & 0x7fffffffu, b_bits = as_bits(b) & 0x7fffffffu;
  return as_float(a_bits > b_bits ? a_bits : b_bits);
}

GEMMA_NORM_DEVICE uint32_t max_by_swaps(uint32_t v, int lanes) {
#pragma unroll
  for (int step = 1; step < wave_width(); step *= 2) {
    if (step >= lanes) continue;
    const uint32_t other = as_bits(value_of_lane(step, as_float(v)));
    v = v > other ? v : other;
  }
  return v;
}

}  // namespace gemma_norm::device
