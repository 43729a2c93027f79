// The kernel that normalises the heads of q and k and rotates them; ops/qk_norm_rope.h has the formulas.
//
// A row is a head of a token, with as many lanes of a wave as a row of rms_norm of that size (shapes.h), so the norm
// has its bits. A rotated element also needs the other element of its pair. That is in the same vector if pairs are
// neighbours, in another vector of the same thread if the whole head is rotated, and otherwise in another lane: then
// this thread loads it as well, from the cache that its neighbour's load has filled, and normalises it too. No lane
// writes before all lanes of the wave have read, so a head can be written in place.
#pragma once

#include "../core/head_params.h"
#include "policies.cuh"
#include "reduce.cuh"
#include "row.cuh"

namespace gemma_norm::gpu {

constexpr int kRopeThreads = 128;
// How many threads should be resident on one multiprocessor (see KernelTuning). What a thread holds, and so how many
// registers it needs, depends on its vectors and on whether weights and angles are wider than the elements of x.
// Nothing is spilled at these numbers.
template <class X, class W, class A>
constexpr int rope_resident_threads(int vectors) {
  return vectors > 2 ? 384 : 768 - 128 * (sizeof(W) > sizeof(X)) - 128 * (sizeof(A) > sizeof(X));
}

// Where the other element of a pair is.
enum class Partner : int32_t { kInVector, kInThread, kInOtherLane };

struct RopeLaunch {
  Launch rows;
  Partner partner;
  bool vector_angles;    // the cosines and sines of a vector are whole, aligned vectors
  int64_t first, count;  // heads of this launch, of all tokens' heads in turn
};

// A head: its token, and what is q's or k's.
template <class X, class W>
struct Head {
  RowIndex token;
  const X* x;
  X* out;
  const W* weight;  // null if there is none

  GEMMA_NORM_DEVICE Head(const RowParams& p, const HeadParams& h, int64_t row) : token(p, 0) {
    const int64_t heads = h.heads[0] + h.heads[1];
    const int64_t index = (row | heads) >> 32 ? row / heads : static_cast<uint32_t>(row) / static_cast<uint32_t>(heads);
    int64_t head = row - index * heads;
    token = RowIndex(p, index);
    const bool is_k = head >= h.heads[0];
    if (is_k) head -= h.heads[0];
    // No parameter is indexed by a variable: nvcc would copy all of them to local memory.
    const X *q = token.pointer<const X>(p, kX, head * h.strides[0]),
            *k = token.pointer<const X>(p, kKey, head * h.strides[1]);
    X *q_out = token.pointer<X>(p, kOut, head * h.out_strides[0]),
      *k_out = token.pointer<X>(p, kKeyOut, head * h.out_strides[1]);
    x = is_k ? k : q;
    out = is_k ? k_out : q_out;
    weight = static_cast<const W*>(is_k ? p.data[kKeyWeight] : p.data[kWeight]);
  }
};

// A vector's elements, one by one: those of `row` at index(i), or 0 where that is negative.
template <int kCount, class T, class Index>
GEMMA_NORM_DEVICE Vector16 load_each(const T* row, const Index& index) {
  Vector16 v{};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int64_t at = index(i);
    if (at < 0) continue;
    if constexpr (sizeof(T) == 4) {
      v.word[i] = device::as_bits(row[at]);
    } else {
      v.word[i / 2] |= static_cast<uint32_t>(row[at].bits) << (i % 2 * 16);
    }
  }
  return v;
}

// The cosines and sines of one token's elements. They are of type A, and are held as such until they are used.
template <class X, class A>
struct TokenAngles {
  static constexpr int kCount = kItems<X>, kVectors = sizeof(A) > sizeof(X) ? 2 : 1, kOfVector = kCount / kVectors;
  struct Held {
    Vector16 cos[kVectors], sin[kVectors];
  };

  const RowParams& p;
  const HeadParams& h;
  const A *cosines, *sines;     // with a cache, both are the cache
  int64_t cos[3] = {}, sin[3];  // where the token's rows begin, one for each axis

  GEMMA_NORM_DEVICE TokenAngles(const RowParams& p, const HeadParams& h)
      : p(p),
        h(h),
        cosines(static_cast<const A*>(h.cache_rows ? p.data[kCosSinCache] : p.data[kCos])),
        sines(static_cast<const A*>(h.cache_rows ? p.data[kCosSinCache] : p.data[kSin])) {}

  // Reads the token's positions.
  GEMMA_NORM_DEVICE void find(const RowIndex& token) {
    if (!h.cache_rows) {
      cos[0] = token.offset(p, kCos);
      sin[0] = token.offset(p, kSin);
      return;
    }
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      if (axis > 0 && !h.axis_stride) break;
      int64_t position;
      if (p.dtypes[kPositions] == DType::kInt32)
        position = *token.pointer<const int32_t>(p, kPositions, axis * h.axis_stride);
      else
        position = *token.pointer<const int64_t>(p, kPositions, axis * h.axis_stride);
      position = position < 0 ? 0 : position < h.cache_rows ? position : h.cache_rows - 1;
      cos[axis] = position * h.cache_stride;
      sin[axis] = cos[axis] + h.rotary / 2;
    }
  }

  GEMMA_NORM_DEVICE void load(int first, int step, bool vectors, Held& held) const {
    if (vectors) {
      const int at = h.cache_rows ? h.pair_of(first) : first;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        held.cos[i] = load_items<true, Reuse::kSome, kOfVector>(cosines + cos[0], at + i * kOfVector, 1, NoEnd());
        held.sin[i] = load_items<true, Reuse::kSome, kOfVector>(sines + sin[0], at + i * kOfVector, 1, NoEnd());
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      held.cos[i] =
          load_each<kOfVector>(cosines, [&](int j) { return place(cos, first + (i * kOfVector + j) * step); });
      held.sin[i] = load_each<kOfVector>(sines, [&](int j) { return place(sin, first + (i * kOfVector + j) * step); });
    }
  }

  // The sines of the first of each pair are negated.
  GEMMA_NORM_DEVICE void unpack(const Held& held, int first, int step, float (&c)[kCount], float (&s)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      unpack_items<A>(held.cos[i], reinterpret_cast<float(&)[kOfVector]>(c[i * kOfVector]));
      unpack_items<A>(held.sin[i], reinterpret_cast<float(&)[kOfVector]>(s[i * kOfVector]));
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if constexpr (sizeof(A) > sizeof(X)) c[i] = device::keep_nan(c[i]), s[i] = device::keep_nan(s[i]);
      if (h.is_first(first + i * step)) s[i] = -s[i];
    }
  }

 private:
  // Where the number of an element is, in one of `rows`; negative if the element is not rotated.
  GEMMA_NORM_DEVICE int64_t place(const int64_t (&rows)[3], int element) const {
    if (element >= h.rotary) return -1;
    if (!h.cache_rows) return rows[0] + element;
    const int pair = h.pair_of(element), axis = h.axis(pair);
    return (axis == 0 ? rows[0] : axis == 1 ? rows[1] : rows[2]) + pair;
  }
};

// The norm and the rotation of a vector's elements.
template <class X, class W>
struct RopeFinish {
  const RowParams& p;
  const HeadParams& h;
  const bool has_weight;
  static constexpr int kCount = kItems<X>;
  static constexpr int kWeightVectors = sizeof(W) > sizeof(X) ? 2 : 1, kWeightCount = kCount / kWeightVectors;
  struct Weights {
    Vector16 v[kWeightVectors];
  };

  template <bool kAligned>
  GEMMA_NORM_DEVICE void load(Weights& w, const W* weight, int first, int step, int end) const {
#pragma unroll
    for (int i = 0; i < kWeightVectors; ++i)
      w.v[i] = load_items<kAligned, Reuse::kSome, kWeightCount>(weight, first + i * kWeightCount * step, step, end);
  }

  template <bool kRounded>
  GEMMA_NORM_DEVICE static float round(float v) {
    if constexpr (kRounded) return rounded<X>(v);
    return v;
  }

  template <bool kRounded>
  GEMMA_NORM_DEVICE void norm(Vector16 x, const Weights& w, float rstd, float (&n)[kCount]) const {
    unpack_items<X>(x, n);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      n[i] *= rstd;
      if constexpr (kRounded) n[i] = h.round_norm ? rounded<X>(n[i]) : n[i];
    }
    if (has_weight) {
      float f[kCount];
#pragma unroll
      for (int i = 0; i < kWeightVectors; ++i)
        unpack_items<W>(w.v[i], reinterpret_cast<float(&)[kWeightCount]>(f[i * kWeightCount]));
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if constexpr (std::is_same_v<X, bfloat16> && sizeof(W) != sizeof(X)) f[i] = device::keep_nan(f[i]);
        n[i] *= device::add(f[i], p.weight_offset);
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) n[i] = round<kRounded>(n[i]);
  }

  // The elements `other` are the partners of n.
  template <bool kRounded>
  GEMMA_NORM_DEVICE void rotate(float (&n)[kCount], const float (&other)[kCount], const float (&c)[kCount],
                                const float (&s)[kCount], int first, int step) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float turned = device::add(round<kRounded>(n[i] * c[i]), round<kRounded>(other[i] * s[i]));
      n[i] = first + i * step < h.rotary ? turned : n[i];
    }
  }
};

template <class X, class W, class A, int kVectors, bool kAligned>
GEMMA_NORM_KERNEL(kRopeThreads, (kAligned ? rope_resident_threads<X, W, A>(kVectors) / kRopeThreads : 1))
rotate_heads(RowParams p, HeadParams h, RopeLaunch launch) {
  using Finish = RopeFinish<X, W>;
  using Weights = typename Finish::Weights;
  constexpr int kCount = kItems<X>;
  const int log2 = launch.rows.log2_slots, thread = device::thread_index();
  const int slot = thread & ((1 << log2) - 1);
  const int64_t row = device::block_index() * (kRopeThreads >> log2) + (thread >> log2);
  const bool active = row < launch.count && slot < launch.rows.slots;
  const int step = item_step(launch.rows), end = active ? static_cast<int>(p.hidden) : 0;
  const auto first = [&](int k) { return first_item<kAligned, X, int>(launch.rows, slot, k); };
  const Head<X, W> head(p, h, launch.first + (active ? row : 0));
  const Finish finish{p, h, head.weight != nullptr};
  TokenAngles<X, A> angles(p, h);

  device::wait_for_previous_kernel(head.x, head.out, head.weight);
  if (launch.rows.room_for_next) device::allow_next_kernel();  // see normalize_rows
  Vector16 x[kVectors], other[kVectors];
  Weights w[kVectors], other_w[kVectors];
#pragma unroll
  for (int k = 0; k < kVectors; ++k) x[k] = load_items<kAligned, Reuse::kSome, kCount>(head.x, first(k), step, end);
  if (active) angles.find(head.token);
  if (finish.has_weight) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) finish.template load<kAligned>(w[k], head.weight, first(k), step, end);
  }
  if (launch.partner == Partner::kInOtherLane) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      device::leave_unset(&other[k]);
      if constexpr (kAligned) {
        if (first(k) < h.rotary && first(k) < end) {
          other[k] = load_items<kAligned, Reuse::kSome, kCount>(head.x, h.partner(first(k)), step, NoEnd());
          if (finish.has_weight)
            finish.template load<kAligned>(other_w[k], head.weight, h.partner(first(k)), step, end);
        }
      } else {
        const auto partner = [&](int at) { return at < end && at < h.rotary ? h.partner(at) : -1; };
        other[k] = load_each<kCount>(head.x, [&](int i) { return partner(first(k) + i * step); });
        if (finish.has_weight) {
#pragma unroll
          for (int v = 0; v < Finish::kWeightVectors; ++v)
            other_w[k].v[v] = load_each<Finish::kWeightCount>(
                head.weight, [&](int i) { return partner(first(k) + (v * Finish::kWeightCount + i) * step); });
        }
      }
    }
  }
  if (launch.partner == Partner::kInThread) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      other[k] = x[(k + kVectors / 2) % kVectors];
      other_w[k] = w[(k + kVectors / 2) % kVectors];
    }
  }
  typename TokenAngles<X, A>::Held held[kVectors];
#pragma unroll
  for (int k = 0; k < kVectors; ++k)
    if (first(k) < h.rotary && first(k) < end) angles.load(first(k), step, kAligned && launch.vector_angles, held[k]);

  SquareSum<X> squares;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) squares.add(x[k]);
  float sums[1];
  squares.total(sums);
  const float sum = device::sum_over_lanes(sums[0], 1 << log2);
  device::wave_barrier();  // no lane stores before all have loaded
  device::allow_next_kernel();
  const float rstd = reciprocal_std<true>(sum, p);

  const auto compute = [&](auto is_rounded) {
    constexpr bool kRounded = decltype(is_rounded)::value;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (kAligned && !(first(k) < end)) break;  // see LoadOrder::kStoreOneByOne
      float n[kCount];
      finish.template norm<kRounded>(x[k], w[k], rstd, n);
      if (first(k) < h.rotary) {
        float partners[kCount], c[kCount], s[kCount];
        if (launch.partner == Partner::kInVector) {
#pragma unroll
          for (int i = 0; i < kCount; ++i) partners[i] = n[i ^ 1];
        } else {
          finish.template norm<kRounded>(other[k], other_w[k], rstd, partners);
        }
        angles.unpack(held[k], first(k), step, c, s);
        finish.template rotate<kRounded>(n, partners, c, s, first(k), step);
      }
      store_items<kAligned, kCount>(head.out, first(k), step, end, pack_items<X>(n));
    }
  };
  if constexpr (sizeof(X) < sizeof(float)) {
    if (h.round_rotation) return compute(std::true_type());
  }
  compute(std::false_type());
}

}  // namespace gemma_norm::gpu
