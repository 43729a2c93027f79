// The kernel that normalises the heads of q and k and rotates them; ops/qk_norm_rope.h has the formulas.
//
// A head has as many lanes of a wave as a row of rms_norm of that size (shapes.h), so the norm has its bits. Such a
// group of lanes works on one head or, one after another, on several heads of the same token: then the angles and
// weights are read once for all of them, and the next head is asked for before the present one is finished. No lane
// reads what another lane of the group may have written, so heads can be written in place.
#pragma once

#include "policies.cuh"
#include "reduce.cuh"
#include "rope_angles.cuh"
#include "rope_copies.cuh"

namespace gemma_norm::gpu {

// A head of a token. q's heads come before k's.
template <class X, class W>
struct Head {
  const X* x;
  X* out;
  const W* weight;  // null if there is none

  template <bool kNarrow>
  GEMMA_NORM_DEVICE Head(const RopeParams<kNarrow>& p, Token<kNarrow> token, uint32_t head) {
    const bool is_k = head >= p.heads_of_q;
    if (is_k) head -= p.heads_of_q;
    x = reinterpret_cast<const X*>(find_head(token, head, is_k, p.x[1], p.x[0]));
    out = reinterpret_cast<X*>(find_head(token, head, is_k, p.out[1], p.out[0]));
    weight = static_cast<const W*>(choose(is_k, p.weights[1], p.weights[0]));
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
GEMMA_NORM_DEVICE void normalize(const Rotation& h, Vector16 x, float rstd, const float (&weight)[kItems<X>],
                                 float (&n)[kItems<X>]) {
  unpack_items<X>(x, n);
#pragma unroll
  for (float& v : n) v *= rstd;
  if constexpr (kRounded) {
    if (h.round_norm) unpack_items<X>(pack_items<X>(n), n);
  }
#pragma unroll
  for (int i = 0; i < kItems<X>; ++i) n[i] *= weight[i];
}

// A vector's elements, normalised, and what they are rotated to: in float32, rounded at the end. With round_rotation
// and angles in float32, the norm is rounded before.
template <class X, class A, bool kRounded>
struct Normed {
  static constexpr int kCount = kItems<X>;
  float f[kCount];

  GEMMA_NORM_DEVICE Normed(const Rotation& h, Vector16 x, float rstd, const float (&weight)[kCount]) {
    constexpr bool kMayRound = sizeof(A) > sizeof(X);
    normalize<X, kMayRound>(h, x, rstd, weight, f);
    if constexpr (kMayRound) {
      if (h.round_rotation) unpack_items<X>(pack_items<X>(f), f);
    }
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
struct Normed<X, X, true> {
  static constexpr int kCount = kItems<X>;
  Vector16 v;

  GEMMA_NORM_DEVICE Normed(const Rotation& h, Vector16 x, float rstd, const float (&weight)[kCount]) {
    float n[kCount];
    normalize<X, true>(h, x, rstd, weight, n);
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

// Has the arguments loaded that a kernel for aligned heads needs. Called after the branch for copies: called before, it
// would have them held while heads are copied, and compilers for gfx942 spill some (T155).
GEMMA_NORM_DEVICE void need_arguments(const RopeParams<true>& p) {
  const auto need = [](const OfTokens<true>& of) { device::need_together(of.data, of.strides[0], of.strides[1]); };
  const auto need_heads = [&](const OfHeads<true>& of) { need(of.tokens), device::need_together(of.stride); };
  device::need_together(p.groups_of_block, p.groups, p.groups_of_token.divisor, p.groups_of_token.multiplier,
                        p.groups_of_token.shift, p.heads_of_group, p.first_head, p.heads_of_q, p.heads, p.hidden,
                        p.fills_groups, p.int32_positions, p.eps, p.inv_hidden, p.weight_offset, p.rows.slots,
                        p.rows.inner_rows.divisor, p.rows.inner_rows.multiplier, p.rows.inner_rows.shift, p.weights[0],
                        p.weights[1], p.h.rotary, p.h.interleaved, p.h.cache_rows, p.h.cache_stride, p.h.axis_stride);
  need(p.cos), need(p.sin), need(p.positions);
  need_heads(p.x[0]), need_heads(p.x[1]), need_heads(p.out[0]), need_heads(p.out[1]);
}

template <class X, class W, class A, int kVectors, Partner kPartner>
GEMMA_NORM_KERNEL(kRopeThreads, (rope_resident_threads<X, W, A>(kVectors, kPartner) / kRopeThreads))
rotate_heads(RopeParams<kForAlignedHeads<kPartner>> p) {
  constexpr bool kAligned = kForAlignedHeads<kPartner>;
  constexpr int kCount = kItems<X>;
  using Weights = HeldWeights<X, W>;
  const int log2 = p.rows.log2_slots, thread = device::thread_index();
  const int slot = thread & ((1 << log2) - 1);
  uint32_t block = device::block_index();
  if (p.heads_copied) {
    const uint32_t periods = p.copies.period(block), turn = block - periods * p.copies.period.divisor;
    if (turn >= p.copies.blocks_of_rope) {
      block = periods * (p.copies.period.divisor - p.copies.blocks_of_rope) + turn - p.copies.blocks_of_rope;
      return copy_heads<X, kVectors, kAligned>(p, block * p.groups_of_block + (thread >> log2), slot);
    }
    block = periods * p.copies.blocks_of_rope + turn;
  }
  if constexpr (kAligned) need_arguments(p);
  const uint32_t group = block * p.groups_of_block + (thread >> log2);
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
      using N = Normed<X, A, decltype(is_rounded)::value>;
      const auto norm = [&](int k) { return N(p.h, now[k], rstd, weights[k]); };
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
            const Vector16 turned = n.rotated(N(p.h, other[k], rstd, f), angles[k]);
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
