// Heads that are copied beside those that are rotated, by blocks of the same launch.
#pragma once

#include "rope_params.cuh"

namespace gemma_norm::gpu {

// One group of lanes copies one head or, one after another, several of a token. A lane has the elements that it would
// have of a head that is rotated.
template <class X, int kVectors, bool kAligned>
GEMMA_NORM_DEVICE void copy_heads(const RopeParams<kAligned>& p, uint32_t group, int slot) {
  const RopeCopies<kAligned>& c = p.copies;
  if (group >= c.groups) return;
  const uint32_t token_index = c.groups_of_token(group), groups = c.groups_of_token.divisor;
  uint32_t index = group - token_index * groups;
  const Token<kAligned> token(p, token_index);
  const int step = kAligned ? 1 : item_step(p.rows), end = slot < p.rows.slots ? p.hidden : 0;
  const auto first = [&](int k) { return first_item<kAligned, X, int>(p.rows, slot, k); };
  const auto find = [&](const OfHeads<kAligned>(&of)[2]) {
    const bool is_v = index >= c.heads_of_gate;
    return reinterpret_cast<X*>(find_head(token, is_v ? index - c.heads_of_gate : index, is_v, of[1], of[0]));
  };
  const X* from = find(c.from);
  Vector16 x[kVectors];
  const auto load = [&] {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) x[k] = load_items<kAligned, Reuse::kNone, kItems<X>>(from, first(k), step, end);
  };
  device::wait_for_previous_kernel(from);
  if (p.rows.room_for_next) device::allow_next_kernel();
  load();
  for (;;) {
    X* const to = find(c.to);
    Vector16 now[kVectors];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) now[k] = x[k];
    index += groups;
    const bool last = index >= p.heads_copied;
    if (!last) from = find(c.from), load();  // the next head is asked for before the present one is written
#pragma unroll
    for (int k = 0; k < kVectors; ++k) store_items<kAligned, kItems<X>>(to, first(k), step, end, now[k]);
    if (last) return;
  }
}

}  // namespace gemma_norm::gpu
