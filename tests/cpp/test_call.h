// A call that check() lets through, which tests change.
#pragma once

#include <optional>
#include <vector>

#include "core/check.h"
#include "ops/ops.h"

namespace gemma_norm {

struct Place {
  int64_t first;  // address, in elements of two bytes
  std::vector<int64_t> sizes, strides;
  DType dtype = DType::kBFloat16;
  const char* dtype_name = "bfloat16";

  Tensor tensor() const {
    return {reinterpret_cast<void*>(first * 2), sizes.data(), strides.data(),
            static_cast<int32_t>(sizes.size()), dtype,        dtype_name};
  }
};

// Nothing is read or written at the addresses.
struct TestCall {
  Place x{10000, {4, 8}, {8, 1}}, out{30000, {4, 8}, {8, 1}};
  std::optional<Place> weight = Place{20000, {8}, {1}}, residual, post, gate, post_weight, sum, dout, dsum, dx, dweight;
  std::optional<Place> k, k_weight, cos, sin, cache, positions, scale, k_out, scales, gate_out, global_scale, y;
  Options options;
  OpInfo op{"op", "op", "", "", RmsNorm::kRules};

  TestCall& add() {
    op = OpInfo("op", "op", "", "", AddRmsNorm::kRules);
    residual = Place{40000, {4, 8}, {8, 1}};
    sum = Place{60000, {4, 8}, {8, 1}};
    return *this;
  }
  TestCall& add_post() {
    add().post = Place{50000, {4, 8}, {8, 1}};
    return *this;
  }
  TestCall& gated() {
    op = OpInfo("op", "op", "", "", GatedRmsNorm::kRules);
    gate = Place{70000, {4, 8}, {8, 1}};
    return *this;
  }
  TestCall& norm_add() {
    op = OpInfo("op", "op", "", "", RmsNormAddRmsNorm::kRules);
    residual = Place{40000, {4, 8}, {8, 1}};
    post_weight = Place{90000, {8}, {1}};
    sum = Place{60000, {4, 8}, {8, 1}};
    return *this;
  }

  // Two dimensions of tokens, 2 x 3, whose angles are those of the second alone; 4 heads of q and of k.
  TestCall& rotated() {
    op = OpInfo("op", "op", "", "", QkNormRope::kRules);
    x = Place{10000, {2, 3, 4, 8}, {96, 32, 8, 1}};
    out = Place{30000, {2, 3, 4, 8}, {96, 32, 8, 1}};
    k = Place{40000, {2, 3, 4, 8}, {96, 32, 8, 1}};
    k_out = Place{50000, {2, 3, 4, 8}, {96, 32, 8, 1}};
    k_weight = Place{60000, {8}, {1}};
    cos = Place{70000, {2, 3, 4}, {0, 4, 1}};
    sin = Place{80000, {2, 3, 4}, {0, 4, 1}};
    return *this;
  }

  // With a gate of 2 heads, but without v.
  TestCall& with_copies() {
    rotated().op = OpInfo("op", "op", "", "", QkNormRope::kCopiesRules);
    gate = Place{90000, {2, 3, 2, 8}, {48, 16, 8, 1}};
    gate_out = Place{95000, {2, 3, 2, 8}, {48, 16, 8, 1}};
    return *this;
  }

  // In groups of 4 elements, whose scales are column-major.
  TestCall& quantised() {
    op = RmsNormQuant::kInfos[0];
    op.name = "op";
    options.scale_group_size = 4;
    options.dtype_name = out.dtype_name = "float8_e4m3fn";
    out.dtype = DType::kFloat8E4M3FN;
    scales = Place{40000, {4, 2}, {1, 4}, DType::kFloat32, "float32"};
    return *this;
  }
  TestCall& quantised_by(Place given) {
    quantised().op = RmsNormQuant::kInfos[1];
    op.name = "op";
    options.scale_group_size = kWholeRow;
    scales.reset();
    scale = given;
    return *this;
  }

  // Two groups of a row are gated and normalised apart. A group has one scale.
  TestCall& gated_and_quantised() {
    quantised().op = GatedRmsNormQuant::kInfos[0];
    op.name = "op";
    gate = Place{70000, {4, 8}, {8, 1}};
    options.group_size = 4;
    return *this;
  }

  // Of the gradients. `out` is no operand then.
  TestCall& backward() {
    op = OpInfo("op", "op", "", "", RmsNormBackward::kRules);
    dout = Place{40000, {4, 8}, {8, 1}};
    dx = Place{60000, {4, 8}, {8, 1}};
    dweight = Place{80000, {8}, {1}};
    return *this;
  }
  TestCall& backward_with_dsum() {
    backward().dsum = Place{50000, {4, 8}, {8, 1}};
    return *this;
  }

  Status check(RowParams* params, RowSlices* slices, Message* message) const {
    const std::optional<Place> places[kOperands] = {
        x,     weight,       residual,
        post,  gate,         post_weight,
        k,     k_weight,     cos,
        sin,   cache,        positions,
        scale, global_scale, op.has(kOut) ? std::optional<Place>(out) : std::nullopt,
        sum,   k_out,        scales,
        y,     dout,         dsum,
        dx,    gate_out,     dweight};
    Tensor tensors[kOperands];
    Call call{&op, {}, options};
    for (int o = 0; o < kOperands; ++o)
      if (places[o]) call.tensors[o] = &(tensors[o] = places[o]->tensor());
    return gemma_norm::check(call, params, slices, message);
  }
};

}  // namespace gemma_norm
