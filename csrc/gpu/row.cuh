// How a thread reaches its part of a row: where the row is, which elements a slot owns, and how they become floats.
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

// The part of a LaunchPlan that a kernel needs.
struct Launch {
  int32_t slots;
  int32_t log2_group_threads;  // kWave
  int32_t vectors;
  bool whole_vectors;
  bool room_for_next = false;  // for as many blocks again
};

// Index of the first element of slot's k-th vector, and the step to the vector's next element.
template <bool kWholeVectors, class T, class Index>
GEMMA_NORM_DEVICE Index first_item(const Launch& launch, int slot, int k) {
  const Index vector = static_cast<Index>(k) * launch.slots;
  return kWholeVectors || launch.whole_vectors ? (vector + slot) * kItems<T> : vector * kItems<T> + slot;
}
GEMMA_NORM_DEVICE int item_step(const Launch& launch) { return launch.whole_vectors ? 1 : launch.slots; }

// In place of a row's end, where all of a slot's elements are known to lie before it.
struct NoEnd {};
template <class Index>
GEMMA_NORM_DEVICE bool operator<(Index, NoEnd) {
  return true;
}

// Whether what is loaded is wanted again, by this kernel or another: worth a place in the caches.
enum class Reuse { kNone, kSome };

// A slot's k-th vector of a row; what lies past the row's end reads as 0 and is not written. Aligned: whole 16-byte accesses.
// Otherwise element by element, for any alignment: the same elements in the same places, so the same results.
template <bool kAligned, Reuse kReuse, class T, class Index, class End>
GEMMA_NORM_DEVICE Vector16 load_items(const T* row, Index first, int step, End end) {
  Vector16 v{};
  if constexpr (kAligned) {
    if (first < end) {
      const Vector16* p = reinterpret_cast<const Vector16*>(row + first);
      v = kReuse == Reuse::kNone ? device::load_once(p) : device::load(p);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kItems<T>; ++i) {
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

template <bool kAligned, class T, class Index>
GEMMA_NORM_DEVICE void store_items(T* row, Index first, int step, Index end, Vector16 v) {
  if constexpr (kAligned) {
    if (first < end) device::store_once(reinterpret_cast<Vector16*>(row + first), v);
  } else {
#pragma unroll
    for (int i = 0; i < kItems<T>; ++i) {
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

template <class T>
GEMMA_NORM_DEVICE void unpack_items(Vector16 v, float (&f)[kItems<T>]) {
#pragma unroll
  for (int w = 0; w < 4; ++w) device::unpack<T>(v.word[w], f + w * kWordItems<T>);
}

template <class T>
GEMMA_NORM_DEVICE Vector16 pack_items(const float (&f)[kItems<T>]) {
  Vector16 v;
#pragma unroll
  for (int w = 0; w < 4; ++w) v.word[w] = device::pack<T>(f + w * kWordItems<T>);
  return v;
}

template <class T>
GEMMA_NORM_DEVICE Vector16 add_rounded(Vector16 a, Vector16 b) {
  float x[kItems<T>], y[kItems<T>];
  unpack_items<T>(a, x);
  unpack_items<T>(b, y);
#pragma unroll
  for (int i = 0; i < kItems<T>; ++i) x[i] += y[i];
  return pack_items<T>(x);
}

// A row's coordinates. Division is slow, in 64 bits more so: none for one dimension, 32 bits unless the batch is huge.
struct RowIndex {
  int64_t outer, inner;

  GEMMA_NORM_DEVICE RowIndex(const RowParams& p, int64_t row) : outer(0), inner(row) {
    if (p.row_dims == 1) return;
    const int64_t size = p.sizes[1];
    outer = (row | size) >> 32 ? row / size : static_cast<uint32_t>(row) / static_cast<uint32_t>(size);
    inner = row - outer * size;
  }
  // The row's element `start` of an operand whose elements are of type T.
  template <class T>
  GEMMA_NORM_DEVICE T* pointer(const RowParams& p, Operand operand, int64_t start) const {
    const auto& strides = p.strides[operand];
    const int64_t offset = p.row_dims == 1 ? inner * strides[0] : outer * strides[0] + inner * strides[1];
    return static_cast<T*>(p.data[operand]) + offset + start;
  }
};

}  // namespace gemma_norm::gpu
