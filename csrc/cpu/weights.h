// The factors that rows are multiplied by. Part of row_kernel.h, with the same anonymous namespace.
//
// Each type has at<V>(i), the factors of the elements from i on, and rest_at<V>(i, rest), those of the last `rest`
// elements of a row.
#pragma once

#include <cstdint>

#include "rows.h"

namespace gemma_norm {
namespace {

// weight + offset in float32, computed from the weights in the caller's memory.
template <class T, class W>
struct StoredWeights {
  const W* weight;
  float offset;

  template <class V>
  [[gnu::always_inline]] V at(int64_t i) const {
    return sum<V>(weight + i);
  }
  template <class V>
  [[gnu::always_inline]] V rest_at(int64_t i, int64_t rest) const {
    W padded[kLanes] = {};
    copy(padded, weight + i, rest);
    return sum<V>(padded);
  }

 private:
  template <class V>
  [[gnu::always_inline]] V sum(const W* w) const {
    const V sum = V::load(w) + V::broadcast(offset);
    // A float32 weight can be a NaN whose fraction bits are all below those of bfloat16. Rounding it to bfloat16 with
    // integer arithmetic would give infinity. All NaNs are therefore replaced by the default NaN, and V::store need not
    // check for them.
    if constexpr (sizeof(W) > sizeof(T)) return sum.without_payload();
    return sum;
  }
};

// The factors if there is no weight.
struct Ones {
  template <class V>
  [[gnu::always_inline]] V at(int64_t) const {
    return V::broadcast(1);
  }
  template <class V>
  [[gnu::always_inline]] V rest_at(int64_t, int64_t) const {
    return V::broadcast(1);
  }
};

// The number of weights: those of a row, or of all groups of a row.
inline int64_t weight_count(const RowParams& p) { return p.strides[kWeight][1] ? p.hidden * p.sizes[1] : p.hidden; }

// The same factors as those of StoredWeights, computed beforehand and padded to whole vectors.
struct PreparedWeights {
  const float* factors;

  template <class V>
  [[gnu::always_inline]] V at(int64_t i) const {
    return V::load(factors + i);
  }
  template <class V>
  [[gnu::always_inline]] V rest_at(int64_t i, int64_t) const {
    return V::load(factors + i);
  }
};

template <class V, class T, class W>
PreparedWeights prepare(const StoredWeights<T, W>& weights, int64_t count, float* factors) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) weights.template at<V>(i).store(factors + i);
  if (i < count) weights.template rest_at<V>(i, count - i).store(factors + i);
  return {factors};
}

template <class V, class W>
constexpr bool kPacks = false;
template <class V>
constexpr bool kPacks<V, BFloat16> = V::kPacksBFloat16;

// Half as large as PreparedWeights: the 16-bit weights, padded to whole vectors, in an order that V converts quickly.
template <class W>
struct PackedWeights {
  const W* weight;
  float offset;

  template <class V>
  [[gnu::always_inline]] V at(int64_t i) const {
    return V::load_packed(weight + i) + V::broadcast(offset);
  }
  template <class V>
  [[gnu::always_inline]] V rest_at(int64_t i, int64_t) const {
    return at<V>(i);
  }
};

template <class V, class T, class W>
PackedWeights<W> pack(const StoredWeights<T, W>& weights, int64_t hidden, W* packed) {
  for (int64_t i = 0; i < hidden; i += kLanes) {
    W padded[kLanes] = {};
    copy(padded, weights.weight + i, hidden - i < kLanes ? hidden - i : kLanes);
    V::pack(padded, packed + i);
  }
  return {packed, weights.offset};
}

}  // namespace
}  // namespace gemma_norm
