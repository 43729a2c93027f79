// How a thread finds its part of a row: where the row starts, which elements a slot owns, and how they are converted to
// floats.
#pragma once

#include <type_traits>

#include "../core/row_params.h"
#include "../device/platform.h"
#include "tuning.h"

namespace gemma_norm::gpu {

// Elements of T in a 16-byte vector, and in a 32-bit word.
template <class T>
constexpr int kItems = kVectorBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int kWordItems = 4 / static_cast<int>(sizeof(T));

// A division by a number from 1 to 2^31 - 1 that the host knows, which takes two multiplications.
struct Divider {
  uint32_t divisor, multiplier;
  int32_t shift;

  Divider() = default;
  explicit Divider(int64_t by) : divisor(static_cast<uint32_t>(by)), shift(31) {
    while (int64_t{1} << (shift - 31) < by) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + divisor - 1) / divisor);
  }
  // For n < 2^31. The multiplier exceeds 2^shift / divisor by less than 1, so the product is too large by less than
  // 2^shift / divisor, and the quotient is exact.
  GEMMA_NORM_DEVICE uint32_t operator()(uint32_t n) const {
    return static_cast<uint32_t>(static_cast<uint64_t>(n) * multiplier >> shift);
  }
};

// What a kernel needs of its LaunchPlan and of its rows.
struct Launch {
  int32_t slots;
  int32_t log2_slots;     // kWave: log2 of `slots` rounded up to a power of two
  int32_t block_threads;  // here, because on AMD the built-in number comes from memory, by a load of its own
  int32_t vectors;
  bool whole_vectors;
  bool room_for_next = false;  // a second grid of this size would fit on the GPU at the same time
  // Of a kernel that quantises: vectors that share a scale, and how many of them neighbouring lanes have at least.
  int32_t log2_group_vectors = 0, group_lanes = 0;
  Divider inner_rows = {};  // RowParams::sizes[1]. Backward kernels have none: they divide once, for their first row.
};

// The index of the first element of the slot's k-th vector, and the step to the vector's next element.
template <bool kWholeVectors, class T, class Index>
GEMMA_NORM_DEVICE Index first_item(const Launch& launch, int slot, int k) {
  const Index vector = static_cast<Index>(k) * launch.slots;
  return kWholeVectors || launch.whole_vectors ? (vector + slot) * kItems<T> : vector * kItems<T> + slot;
}
GEMMA_NORM_DEVICE int item_step(const Launch& launch) { return launch.whole_vectors ? 1 : launch.slots; }

// Takes the place of a row's end if all elements of the slot are known to lie before it.
struct NoEnd {};
template <class Index>
GEMMA_NORM_DEVICE bool operator<(Index, NoEnd) {
  return true;
}

// Whether this kernel or another will read the same memory again, so that it is worth a place in the caches. kEarly:
// see device::load_early.
enum class Reuse { kNone, kSome, kEarly };

template <Reuse kReuse, class Vector>
GEMMA_NORM_DEVICE Vector load_vector(const Vector* p) {
  if constexpr (kReuse == Reuse::kEarly) return device::load_early(p);
  return kReuse == Reuse::kNone ? device::load_once(p) : device::load(p);
}

// Loads and stores of kCount elements of a row. They are a whole Vector16 or its first 8 bytes. Elements past the end
// of the row are read as 0 and not written. With kAligned, a vector is one access. Otherwise each element is an access
// of its own, for any alignment; each element has the same place in the vector, so the results are the same.
template <bool kAligned, Reuse kReuse, int kCount, class T, class Index, class End>
GEMMA_NORM_DEVICE Vector16 load_items(const T* row, Index first, int step, End end) {
  constexpr bool kWhole = kCount == kItems<T>;
  static_assert(kWhole || 2 * kCount == kItems<T>);
  Vector16 v{};
  if constexpr (kAligned && kWhole) {
    if (first < end) v = load_vector<kReuse>(reinterpret_cast<const Vector16*>(row + first));
  } else if constexpr (kAligned) {
    if (first < end) {
      const Vector8 half = load_vector<kReuse>(reinterpret_cast<const Vector8*>(row + first));
      v.word[0] = half.word[0];
      v.word[1] = half.word[1];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Index at = first + static_cast<Index>(i) * step;
      if (!(at < end)) continue;
      if constexpr (sizeof(T) == 4) {
        v.word[i] = device::as_bits(row[at]);
      } else {
        v.word[i / 2] |= static_cast<uint32_t>(row[at].bits) << (i % 2 * 16);
      }
    }
  }
  return v;
}

template <bool kAligned, int kCount, class T, class Index, class End>
GEMMA_NORM_DEVICE void store_items(T* row, Index first, int step, End end, Vector16 v) {
  if constexpr (kAligned && kCount == kItems<T>) {
    if (first < end) device::store_once(reinterpret_cast<Vector16*>(row + first), v);
  } else if constexpr (kAligned) {
    if (first < end) device::store_once(reinterpret_cast<Vector8*>(row + first), Vector8{v.word[0], v.word[1]});
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Index at = first + static_cast<Index>(i) * step;
      if (!(at < end)) continue;
      if constexpr (sizeof(T) == 4) {
        row[at] = device::as_float(v.word[i]);
      } else {
        row[at].bits = static_cast<uint16_t>(v.word[i / 2] >> (i % 2 * 16));
      }
    }
  }
}

GEMMA_NORM_DEVICE void store_item(float* at, float v) { *at = v; }
template <class T>
GEMMA_NORM_DEVICE void store_item(T* at, float v) {
  const float two[2] = {v, 0.0f};
  at->bits = static_cast<uint16_t>(device::pack<T>(two));
}

template <class T, int kCount>
GEMMA_NORM_DEVICE void unpack_items(Vector16 v, float (&f)[kCount]) {
#pragma unroll
  for (int w = 0; w < kCount / kWordItems<T>; ++w) device::unpack<T>(v.word[w], f + w * kWordItems<T>);
}

template <class T, int kCount>
GEMMA_NORM_DEVICE Vector16 pack_items(const float (&f)[kCount]) {
  Vector16 v{};
#pragma unroll
  for (int w = 0; w < kCount / kWordItems<T>; ++w) v.word[w] = device::pack<T>(f + w * kWordItems<T>);
  return v;
}

// a + b, for vectors of elements of A and of B, rounded to B.
template <class A, class B>
GEMMA_NORM_DEVICE Vector16 add_rounded(Vector16 a, Vector16 b) {
  float x[kItems<B>], y[kItems<B>];
  unpack_items<A>(a, x);
  unpack_items<B>(b, y);
#pragma unroll
  for (int i = 0; i < kItems<B>; ++i) x[i] = device::add(x[i], y[i]);
  return pack_items<B>(x);
}

// `v` rounded to T, as a float.
template <class T>
GEMMA_NORM_DEVICE float rounded(float v) {
  float f[2] = {v, 0.0f};
  device::unpack<T>(device::pack<T>(f), f);
  return f[0];
}

// The coordinates of a row. A launch has less than 2^31 rows.
struct RowIndex {
  uint32_t outer, inner;

  GEMMA_NORM_DEVICE RowIndex(const Divider& inner_rows, uint32_t row)
      : outer(inner_rows(row)), inner(row - outer * inner_rows.divisor) {}
  // Where the row begins in an operand, in elements.
  GEMMA_NORM_DEVICE int64_t offset(const RowParams& p, Operand operand) const {
    const auto& strides = p.strides[operand];
    return outer * strides[0] + inner * strides[1];
  }
  // Points to the row's element `start` in an operand with elements of type T.
  template <class T>
  GEMMA_NORM_DEVICE T* pointer(const RowParams& p, Operand operand, int64_t start) const {
    return static_cast<T*>(p.data[operand]) + offset(p, operand) + start;
  }
};

}  // namespace gemma_norm::gpu
