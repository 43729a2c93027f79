// The norms of q and k, head by head, and their rotation by the angles of each token (RoPE), as attention layers with
// q/k norms have it (Qwen3, Qwen3-Next, Qwen3.5, Gemma 3):
//
//   n = x * rstd * (gemma ? 1 + weight : weight)      for each head x of q and of k; weight is that of q or of k
//   y[i] = round(n[i] * cos[i] + r[i] * sin[i])       for i < rotary
//   y[i] = round(n[i])                                otherwise
//
// r is n with the elements of each pair swapped and the first of them negated. The elements of a pair are rotary / 2
// apart or, interleaved, neighbours. All arithmetic is in float32, and products and sum are rounded separately. With
// round_rotation, n is rounded to x's dtype and, if cos and sin have that dtype, so are both products; with
// round_each_step, so is x * rstd.
//
// cos and sin have an element for each i. In place of them there can be a cache, in which a row has the cosines of all
// pairs and then their sines, and the row of each token, its position. With mrope_section a token has three positions,
// and each pair takes one of them (HeadParams::axis).
//
// The overload "copies" also copies the heads of a gate and of v, which models keep beside those of q and k, to new
// row-major tensors. Of what is not given, the copy has no heads.
#pragma once

#include "../core/head_params.h"
#include "../core/op_info.h"

namespace gemma_norm {

struct QkNormRope {
  static constexpr OperandRule kInputs[] = {
      named("q", {kX, Extent::kRowsOfHeads, DTypes::kFloat}),
      named("q_weight", optional(kWeightRule)),
      {kKey, Extent::kHeads, DTypes::kLikeX},
      optional(like_weight(kKeyWeight)),
      optional({kCos, Extent::kAngles, DTypes::kXOrFloat32}),
      optional({kSin, Extent::kAngles, DTypes::kLikeCos}),
      optional({kCosSinCache, Extent::kTable, DTypes::kXOrFloat32}),
      optional({kPositions, Extent::kPositions, DTypes::kInteger}),
  };
  static constexpr OperandRule kOutputs[] = {
      named("q_out", output(kOut, Use::kNew, kX)),
      {kKeyOut, Extent::kHeads, DTypes::kLikeX, Use::kNew, kKey},
  };
  static constexpr OperandRule kInPlace[] = {
      named("q_out", output(kOut, Use::kInPlace, kX)),
      {kKeyOut, Extent::kHeads, DTypes::kLikeX, Use::kInPlace, kKey},
  };
  // Operands that mean something else elsewhere stand for v, its copy and the gate's: each further operand would make
  // the parameters of every kernel longer.
  static constexpr OperandRule kCopies[] = {
      optional({kGate, Extent::kHeads, DTypes::kLikeX}),
      named("v", optional({kValue, Extent::kHeads, DTypes::kLikeX})),
      kOutputs[0],
      kOutputs[1],
      named("gate_out", optional({kGateOut, Extent::kHeads, DTypes::kLikeX, Use::kNew, kGate})),
      named("v_out", optional({kValueOut, Extent::kHeads, DTypes::kLikeX, Use::kNew, kValue})),
  };
  static constexpr auto kRules = joined(kInputs, kOutputs);
  static constexpr auto kFusedRules = joined(kInputs, kInPlace);
  static constexpr auto kCopiesRules = joined(kInputs, kCopies);
  static constexpr OpInfo kInfos[] = {
      {"qk_norm_rope", "qk_norm_rope",
       "(Tensor q, Tensor k, Tensor? q_weight=None, Tensor? k_weight=None, Tensor? cos=None, Tensor? sin=None, "
       "Tensor? cos_sin_cache=None, Tensor? positions=None, float eps=1e-6, bool gemma=False, "
       "bool round_each_step=False, bool round_rotation=False, bool interleaved=False, int[]? mrope_section=None, "
       "bool mrope_interleaved=False) -> (Tensor, Tensor)",
       "qk_norm_rope", kRules.all},
      {"qk_norm_rope", "qk_norm_rope.copies",
       "(Tensor q, Tensor k, Tensor? q_weight=None, Tensor? k_weight=None, Tensor? cos=None, Tensor? sin=None, "
       "Tensor? cos_sin_cache=None, Tensor? positions=None, float eps=1e-6, bool gemma=False, "
       "bool round_each_step=False, bool round_rotation=False, bool interleaved=False, int[]? mrope_section=None, "
       "bool mrope_interleaved=False, Tensor? gate=None, Tensor? v=None) -> (Tensor, Tensor, Tensor, Tensor)",
       "qk_norm_rope", kCopiesRules.all},
      {"fused_qk_norm_rope", "fused_qk_norm_rope",
       "(Tensor(a!) q, Tensor(b!) k, Tensor? q_weight=None, Tensor? k_weight=None, Tensor? cos=None, "
       "Tensor? sin=None, Tensor? cos_sin_cache=None, Tensor? positions=None, float eps=1e-6, bool gemma=False, "
       "bool round_each_step=False, bool round_rotation=False, bool interleaved=False, int[]? mrope_section=None, "
       "bool mrope_interleaved=False) -> ()",
       "qk_norm_rope", kFusedRules.all},
  };
};

}  // namespace gemma_norm
