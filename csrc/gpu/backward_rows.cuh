// The rows of a block in the backward pass: which they are, and what their elements are multiplied by.
#pragma once

#include "row.cuh"

namespace gemma_norm::gpu {

// The weights of a block's rows. If the rows are groups, all of these are the same group of their rows, because the
// number of groups divides the number of chunks.
GEMMA_NORM_DEVICE const char* weights_of(const RowParams& p, int64_t chunk) {
  const char* const weights = static_cast<const char*>(p.data[kWeight]);
  if (p.strides[kWeight][1] == 0) return weights;  // without a division, which the first load would wait for
  return weights + chunk % p.sizes[1] * p.strides[kWeight][1] * (p.dtypes[kWeight] == DType::kFloat32 ? 4 : 2);
}

// The factors of n for one vector of x: weight, 1 + weight, or 1 if there is no weight. The dtype of the weight is
// known at run time only, since a block loads its weights once for all its rows.
template <class X>
class Factors {
  static constexpr int kCount = kItems<X>;
  template <class W>
  static constexpr int kLoads = kCount > kItems<W> ? kCount / kItems<W> : 1;

 public:
  // Starts the loads.
  template <bool kAligned, class Index>
  GEMMA_NORM_DEVICE void load(const RowParams& p, const char* weights, Index first, int step, Index end) {
    visit(p, [&](auto item) { load_as<decltype(item), kAligned>(weights, first, step, end); });
  }
  GEMMA_NORM_DEVICE void unpack(const RowParams& p, float (&w)[kCount]) const {
    fill(w);
    visit(p, [&](auto item) { unpack_as<decltype(item)>(p, w); });
  }
  // Both at once, which takes fewer registers.
  template <bool kAligned, class Index>
  GEMMA_NORM_DEVICE void read(const RowParams& p, const char* weights, Index first, int step, Index end,
                              float (&w)[kCount]) {
    fill(w);
    visit(p, [&](auto item) {
      load_as<decltype(item), kAligned>(weights, first, step, end);
      unpack_as<decltype(item)>(p, w);
    });
  }

 private:
  static GEMMA_NORM_DEVICE void fill(float (&w)[kCount]) {
#pragma unroll
    for (float& f : w) f = 1.0f;
  }
  template <class W, bool kAligned, class Index>
  GEMMA_NORM_DEVICE void load_as(const char* weights, Index first, int step, Index end) {
    constexpr int kEach = kCount / kLoads<W>;
#pragma unroll
    for (int i = 0; i < kLoads<W>; ++i) {
      const Index at = first + static_cast<Index>(i) * kEach * step;
      v_[i] = load_items<kAligned, Reuse::kSome, kEach>(reinterpret_cast<const W*>(weights), at, step, end);
    }
  }
  template <class W>
  GEMMA_NORM_DEVICE void unpack_as(const RowParams& p, float (&w)[kCount]) const {
    constexpr int kEach = kCount / kLoads<W>;
#pragma unroll
    for (int i = 0; i < kLoads<W>; ++i) unpack_items<W>(v_[i], reinterpret_cast<float(&)[kEach]>(w[i * kEach]));
    // A float32 NaN can have all its fraction bits below those of bfloat16; see device::keep_nan.
    if constexpr (sizeof(W) > sizeof(X))
      for (float& f : w) f = device::keep_nan(f);
#pragma unroll
    for (float& f : w) f += p.weight_offset;
  }
  // Calls visit() with an element of the weight's dtype, unless there is no weight.
  template <class Visit>
  static GEMMA_NORM_DEVICE void visit(const RowParams& p, const Visit& visit) {
    switch (p.dtypes[kWeight]) {
      case DType::kFloat32: return visit(float());
      case DType::kFloat16: return visit(float16());
      case DType::kBFloat16: return visit(bfloat16());
      default: return;
    }
  }

  Vector16 v_[kLoads<float>];
};

// Rows that are `step` apart, of which there are less than 2^31. The coordinates of the first are found by division,
// and those of the others by addition, without branches, so that the next loads start at once.
struct ShortRowSteps {
  int outer, inner, row;

  ShortRowSteps() = default;
  GEMMA_NORM_DEVICE ShortRowSteps(const RowParams& p, int row) : outer(0), inner(row), row(row) {
    if (p.sizes[0] == 1) return;
    const uint32_t size = static_cast<uint32_t>(p.sizes[1]);
    outer = static_cast<uint32_t>(row) / size;
    inner = row - outer * static_cast<int>(size);
  }
  GEMMA_NORM_DEVICE void move(const RowParams& p, const ShortRowSteps& step) {
    row += step.row;
    inner += step.inner;
    outer += step.outer;
    const int size = static_cast<int>(p.sizes[1]), over = inner >= size;
    inner -= over ? size : 0;
    outer += over;
  }
  template <class T>
  GEMMA_NORM_DEVICE T* pointer(const RowParams& p, Operand operand) const {
    // As unsigned numbers: the product of a negative one with a stride takes two more multiplications.
    const uint32_t o = outer, i = inner;
    return static_cast<T*>(p.data[operand]) + o * p.strides[operand][0] + i * p.strides[operand][1];
  }
};

// The rows `start`, `start + step`, ... Both numbers are less than 2^31, and what they add up to need not be.
class LongRowSteps {
 public:
  GEMMA_NORM_DEVICE LongRowSteps(const RowParams& p, uint32_t start, uint32_t step)
      : p_(p), at_(p, start), step_(p, step) {}

  GEMMA_NORM_DEVICE int64_t index() const { return at_.row; }
  GEMMA_NORM_DEVICE bool has_row() const { return at_.row < p_.rows; }
  GEMMA_NORM_DEVICE void next() {
    at_.row += step_.row;
    at_.inner += step_.inner;
    at_.outer += step_.outer;
    if (at_.inner >= p_.sizes[1]) {
      at_.inner -= p_.sizes[1];
      ++at_.outer;
    }
  }
  // Points to the row, or to the first one if there is no such row.
  template <class T>
  GEMMA_NORM_DEVICE T* pointer(const RowParams&, Operand operand) const {
    const auto& strides = p_.strides[operand];
    const int64_t offset = at_.outer * strides[0] + at_.inner * strides[1];
    return static_cast<T*>(p_.data[operand]) + (has_row() ? offset : 0);
  }

 private:
  struct Coordinates {
    int64_t outer, inner, row;

    GEMMA_NORM_DEVICE Coordinates(const RowParams& p, uint32_t row) : outer(0), inner(row), row(row) {
      if (row < p.sizes[1]) return;
      outer = row / static_cast<uint32_t>(p.sizes[1]);
      inner = row - outer * p.sizes[1];
    }
  };
  const RowParams& p_;
  Coordinates at_, step_;
};

// The factors of a thread's vectors, in registers.
template <class X, int kVectors>
struct RegisterFactors {
  float w[kVectors][kItems<X>];

  GEMMA_NORM_DEVICE void load(int k, float (&to)[kItems<X>]) const {
#pragma unroll
    for (int i = 0; i < kItems<X>; ++i) to[i] = w[k][i];
  }
};

// The factors of a thread's vectors for all rows of a block. They are in shared memory, since a thread has no
// registers for them (T103), each where only its own thread reads it. Long rows read the weights from the caches for
// each row.
template <class X, int kVectors, int kThreads, bool kAligned, class First>
class HeldFactors {
  static constexpr int kCount = kItems<X>;
  static constexpr bool kShared = kVectors * kCount * kThreads * sizeof(float) <= 32 * 1024;
  struct Shared {
    Vector16 vectors[kShared ? kVectors * kCount / kItems<float> : 1][kShared ? kThreads : 1];
  };

 public:
  GEMMA_NORM_DEVICE HeldFactors(const RowParams& p, const char* weights, const First& first, int step, int end)
      : p_(p), weights_(weights), first_(first), step_(step), end_(end) {
    if constexpr (kShared) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        float w[kCount];
        load_now(k, w);
#pragma unroll
        for (int i = 0; i < kCount; i += kItems<float>)
          place(k, i) = pack_items<float>(reinterpret_cast<float(&)[kItems<float>]>(w[i]));
      }
    }
  }
  GEMMA_NORM_DEVICE void load(int k, float (&w)[kCount]) const {
    if constexpr (!kShared) {
      load_now(k, w);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; i += kItems<float>)
        unpack_items<float>(place(k, i), reinterpret_cast<float(&)[kItems<float>]>(w[i]));
    }
  }

 private:
  GEMMA_NORM_DEVICE void load_now(int k, float (&w)[kCount]) const {
    Factors<X>().template read<kAligned>(p_, weights_, first_(k), step_, end_, w);
  }
  GEMMA_NORM_DEVICE static Vector16& place(int k, int i) {
    return device::shared_memory<Shared>().vectors[(k * kCount + i) / kItems<float>][device::thread_index()];
  }

  const RowParams& p_;
  const char* const weights_;
  const First& first_;
  const int step_, end_;
};

}  // namespace gemma_norm::gpu
