// The cosines and sines by which a head is rotated: which of them each lane needs, and how it finds them, in rows of
// the tokens or in a cache by the tokens' positions.
#pragma once

#include "rope_params.cuh"

namespace gemma_norm::gpu {

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

// Element i of a vector in its word i / kWordItems<T>: all bits of the element.
template <class T>
GEMMA_NORM_DEVICE constexpr uint32_t element_mask(int i) {
  return sizeof(T) == 4 ? 0xffffffffu : i % 2 == 0 ? 0xffffu : 0xffff0000u;
}
template <class T>
GEMMA_NORM_DEVICE constexpr uint32_t sign_mask(int i) {
  return element_mask<T>(i) & (sizeof(T) == 4 ? 0x80000000u : 0x80008000u);
}
GEMMA_NORM_DEVICE uint32_t choose_bits(uint32_t mask, uint32_t chosen, uint32_t otherwise) {
  return (chosen & mask) | (otherwise & ~mask);
}

// The cosines and sines of a vector's elements, as they are in memory, but the sines of the first of each pair negated.
template <class X, class A>
struct Angles {
  static constexpr int kCount = kItems<X>, kVectors = sizeof(A) > sizeof(X) ? 2 : 1, kOfVector = kCount / kVectors;
  Vector16 cos[kVectors], sin[kVectors];

  GEMMA_NORM_DEVICE static void unpack(const Vector16 (&packed)[kVectors], float (&f)[kCount]) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      unpack_items<A>(packed[i], reinterpret_cast<float(&)[kOfVector]>(f[i * kOfVector]));
    if constexpr (sizeof(A) > sizeof(X)) {
#pragma unroll
      for (float& v : f) v = device::keep_nan(v);
    }
  }
};

// Finds and loads the angles of a token.
template <class X, class A, int kVectors, Partner kPartner>
struct TokenAngles {
  using Held = Angles<X, A>;
  static constexpr int kRotated = kPartner == Partner::kInOtherLane ? 1 : kVectors;  // of the thread's vectors
  static constexpr int kOfVector = Held::kOfVector;

  static constexpr bool kNarrow = kForAlignedHeads<kPartner>;

  const RopeParams<kNarrow>& p;
  const A *cos, *sin;  // the token's rows or, with a cache, its first rows
  int64_t position;    // with a cache: where the token's first position is, in bytes
  int32_t low[3] = {}, high[3] = {};
  int64_t row = 0, row_of_height = 0, row_of_width = 0;  // with a cache: where the token's row of each axis begins

  GEMMA_NORM_DEVICE TokenAngles(const RopeParams<kNarrow>& p, Token<kNarrow> token)
      : p(p),
        cos(token.template pointer<const A>(p.cos)),
        sin(token.template pointer<const A>(p.sin)),
        position(token.offset(p.positions)) {}
  // Asks for the token's positions, as words of 32 bits.
  GEMMA_NORM_DEVICE void read_positions() {
    if (!p.h.cache_rows) return;
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      if (axis > 0 && !p.h.axis_stride) break;
      const int64_t at = position + axis * p.h.axis_stride * (p.int32_positions ? 4 : 8);
      const int32_t* const words = reinterpret_cast<const int32_t*>(static_cast<const char*>(p.positions.data) + at);
      low[axis] = words[0];
      if (!p.int32_positions) high[axis] = words[1];
    }
  }
  // Finds their rows.
  GEMMA_NORM_DEVICE void find() {
    if (!p.h.cache_rows) return;
    const auto row_of = [&](int axis) {
      const uint64_t upper = p.int32_positions ? low[axis] >> 31 : high[axis];
      int64_t at = static_cast<int64_t>(upper << 32 | static_cast<uint32_t>(low[axis]));
      at = at < p.h.cache_rows ? at : p.h.cache_rows - 1;
      at = at > 0 ? at : 0;
      return at * p.h.cache_stride;
    };
    row = row_of(0);
    if (p.h.axis_stride) row_of_height = row_of(1), row_of_width = row_of(2);
  }

  // The angles of each vector that is rotated; vector k begins with element first(k).
  template <class First>
  GEMMA_NORM_DEVICE void load(const First& first, int step, int end, Held (&held)[kRotated]) const {
    const Rotation& h = p.h;
    const auto is_rotated = [&](int k) {
      return (kPartner == Partner::kInThread && p.fills_groups) || (first(k) < h.rotary && first(k) < end);
    };
    if constexpr (kPartner == Partner::kInMemory) {
#pragma unroll
      for (int k = 0; k < kRotated; ++k)
        if (is_rotated(k)) load_elements(first(k), step, held[k]);
      return;
    }
    // Calls visit(k, v, element) for vector v of the angles of each rotated vector below `count`.
    const auto each = [&](int count, const auto& visit) {
#pragma unroll
      for (int k = 0; k < count; ++k) {
        if (!is_rotated(k)) continue;
#pragma unroll
        for (int v = 0; v < Held::kVectors; ++v) visit(k, v, first(k) + v * kOfVector);
      }
    };
    if (!h.cache_rows) {
      each(kRotated, [&](int k, int v, int element) {
        held[k].cos[v] = load_items<true, Reuse::kSome, kOfVector>(cos, element, 1, NoEnd());
        held[k].sin[v] = load_items<true, Reuse::kSome, kOfVector>(sin, element, 1, NoEnd());
      });
    } else {
      // The second elements of pairs have the angles of the first.
      constexpr int kOwn = kPartner == Partner::kInThread ? kRotated / 2 : kRotated;
      each(kOwn, [&](int k, int v, int element) {
        held[k].cos[v] = of_pairs(cos + row, h.pair_of(element));
        held[k].sin[v] = of_pairs(sin + row, h.pair_of(element));
      });
      // After all loads above: behind a branch, compilers for AMD wait for the loads before it.
      if (h.axis_stride) {
        each(kOwn, [&](int k, int v, int element) {
          choose_axes(held[k].cos[v], cos, h.pair_of(element));
          choose_axes(held[k].sin[v], sin, h.pair_of(element));
        });
      }
      if constexpr (kPartner == Partner::kInVector)
        each(kOwn, [&](int k, int v, int) { each_twice(held[k].cos[v]), each_twice(held[k].sin[v]); });
#pragma unroll
      for (int k = kOwn; k < kRotated; ++k)
        if (is_rotated(k)) held[k] = held[k - kOwn];
    }
#pragma unroll
    for (int k = 0; k < kRotated; ++k) {
      const bool negates = kPartner == Partner::kInThread      ? k < kVectors / 2
                           : kPartner == Partner::kInOtherLane ? first(k) < h.rotary / 2
                                                               : true;
#pragma unroll
      for (int v = 0; v < Held::kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < kOfVector; ++i) {
          if (kPartner == Partner::kInVector && i % 2 == 1) continue;
          held[k].sin[v].word[i / kWordItems<A>] ^= negates ? sign_mask<A>(i) : 0;
        }
      }
    }
  }

 private:
  GEMMA_NORM_DEVICE void load_elements(int first, int step, Held& held) const {
    const Rotation& h = p.h;
    const int64_t rows[] = {row, row_of_height, row_of_width};
#pragma unroll
    for (int v = 0; v < Held::kVectors; ++v) {
      const auto element = [&](int i) { return first + (v * kOfVector + i) * step; };
      const auto place = [&](int i) -> int64_t {
        if (element(i) >= h.rotary) return -1;
        if (!h.cache_rows) return element(i);
        const int pair = h.pair_of(element(i)), axis = h.axis(pair);
        return (axis == 0 ? rows[0] : axis == 1 ? rows[1] : rows[2]) + pair;
      };
      held.cos[v] = load_each<kOfVector>(cos, place);
      held.sin[v] = load_each<kOfVector>(sin, place);
#pragma unroll
      for (int i = 0; i < kOfVector; ++i)
        if (h.is_first(element(i))) held.sin[v].word[i / kWordItems<A>] ^= sign_mask<A>(i);
    }
  }
  // The numbers of a vector's pairs, from a row of the cache: a whole vector, or its first half.
  static constexpr int kPairs = kPartner == Partner::kInVector ? kOfVector / 2 : kOfVector;
  GEMMA_NORM_DEVICE static Vector16 of_pairs(const A* numbers, int pair) {
    if constexpr (kPairs * sizeof(A) == kVectorBytes) {
      return device::load(reinterpret_cast<const Vector16*>(numbers + pair));
    } else {
      const Vector8 half = device::load(reinterpret_cast<const Vector8*>(numbers + pair));
      return {{half.word[0], half.word[1], 0, 0}};
    }
  }
  // Replaces the numbers of the pairs that belong to the second or third axis.
  GEMMA_NORM_DEVICE void choose_axes(Vector16& v, const A* numbers, int pair) const {
    const Vector16 height = of_pairs(numbers + row_of_height, pair), width = of_pairs(numbers + row_of_width, pair);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int axis = p.h.axis(pair + i), w = i / kWordItems<A>;
      const uint32_t other = axis == 1 ? height.word[w] : axis == 2 ? width.word[w] : v.word[w];
      v.word[w] = choose_bits(element_mask<A>(i), other, v.word[w]);
    }
  }
  // Of neighbours that are a pair, each angle is needed twice.
  GEMMA_NORM_DEVICE static void each_twice(Vector16& v) {
    const Vector16 once = v;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint32_t from = once.word[w / 2];
      v.word[w] = sizeof(A) == 4 ? from : (w % 2 == 0 ? from & 0xffffu : from >> 16) * 0x10001u;
    }
  }
};

}  // namespace gemma_norm::gpu
