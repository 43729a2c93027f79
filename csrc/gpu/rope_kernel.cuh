// The kernel that normalises the heads of q and k and rotates them; ops/qk_norm_rope.h has the formulas.
//
// A head has as many lanes of a wave as a row of rms_norm of that size (shapes.h), so the norm has its bits. Such a
// group of lanes works on one head or, one after another, on several heads of the same token: then the angles and
// weights are read once for all of them, and the next head is asked for before the present one is finished. No lane
// reads what another lane of the group may have written, so heads can be written in place.
#pragma once

#include "../core/head_params.h"
#include "policies.cuh"
#include "reduce.cuh"
#include "row.cuh"

namespace gemma_norm::gpu {

constexpr int kRopeThreads = 128;  // of a block, at most

// Where the other element of a pair is.
enum class Partner : int32_t {
  kInVector,     // in the same vector: pairs are neighbours
  kInThread,     // in the vector kVectors / 2 further on or back: the whole head is rotated
  kInOtherLane,  // in the same vector of the lane `partner_distance` away: the first vector of each slot is rotated
  kInMemory,     // anywhere. Elements are read one by one, whatever their alignment.
};

// How many threads should be resident on one multiprocessor (see KernelTuning). What a thread holds, and so how many
// registers it needs, depends on its vectors and on whether weights and angles are wider than the elements of x.
// Nothing is spilled at these numbers.
template <class X, class W, class A>
constexpr int rope_resident_threads(int vectors, Partner partner) {
  if (partner == Partner::kInMemory) return kRopeThreads;
  const int threads = std::is_same_v<X, float16> ? 640 : 768;  // compilers keep unpacked float16 in registers
  return vectors > 2 ? 384 : threads - 128 * (sizeof(W) > sizeof(X)) - 128 * (sizeof(A) > sizeof(X));
}

// A division by a number that the host knows, which takes two multiplications.
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

// A tensor with something for each token. The strides are those of RowParams, with two dimensions, but in bytes.
struct OfTokens {
  void* data;
  int64_t strides[kMaxRowDims];
};
struct OfHeads {
  OfTokens tokens;
  int64_t stride;  // from head to head, in bytes
};

// What the kernel needs, put together, since a GPU's first access to each 64 bytes of a kernel's parameters takes time.
struct RopeParams {
  OfHeads x[2], out[2];  // of q and of k
  const void* weights[2];
  OfTokens cos, sin;   // with a cache, both are the cache, whose tokens have no strides
  OfTokens positions;  // with a cache
  HeadParams h;
  Launch rows;
  int32_t groups_of_block;     // groups of lanes
  uint32_t groups;             // that have something to do in this launch
  Divider groups_of_token;     // a token's heads are divided among so many
  int32_t heads_of_group;      // at most; 1 with kInMemory
  uint32_t first_head;         // of this launch
  Divider inner_tokens;        // RowParams::sizes[1]
  uint32_t heads_of_q, heads;  // of a token; all of them
  int32_t hidden;
  int32_t fills_groups;      // every lane of a group has kVectors whole vectors
  int32_t partner_distance;  // kInOtherLane
  int32_t int32_positions;
  float eps, inv_hidden, weight_offset;  // as in RowParams, but weight_offset is 1 without weights
};

// kNarrow: all strides are less than 2^32. A product is one instruction then, and three otherwise.
template <bool kNarrow>
GEMMA_NORM_DEVICE int64_t steps(uint32_t count, int64_t stride) {
  if constexpr (kNarrow) return static_cast<int64_t>(static_cast<uint64_t>(count) * static_cast<uint32_t>(stride));
  return count * stride;
}

template <bool kNarrow>
struct Token {
  uint32_t outer, inner;

  GEMMA_NORM_DEVICE Token(const RopeParams& p, uint32_t token)
      : outer(p.inner_tokens(token)), inner(token - outer * p.inner_tokens.divisor) {}
  // Where it begins, in bytes.
  GEMMA_NORM_DEVICE int64_t offset(const OfTokens& of) const {
    return steps<kNarrow>(inner, of.strides[1]) + steps<kNarrow>(outer, of.strides[0]);
  }
  template <class T>
  GEMMA_NORM_DEVICE T* pointer(const OfTokens& of) const {
    return reinterpret_cast<T*>(static_cast<char*>(of.data) + offset(of));
  }
};

// A head of a token. q's heads come before k's.
template <class X, class W>
struct Head {
  const X* x;
  X* out;
  const W* weight;  // null if there is none

  template <bool kNarrow>
  GEMMA_NORM_DEVICE Head(const RopeParams& p, Token<kNarrow> token, uint32_t head) {
    const bool is_k = head >= p.heads_of_q;
    if (is_k) head -= p.heads_of_q;
    // No parameter is indexed by a variable: nvcc would copy all of them to local memory.
    const auto choose = [&](auto of_k, auto of_q) { return is_k ? of_k : of_q; };
    const auto find = [&](const OfHeads& of_k, const OfHeads& of_q) {
      const OfTokens tokens = {choose(of_k.tokens.data, of_q.tokens.data),
                               {choose(of_k.tokens.strides[0], of_q.tokens.strides[0]),
                                choose(of_k.tokens.strides[1], of_q.tokens.strides[1])}};
      return token.template pointer<char>(tokens) + steps<kNarrow>(head, choose(of_k.stride, of_q.stride));
    };
    x = reinterpret_cast<const X*>(find(p.x[1], p.x[0]));
    out = reinterpret_cast<X*>(find(p.out[1], p.out[0]));
    weight = static_cast<const W*>(choose(p.weights[1], p.weights[0]));
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

  static constexpr bool kNarrow = kPartner != Partner::kInMemory;

  const RopeParams& p;
  const A *cos, *sin;  // the token's rows or, with a cache, its first rows
  int64_t position;    // with a cache: where the token's first position is, in bytes
  int32_t low[3] = {}, high[3] = {};
  int64_t row = 0, row_of_height = 0, row_of_width = 0;  // with a cache: where the token's row of each axis begins

  GEMMA_NORM_DEVICE TokenAngles(const RopeParams& p, Token<kNarrow> token)
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
    const HeadParams& h = p.h;
#pragma unroll
    for (int k = 0; k < kRotated; ++k) {
      if (!(kPartner == Partner::kInThread && p.fills_groups) && !(first(k) < h.rotary && first(k) < end)) continue;
      if constexpr (kPartner == Partner::kInMemory) {
        load_elements(first(k), step, held[k]);
        continue;
      }
#pragma unroll
      for (int v = 0; v < Held::kVectors; ++v) {
        const int element = first(k) + v * kOfVector;
        if (!h.cache_rows) {
          held[k].cos[v] = load_items<true, Reuse::kSome, kOfVector>(cos, element, 1, NoEnd());
          held[k].sin[v] = load_items<true, Reuse::kSome, kOfVector>(sin, element, 1, NoEnd());
        } else if (kPartner == Partner::kInThread && k >= kVectors / 2) {
          held[k].cos[v] = held[k - kVectors / 2].cos[v];
          held[k].sin[v] = held[k - kVectors / 2].sin[v];
        } else {
          // Of neighbours that are a pair, each angle is needed twice.
          constexpr bool kTwice = kPartner == Partner::kInVector;
          held[k].cos[v] = of_pairs<kTwice>(cos, h.pair_of(element));
          held[k].sin[v] = of_pairs<kTwice>(sin, h.pair_of(element));
        }
      }
    }
    if constexpr (kPartner == Partner::kInMemory) return;
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
    const HeadParams& h = p.h;
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
  // A vector of the numbers of pairs from the cache, each once or twice.
  template <bool kTwice>
  GEMMA_NORM_DEVICE Vector16 of_pairs(const A* numbers, int pair) const {
    constexpr int kPairs = kTwice ? kOfVector / 2 : kOfVector;
    numbers += pair;
    Vector16 v = load_pairs<kPairs>(numbers + row);
    if (p.h.axis_stride) {
      const Vector16 height = load_pairs<kPairs>(numbers + row_of_height),
                     width = load_pairs<kPairs>(numbers + row_of_width);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const int axis = p.h.axis(pair + i), w = i / kWordItems<A>;
        const uint32_t other = axis == 1 ? height.word[w] : axis == 2 ? width.word[w] : v.word[w];
        v.word[w] = choose_bits(element_mask<A>(i), other, v.word[w]);
      }
    }
    if constexpr (kTwice) {
      const Vector16 once = v;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const uint32_t from = once.word[w / 2];
        v.word[w] = sizeof(A) == 4 ? from : (w % 2 == 0 ? from & 0xffffu : from >> 16) * 0x10001u;
      }
    }
    return v;
  }
  // Whole vectors, or halves of them.
  template <int kPairs>
  GEMMA_NORM_DEVICE static Vector16 load_pairs(const A* from) {
    if constexpr (kPairs * sizeof(A) == kVectorBytes) {
      return device::load(reinterpret_cast<const Vector16*>(from));
    } else {
      const Vector8 half = device::load(reinterpret_cast<const Vector8*>(from));
      return {{half.word[0], half.word[1], 0, 0}};
    }
  }
};

// The weights of a vector's elements: zeros where there are none, and weight_offset is then 1.
template <class X, class W>
struct HeldWeights {
  static constexpr int kCount = kItems<X>;
  static constexpr int kVectors = sizeof(W) > sizeof(X) ? 2 : 1, kOfVector = kCount / kVectors;
  Vector16 v[kVectors];

  GEMMA_NORM_DEVICE void unpack(float weight_offset, float (&f)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) unpack_items<W>(v[i], reinterpret_cast<float(&)[kOfVector]>(f[i * kOfVector]));
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if constexpr (std::is_same_v<X, bfloat16> && sizeof(W) != sizeof(X)) f[i] = device::keep_nan(f[i]);
      f[i] = device::add(f[i], weight_offset);
    }
  }
};

// The norm of a vector's elements.
template <class X, bool kRounded>
GEMMA_NORM_DEVICE void normalize(const RopeParams& p, Vector16 x, float rstd, const float (&weight)[kItems<X>],
                                 float (&n)[kItems<X>]) {
  unpack_items<X>(x, n);
#pragma unroll
  for (float& v : n) v *= rstd;
  if constexpr (kRounded) {
    if (p.h.round_norm) unpack_items<X>(pack_items<X>(n), n);
  }
#pragma unroll
  for (int i = 0; i < kItems<X>; ++i) n[i] *= weight[i];
}

// A vector's elements, normalised, and what they are rotated to: in float32, rounded at the end.
template <class X, bool kRounded>
struct Normed {
  static constexpr int kCount = kItems<X>;
  float f[kCount];

  GEMMA_NORM_DEVICE Normed(const RopeParams& p, Vector16 x, float rstd, const float (&weight)[kCount]) {
    normalize<X, false>(p, x, rstd, weight, f);
  }
  GEMMA_NORM_DEVICE Vector16 packed() const { return pack_items<X>(f); }
  GEMMA_NORM_DEVICE Normed of_neighbours() const {
    Normed n = *this;
#pragma unroll
    for (int i = 0; i < kCount; ++i) n.f[i] = f[i ^ 1];
    return n;
  }
  GEMMA_NORM_DEVICE Normed of_lane(int distance) const {
    Normed n = *this;
#pragma unroll
    for (float& v : n.f) v = device::value_of_lane(distance, v);
    return n;
  }
  template <class A>
  GEMMA_NORM_DEVICE Vector16 rotated(const Normed& partner, const Angles<X, A>& angles) const {
    float c[kCount], s[kCount], y[kCount];
    Angles<X, A>::unpack(angles.cos, c);
    Angles<X, A>::unpack(angles.sin, s);
#pragma unroll
    for (int i = 0; i < kCount; ++i) y[i] = device::add(f[i] * c[i], partner.f[i] * s[i]);
    return pack_items<X>(y);
  }
};

// The same with the norm, both products and their sum rounded to X. The angles have that type.
template <class X>
struct Normed<X, true> {
  static constexpr int kCount = kItems<X>;
  Vector16 v;

  GEMMA_NORM_DEVICE Normed(const RopeParams& p, Vector16 x, float rstd, const float (&weight)[kCount]) {
    float n[kCount];
    normalize<X, true>(p, x, rstd, weight, n);
    v = pack_items<X>(n);
  }
  GEMMA_NORM_DEVICE Vector16 packed() const { return v; }
  GEMMA_NORM_DEVICE Normed of_neighbours() const {
    Normed n = *this;
#pragma unroll
    for (uint32_t& word : n.v.word) word = word << 16 | word >> 16;
    return n;
  }
  GEMMA_NORM_DEVICE Normed of_lane(int distance) const {
    Normed n = *this;
#pragma unroll
    for (uint32_t& word : n.v.word) word = device::as_bits(device::value_of_lane(distance, device::as_float(word)));
    return n;
  }
  GEMMA_NORM_DEVICE Vector16 rotated(const Normed& partner, const Angles<X, X>& angles) const {
    Vector16 y;
#pragma unroll
    for (int w = 0; w < 4; ++w)
      y.word[w] = device::add_pairs<X>(device::multiply_pairs<X>(v.word[w], angles.cos[0].word[w]),
                                       device::multiply_pairs<X>(partner.v.word[w], angles.sin[0].word[w]));
    return y;
  }
};

template <class X, class W, class A, int kVectors, Partner kPartner>
GEMMA_NORM_KERNEL(kRopeThreads, (rope_resident_threads<X, W, A>(kVectors, kPartner) / kRopeThreads))
rotate_heads(RopeParams p) {
  constexpr bool kAligned = kPartner != Partner::kInMemory;
  constexpr int kCount = kItems<X>;
  using Weights = HeldWeights<X, W>;
  const int log2 = p.rows.log2_slots, thread = device::thread_index();
  const int slot = thread & ((1 << log2) - 1);
  const uint32_t group = static_cast<uint32_t>(device::block_index()) * p.groups_of_block + (thread >> log2);
  // Groups without a head of their own load one, but store nothing.
  const bool active = group < p.groups && slot < p.rows.slots;
  const uint32_t some_group = group < p.groups ? group : 0, token_index = p.groups_of_token(some_group);
  uint32_t index = p.first_head + some_group - token_index * p.groups_of_token.divisor;
  const Token<kAligned> token(p, token_index);
  const int step = kAligned ? 1 : item_step(p.rows);
  const auto first = [&](int k) { return first_item<kAligned, X, int>(p.rows, slot, k); };
  Head<X, W> head(p, token, index < p.heads ? index : 0);
  TokenAngles<X, A, kVectors, kPartner> of_token(p, token);

  device::wait_for_previous_kernel(head.x, of_token.cos, of_token.sin);
  if (p.rows.room_for_next) device::allow_next_kernel();  // see normalize_rows
  Vector16 x[kVectors];
  Weights w[kVectors];
  const auto load_to = [&](auto end) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) x[k] = load_items<kAligned, Reuse::kNone, kCount>(head.x, first(k), step, end);
    if (!p.weights[0]) return;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
#pragma unroll
      for (int i = 0; i < Weights::kVectors; ++i)
        w[k].v[i] = load_items<kAligned, Reuse::kSome, Weights::kOfVector>(
            head.weight, first(k) + i * Weights::kOfVector * step, step, end);
    }
  };
  const int slot_end = slot < p.rows.slots ? p.hidden : 0;
  const auto load = [&] {
    if (kAligned && p.fills_groups) {
      load_to(NoEnd());
    } else {
      load_to(slot_end);
    }
  };
  of_token.read_positions();
#pragma unroll
  for (Weights& held : w) held = {};
  load();
  Angles<X, A> angles[of_token.kRotated];
  of_token.find();
  of_token.load(first, step, slot_end, angles);

  for (int left = p.heads_of_group;;) {
    SquareSum<X> squares;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) squares.add(x[k]);
    float sums[1];
    squares.total(sums);
    // The partners, and their weights.
    [[maybe_unused]] Vector16 other[kVectors];
    [[maybe_unused]] Weights other_w[kVectors];
    if constexpr (kPartner == Partner::kInMemory) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        const auto partner = [&](int at) { return at < slot_end && at < p.h.rotary ? p.h.partner(at) : -1; };
        other[k] = load_each<kCount>(head.x, [&](int i) { return partner(first(k) + i * step); });
#pragma unroll
        for (int v = 0; v < Weights::kVectors; ++v)
          other_w[k].v[v] = load_each<Weights::kOfVector>(head.weight, [&](int i) {
            return p.weights[0] ? partner(first(k) + (v * Weights::kOfVector + i) * step) : -1;
          });
      }
    }
    Vector16 now[kVectors];
    Weights now_w[kVectors];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) now[k] = x[k], now_w[k] = w[k];
    X* const out = head.out;
    const int end_of_out = active && index < p.heads ? p.hidden : 0;
    const bool last = !kAligned || --left == 0;
    if (!last) {
      index += p.groups_of_token.divisor;
      head = Head<X, W>(p, token, index < p.heads ? index : 0);
      load();
    }
    const float sum = device::sum_over_lanes(sums[0], 1 << log2);
    if constexpr (kPartner == Partner::kInMemory) device::wave_barrier();  // no lane stores before all have loaded
    if (last) device::allow_next_kernel();
    const float rstd = reciprocal_std<true>(sum, p);
    float weights[kVectors][kCount];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) now_w[k].unpack(p.weight_offset, weights[k]);

    const auto finish = [&](auto is_rounded) {
      using N = Normed<X, decltype(is_rounded)::value>;
      const auto norm = [&](int k) { return N(p, now[k], rstd, weights[k]); };
      const auto store = [&](int k, Vector16 y) { store_items<kAligned, kCount>(out, first(k), step, end_of_out, y); };
      if constexpr (kPartner == Partner::kInThread) {
#pragma unroll
        for (int k = 0; k < kVectors / 2; ++k) {
          const N a = norm(k), b = norm(k + kVectors / 2);
          store(k, a.rotated(b, angles[k]));
          store(k + kVectors / 2, b.rotated(a, angles[k + kVectors / 2]));
        }
      } else {
#pragma unroll
        for (int k = 0; k < kVectors; ++k) {
          const N n = norm(k);
          Vector16 y = n.packed();
          if constexpr (kPartner == Partner::kInVector) {
            if (first(k) < p.h.rotary) y = n.rotated(n.of_neighbours(), angles[k]);
          } else if constexpr (kPartner == Partner::kInOtherLane) {
            if (k == 0) {
              const N partner = n.of_lane(p.partner_distance);
              if (first(k) < p.h.rotary) y = n.rotated(partner, angles[0]);
            }
          } else {
            float f[kCount];
            other_w[k].unpack(p.weight_offset, f);
            const Vector16 turned = n.rotated(N(p, other[k], rstd, f), angles[k]);
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
              const bool is_turned = first(k) + i * step < p.h.rotary;
              uint32_t& word = y.word[i / kWordItems<X>];
              word = choose_bits(is_turned ? element_mask<X>(i) : 0, turned.word[i / kWordItems<X>], word);
            }
          }
          store(k, y);
        }
      }
    };
    bool done = false;
    if constexpr (sizeof(X) < sizeof(float) && std::is_same_v<A, X>) {
      if (p.h.round_rotation) finish(std::true_type()), done = true;
    }
    if (!done) finish(std::false_type());
    if (last) break;
  }
}

}  // namespace gemma_norm::gpu
