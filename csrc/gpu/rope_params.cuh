// What the kernel of heads is told by its launch (rope_launch.cuh), and where it finds a head in memory.
#pragma once

#include "../core/head_params.h"
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

// Whether the kernels are for aligned heads, of which strides of tokens and heads are less than 2^32 bytes.
template <Partner kPartner>
constexpr bool kForAlignedHeads = kPartner != Partner::kInMemory;

// How many threads should be resident on one multiprocessor (see KernelTuning). What a thread holds, and so how many
// registers it needs, depends on its vectors and on whether weights and angles are wider than the elements of x.
// Nothing is spilled at these numbers.
template <class X, class W, class A>
constexpr int rope_resident_threads(int vectors, Partner partner) {
  if (partner == Partner::kInMemory) return kRopeThreads;
  const int threads = std::is_same_v<X, float16> ? 640 : 768;  // compilers keep unpacked float16 in registers
  return vectors > 2 ? 384 : threads - 128 * (sizeof(W) > sizeof(X)) - 128 * (sizeof(A) > sizeof(X));
}

// A stride in bytes. Kernels for aligned heads have narrow ones: these take half the registers, and a product with one
// takes one instruction, not three.
template <bool kNarrow>
using Stride = std::conditional_t<kNarrow, uint32_t, int64_t>;
// A tensor with something for each token. The strides are those of RowParams, but in bytes.
template <bool kNarrow>
struct OfTokens {
  void* data;
  Stride<kNarrow> strides[kMaxRowDims];
};
template <bool kNarrow>
struct OfHeads {
  OfTokens<kNarrow> tokens;
  Stride<kNarrow> stride;  // from head to head, in bytes
};

// Heads that some blocks of the launch copy: those of a gate, then those of v (rope_copies.cuh). The blocks take turns,
// so that heads that are neighbours in memory are read at about the same time: of every `period`, the first
// `blocks_of_rope` rotate, and the others copy.
template <bool kNarrow>
struct RopeCopies {
  uint32_t heads_of_gate;
  uint32_t groups;  // as RopeParams::groups
  uint32_t blocks_of_rope;
  Divider period;
  Divider groups_of_token;
  OfHeads<kNarrow> from[2], to[2];
};

// What the kernel needs. A GPU's first access to each 64 bytes of a kernel's parameters takes time, so those that few
// calls need come last.
template <bool kNarrow>
struct RopeParams {
  uint32_t heads_copied;       // of a token; 0: nothing is copied, and `copies` is not read
  int32_t groups_of_block;     // groups of lanes
  uint32_t groups;             // that have something to do in this launch
  Divider groups_of_token;     // a token's heads are divided among so many
  int32_t heads_of_group;      // at most; 1 with kInMemory
  uint32_t first_head;         // of this launch
  uint32_t heads_of_q, heads;  // of a token; all of them
  int32_t hidden;
  int32_t fills_groups;  // every lane of a group has kVectors whole vectors
  int32_t int32_positions;
  float eps, inv_hidden, weight_offset;  // as in RowParams, but weight_offset is 1 without weights
  Launch rows;
  const void* weights[2];
  OfTokens<kNarrow> cos, sin;     // with a cache, both are the cache, whose tokens have no strides
  OfTokens<kNarrow> positions;    // with a cache
  OfHeads<kNarrow> x[2], out[2];  // of q and of k
  int32_t partner_distance;       // kInOtherLane
  Rotation h;
  RopeCopies<kNarrow> copies;
};

// `count` times the stride.
GEMMA_NORM_DEVICE int64_t steps(uint32_t count, uint32_t stride) {
  return static_cast<int64_t>(static_cast<uint64_t>(count) * stride);
}
GEMMA_NORM_DEVICE int64_t steps(uint32_t count, int64_t stride) { return count * stride; }

template <bool kNarrow>
struct Token : RowIndex {
  GEMMA_NORM_DEVICE Token(const RopeParams<kNarrow>& p, uint32_t token) : RowIndex(p.rows.inner_rows, token) {}
  // Where it begins, in bytes.
  GEMMA_NORM_DEVICE int64_t offset(const OfTokens<kNarrow>& of) const {
    return steps(inner, of.strides[1]) + steps(outer, of.strides[0]);
  }
  template <class T>
  GEMMA_NORM_DEVICE T* pointer(const OfTokens<kNarrow>& of) const {
    return reinterpret_cast<T*>(static_cast<char*>(of.data) + offset(of));
  }
};

// No parameter is indexed by a variable, nor its address chosen: nvcc would copy all of them to local memory.
template <class T>
GEMMA_NORM_DEVICE T choose(bool is_second, T second, T first) {
  return is_second ? second : first;
}

// Where a head of a token is, in the second of two tensors or in the first.
template <bool kNarrow>
GEMMA_NORM_DEVICE char* find_head(Token<kNarrow> token, uint32_t head, bool is_second, const OfHeads<kNarrow>& second,
                                  const OfHeads<kNarrow>& first) {
  const OfTokens<kNarrow> tokens = {choose(is_second, second.tokens.data, first.tokens.data),
                                    {choose(is_second, second.tokens.strides[0], first.tokens.strides[0]),
                                     choose(is_second, second.tokens.strides[1], first.tokens.strides[1])}};
  return token.template pointer<char>(tokens) + steps(head, choose(is_second, second.stride, first.stride));
}

}  // namespace gemma_norm::gpu
