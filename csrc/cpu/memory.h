// How memory is written and read ahead. Part of row_kernel.h and backward_kernel.h, with the same anonymous namespace.
#pragma once

#include <cstdint>

#include "../core/row_params.h"
#include "rows.h"

namespace gemma_norm {
namespace {

// An output of at least this many bytes, or of which one thread writes at least the second number, is written around
// the caches by nontemporal stores. Most of it would leave the caches before anybody reads it, and an ordinary store
// first reads the memory that it overwrites. A norm followed by a copy then took 10 % less time at kNontemporalBytes.
// At half that size they took 14 % less if one thread wrote all of it, but 40 % more if two threads did; hence the two
// numbers (T75).
constexpr int64_t kNontemporalBytes = int64_t{16} << 20;
constexpr int64_t kNontemporalBytesOfThread = kNontemporalBytes / 2;

// Whether to write an output around the caches: it must be large, must not be an input, which is in the caches already,
// and its rows must consist of whole cache lines.
template <class T>
bool worth_nontemporal(const RowParams& p, int64_t rows, Operand output) {
  constexpr int64_t kItem = sizeof(T);
  const void* const out = p.data[output];
  const int64_t row_bytes = p.hidden * kItem;
  if (p.rows * row_bytes < kNontemporalBytes && rows * row_bytes < kNontemporalBytesOfThread) return false;
  for (int o = 0; o < kOperands; ++o)
    if (o != output && out == p.data[o]) return false;
  bool aligned = reinterpret_cast<uintptr_t>(out) % kCacheLine == 0;
  for (const int64_t stride : p.strides[output]) aligned = aligned && stride * kItem % kCacheLine == 0;
  return aligned;
}

// Prefetches the kLanes elements from i on.
template <class T>
[[gnu::always_inline]] inline void prefetch(const T* row, int64_t i) {
  constexpr int64_t kLine = kCacheLine / static_cast<int64_t>(sizeof(T));
  for (int64_t j = 0; j < kLanes; j += kLine) __builtin_prefetch(row + i + j, 0, 2);
}

}  // namespace
}  // namespace gemma_norm
