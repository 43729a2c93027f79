// The kernels. Each puts the parts of an operator (policies.cuh) one after the other:
//
//   source      s, such as round(x + residual), which is also stored
//               (where x has a norm of its own, that comes first, with a statistic of its own)
//   statistic   rstd = 1 / sqrt(mean(s^2) + eps)
//   finish      y, from s, rstd, the weight and the gate
//
// All kernels add the squares in the same order: the vectors of each slot, then the slots as a binary tree. This order
// depends on hidden and dtype (shapes.h) and, for rows of more than 8192 vectors, on whether the GPU has clusters.
#pragma once

#include "policies.cuh"
#include "quantize.cuh"
#include "reduce.cuh"
#include "row.cuh"
#include "tuning.h"

namespace gemma_norm::gpu {

template <class V>
constexpr bool kWideWeights = FinishOf<V>::kWeightVectors == 2;
template <class V>
constexpr Held held() {
  using Form = typename V::Form;
  if (Form::kQuantizes && Form::kTwoRows && !Form::kGated) return Held::kTwoQuantizedRows;
  if (Form::kQuantizes) return Form::kGated || kWideWeights<V> ? Held::kQuantizedRowAndMore : Held::kQuantizedRow;
  if (Form::kGated) return Held::kRowAndGates;
  if (Form::kNormsX) return Held::kTwoRowsTwoWeights;
  if (Form::kTwoRows) return Held::kTwoRows;
  return kWideWeights<V> ? Held::kRowWideWeights : Held::kRow;
}
template <class V>
constexpr Held kHeld = held<V>();
// Of the numbers that the threads of a row exchange: those of x, if it has a norm of its own, those of s, and the
// largest element, if it decides the scale.
template <class V>
constexpr int kSums = V::Form::kNormsX ? 2 : 1;
template <class V>
constexpr int kExchanges = kSums<V> + V::Form::kQuantizes;
template <class V, int kRow>
constexpr int kResidentThreads = kKernels[kRow].resident_threads[static_cast<int>(kHeld<V>)];

// The slot and row of a thread. With kPairs, two threads share a slot, and this thread has only the slot's vector
// number `vector`.
template <Scope kScope, bool kPairs = false>
struct Place {
  int slot;
  uint32_t row;
  int vector = 0;

  explicit GEMMA_NORM_DEVICE Place(const Launch& launch) : slot(device::thread_index()), row(device::block_index()) {
    if constexpr (kScope == Scope::kWave) {
      const int log2 = launch.log2_slots + kPairs;
      row = device::block_index() * (launch.block_threads >> log2) + (slot >> log2);
      if constexpr (kPairs) vector = slot >> launch.log2_slots & 1;
      slot &= (1 << launch.log2_slots) - 1;
    }
    if constexpr (kScope == Scope::kCluster) {
      slot += device::cluster_rank() * launch.block_threads;
      row = device::cluster_index();
    }
  }
  // Only the last block of kWave has threads beyond the rows.
  GEMMA_NORM_DEVICE bool has_row(const RowParams& p) const {
    return kScope != Scope::kWave || row < static_cast<uint32_t>(p.rows);
  }
};

// Has the arguments loaded that a kernel needs before it can ask for a row.
template <class V>
GEMMA_NORM_DEVICE void need_arguments(const RowParams& p, const Launch& launch) {
  using Form = typename V::Form;
  const auto need = [&](auto... operands) {
    device::need_together(p.rows, p.hidden, p.eps, p.inv_hidden, p.weight_offset, launch.slots, launch.log2_slots,
                          launch.block_threads, launch.inner_rows.divisor, launch.inner_rows.multiplier,
                          launch.inner_rows.shift, p.data[operands]..., p.strides[operands][0]...,
                          p.strides[operands][1]...);
  };
  need(kX, kOut);
  if constexpr (V::kHasWeight) device::need_together(p.data[kWeight]);
  if constexpr (Form::kGroups) device::need_together(p.strides[kWeight][0], p.strides[kWeight][1]);
  if constexpr (Form::kNormsX) device::need_together(p.data[kPostWeight]);
  if constexpr (Form::kTwoRows && !Form::kGated) need(kResidual, kResidualOut);
  if constexpr (Form::kTwoRows && !Form::kGated && !Form::kNormsX) need(kPost);
  if constexpr (Form::kGated) {
    need(kGate);
    device::need_together(p.sigmoid);
  }
  if constexpr (Form::kQuantizes)
    device::need_together(p.data[kScale], p.data[kScaleOut], p.data[kYOut], p.strides[kScaleOut][0],
                          p.strides[kScaleOut][1], p.round_first, p.scale_ue8m0, p.scale_group, p.scale_stride,
                          p.scale_dtype, p.format.dtype, p.format.largest, p.format.inverse_largest,
                          launch.log2_group_vectors, launch.group_lanes);
}

// Normalises rows that are read once and held in registers, kVectors vectors a slot. kScope is kWave (a block has
// several rows, each on a power of two of lanes of one wave), kBlock (a block has one row) or kCluster (a cluster of
// blocks has one row). A block has at most kThreads threads. kWave with one vector means that two threads share a slot
// of two vectors.
template <class V, Scope kScope, int kVectors, int kThreads, bool kAligned>
GEMMA_NORM_KERNEL(kThreads, (kAligned ? kResidentThreads<V, find_kernel(kScope, kVectors, kThreads)> / kThreads : 1))
normalize_rows(RowParams p, Launch launch) {
  constexpr bool kPairs = kScope == Scope::kWave && kVectors == 1;
  // No plan for a GPU without clusters has these kernels: compiled for such a GPU, they are empty.
  if constexpr ((kScope == Scope::kCluster || kPairs) && !device::kTargetHasClusters) return;
  using S = typename V::S;
  using Order = LoadOrder<kVectors, kThreads, kHeld<V>, sizeof(S), kWideWeights<V>, V::Form::Formula::kGated,
                          V::kRoundEachStep, kAligned>;
  using Source = SourceOf<typename V::Form::Source, V, kVectors, Order, Reuse::kNone>;
  using Finish = FinishOf<V>;

  // On AMD, unaligned kernels take more scalar registers, and would spill some if all arguments had theirs at once
  // (T152).
  if constexpr (kAligned) need_arguments<V>(p, launch);
  open_exchanges<kScope, SquareSum<S>::kNumbers, kExchanges<V>>();
  const Place<kScope, kPairs> place(launch);
  // A thread that owns no part of a row still takes part in the exchanges.
  const bool active = place.has_row(p) && place.slot < launch.slots;
  const int step = kAligned ? 1 : item_step(launch);
  // The pointers below point to element `start` of the row, and all indices count from there.
  const int start = kAligned ? first_item<kAligned, S, int>(launch, place.slot, place.vector) : 0;
  const auto first = [&](int k) { return first_item<kAligned, S, int>(launch, kAligned ? 0 : place.slot, k); };
  const int end = active ? static_cast<int>(p.hidden) - start : 0;
  // All threads of a block have the same row unless kScope is kWave; the compiler then keeps it in scalar registers.
  const RowIndex row(launch.inner_rows, kScope != Scope::kWave || active ? place.row : 0);
  const Source source(p, row, start);
  const Finish finish(p, row, start);
  Vector16 s[kVectors];
  typename Source::Second second[kVectors];
  typename Finish::Gate gate[kVectors];
  typename Finish::HeldWeights w[kVectors], post_w[kVectors];
  const auto load_weights = [&](auto end) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) finish.template load<kAligned>(w[k], finish.weight, first(k), step, end);
  };
  const auto load = [&](auto end) {
    source.template load<kAligned>(s, second, first, step, end);
    if constexpr (Order::kWholeRows) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) finish.template load_gate<kAligned>(gate[k], first(k), step, end);
    }
    if constexpr (V::Form::kNormsX && Order::kEarlyPostWeights) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k)
        finish.template load<kAligned>(post_w[k], finish.post_weight, first(k), step, end);
    }
    if constexpr (Order::kEarlyWeights && !Order::kWeightsAfterRows) load_weights(end);
  };

  // Nothing above reads memory that the previous kernel may have written.
  device::wait_for_previous_kernel(source.x, finish.out, finish.weight, finish.post_weight, finish.gate);
  // Overlapped launches: from here on the blocks of the next kernel may start; they stop at their own
  // wait_for_previous_kernel(). They are allowed this early only if a second grid of this size fits on the GPU as well.
  // Otherwise its first blocks would crowd some multiprocessors, so they are allowed after the exchange.
  if (launch.room_for_next) device::allow_next_kernel();
  if (kAligned && device::in_all_lanes(first(kVectors - 1) < end)) {
    load(NoEnd{});  // without conditions, so that the loads go out back to back
  } else {
    load(end);
  }
  const QuantizerOf<V> quantizer(p, row, finish.out);
  [[maybe_unused]] const Groups<kScope> groups{launch, place.slot + place.vector * launch.slots};
  if constexpr (V::Form::kQuantizes) groups.open();
  if constexpr (V::Form::kNormsX) {
    SquareSum<S> squares;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      squares.add(s[k]);
      if constexpr (Order::kKeepPacked) device::keep_packed(&s[k]);
    }
    float sums[SquareSum<S>::kNumbers];
    squares.total(sums);
    sum_over_row<kScope, kThreads, kExchanges<V>>(sums, launch, 0);
    const float rstd = reciprocal_std<Order::kQuickRoot>(sums[0], p);
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (Order::kNormOneByOne && !Source::kSumsBeforeStores && !(first(k) < end)) break;
      if constexpr (!Order::kEarlyPostWeights) {
        if (k % Order::kPostBatch == 0)
          for (int i = k; i < k + Order::kPostBatch; ++i)
            finish.template load<kAligned>(post_w[i], finish.post_weight, first(i), step, end);
      }
      s[k] = finish.norm(s[k], post_w[k], gate[k], rstd);
      if constexpr (Order::kKeepPacked) device::keep_packed(&s[k]);
    }
  }
  source.template sum<kAligned>(s, second, first, step, end, [&] {
    if constexpr (Order::kEarlyWeights) {
      if constexpr (Order::kWeightsAfterRows) load_weights(end);
#pragma unroll
      for (int k = 0; k < kVectors; ++k) finish.wait_for(w[k]);
    }
  });
  if constexpr (Order::kEarlyWeights && Order::kWeightsAfterRows && !Source::kSumsBeforeStores) load_weights(end);

  SquareSum<S> squares;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    if constexpr (kPairs) {
      squares.add_pair(s[k], place.vector, launch.log2_slots);
    } else {
      squares.add(s[k]);
    }
    if constexpr (Order::kKeepPacked) device::keep_packed(&s[k]);
  }
  float sums[SquareSum<S>::kNumbers];
  squares.total(sums);
  if constexpr (Order::kEarlyGate) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) finish.activate_gate(gate[k]);
  }
  sum_over_row<kScope, kThreads, kExchanges<V>>(sums, launch, kSums<V> - 1);
  device::allow_next_kernel();
  const float rstd = reciprocal_std<Order::kQuickRoot>(sums[0], p);

  if constexpr (V::Form::kQuantizes) {
    float y[kVectors][Finish::kCount];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      constexpr int kBatch = Order::kBatch;
      if constexpr (!Order::kEarlyWeights) {
        if (k % kBatch == 0)
          for (int i = k; i < k + kBatch; ++i) finish.template load<kAligned>(w[i], finish.weight, first(i), step, end);
      }
      if constexpr (!Order::kEarlyGate) finish.activate_gate(gate[k]);
      if (Order::kNormOneByOne && !(first(k) < end)) {
        for (float& f : y[k]) f = 0.0f;
        continue;
      }
      finish.to_quantize(s[k], w[k], gate[k], rstd, y[k]);
    }
    if (p.data[kYOut]) {
      typename V::X* const y_out = row.pointer<typename V::X>(p, kYOut, start);
#pragma unroll
      for (int k = 0; k < kVectors; ++k)
        store_items<kAligned, Finish::kCount>(y_out, first(k), step, end, pack_items<typename V::X>(y[k]));
    }
    quantize_held<kScope, kExchanges<V>>(quantizer, groups, 1 << (launch.log2_slots + kPairs), y, start, first, end);
  } else {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (Order::kStoreOneByOne && !(first(k) < end)) break;
      if constexpr (!Order::kEarlyWeights) {
        if (k % Order::kBatch == 0)  // in batches, since the compiler moves no load up past a store
          for (int i = k; i < k + Order::kBatch; ++i) {
            finish.template load<kAligned>(w[i], finish.weight, first(i), step, end);
            if constexpr (!Order::kWholeRows) finish.template load_gate<kAligned>(gate[i], first(i), step, end);
          }
      }
      if constexpr (!Order::kEarlyGate) finish.activate_gate(gate[k]);
      finish.template store<kAligned>(s[k], w[k], gate[k], rstd, first(k), step, end);
    }
  }
}

// Normalises rows in two passes: the first reads a row for the sum of squares, the second reads it again for the
// output, from the cache if it is still there. Where x has a norm of its own, a pass over x comes before. For rows that
// are too large for the registers of a block, and for unaligned ones. A row has a block, or what kScope says: a cluster
// of blocks, or a power of two of lanes of a wave.
template <class V, Scope kScope, int kThreads, bool kAligned>
GEMMA_NORM_KERNEL(kThreads, 1)
normalize_in_two_passes(RowParams p, Launch launch) {
  if constexpr (kScope == Scope::kCluster && !device::kTargetHasClusters) return;
  using S = typename V::S;
  open_exchanges<kScope, SquareSum<S>::kNumbers, kExchanges<V>>();
  const Place<kScope> place(launch);
  const int step = item_step(launch);
  const bool active = place.has_row(p) && place.slot < launch.slots;
  const int64_t end = active ? p.hidden : 0;
  const RowIndex row(launch.inner_rows, kScope != Scope::kWave || active ? place.row : 0);
  using Source = SourceOf<typename V::Form::Source, V, 1, TwoPassOrder, Reuse::kSome>;
  using Finish = FinishOf<V>;
  const Source source(p, row, 0);
  device::wait_for_previous_kernel(source.x);
  // After the wait, so that the pointers of the last pass need no registers before it: a thread of a block of 1024 has
  // 64, and nvcc spilled some of these pointers (T154).
  const Finish finish(p, row, 0);

  float x_rstd = 1.0f;
  if constexpr (V::Form::kNormsX) {
    SquareSum<S> squares;
    for (int k = 0; k < launch.vectors; ++k) {
      const int64_t first = first_item<kAligned, S, int64_t>(launch, place.slot, k);
      squares.add(load_items<kAligned, Reuse::kSome, kItems<S>>(source.x, first, step, end));
    }
    float sums[SquareSum<S>::kNumbers];
    squares.total(sums);
    sum_over_row<kScope, kThreads, kExchanges<V>>(sums, launch, 0);
    x_rstd = reciprocal_std<false>(sums[0], p);
  }

  SquareSum<S> squares;
  for (int k = 0; k < launch.vectors; ++k) {
    const auto first = [&](int) { return first_item<kAligned, S, int64_t>(launch, place.slot, k); };
    Vector16 s[1];
    typename Source::Second second[1];
    source.template load<kAligned>(s, second, first, step, end);
    if constexpr (V::Form::kNormsX) {
      typename Finish::HeldWeights w;
      finish.template load<kAligned>(w, finish.post_weight, first(0), step, end);
      s[0] = finish.norm(s[0], w, {}, x_rstd);
    }
    source.template sum<kAligned>(s, second, first, step, end, [] {});
    squares.add(s[0]);
  }
  float sums[SquareSum<S>::kNumbers];
  squares.total(sums);
  sum_over_row<kScope, kThreads, kExchanges<V>>(sums, launch, kSums<V> - 1);
  device::allow_next_kernel();
  const float rstd = reciprocal_std<false>(sums[0], p);

  if constexpr (V::Form::kQuantizes) {
    const auto first = [&](int k) { return first_item<kAligned, S, int64_t>(launch, place.slot, k); };
    const auto y_of = [&](int k, float(&y)[Finish::kCount]) {
      typename Finish::Gate gate;
      typename Finish::HeldWeights w;
      finish.template load_gate<kAligned>(gate, first(k), step, end);
      finish.template load<kAligned>(w, finish.weight, first(k), step, end);
      finish.activate_gate(gate);
      finish.to_quantize(source.template read_again<kAligned>(first(k), step, end), w, gate, rstd, y);
    };
    quantize_in_passes<V>(Quantizer<V>(p, row, finish.out), row, launch, y_of, first, step, end);
  } else {
    for (int k = 0; k < launch.vectors; ++k) {
      const int64_t first = first_item<kAligned, S, int64_t>(launch, place.slot, k);
      typename Finish::Gate gate;
      typename Finish::HeldWeights w;
      finish.template load_gate<kAligned>(gate, first, step, end);
      finish.template load<kAligned>(w, finish.weight, first, step, end);
      finish.activate_gate(gate);
      const Vector16 s = source.template read_again<kAligned>(first, step, end);
      finish.template store<kAligned>(s, w, gate, rstd, first, step, end);
    }
  }
}

}  // namespace gemma_norm::gpu
