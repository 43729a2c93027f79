// Products and sums of two elements each of 16 bits, computed in float32 and rounded. Include it after unpack() and
// pack() are declared.
#pragma once

namespace gemma_norm::device {

template <class T, class Operation>
GEMMA_NORM_DEVICE uint32_t of_pairs(uint32_t a, uint32_t b, const Operation& operation) {
  float x[2], y[2];
  unpack<T>(a, x);
  unpack<T>(b, y);
  const float result[2] = {operation(x[0], y[0]), operation(x[1], y[1])};
  return pack<T>(result);
}
template <class T>
GEMMA_NORM_DEVICE uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  return of_pairs<T>(a, b, [](float x, float y) { return x * y; });
}
template <class T>
GEMMA_NORM_DEVICE uint32_t add_pairs(uint32_t a, uint32_t b) {
  return of_pairs<T>(a, b, [](float x, float y) { return add(x, y); });
}

}  // namespace gemma_norm::device
