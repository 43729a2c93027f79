// What check() refuses of the operators of the backward pass, and in which words.
#include <gtest/gtest.h>

#include <initializer_list>
#include <utility>

#include "refusals.h"

namespace gemma_norm {
namespace {

TEST(Check, LetsGradientsThrough) {
  const auto set = [](DType dtype, const char* name, std::initializer_list<Place*> places) {
    for (Place* p : places) p->dtype = dtype, p->dtype_name = name;
  };
  EXPECT_EQ("", answer(TestCall().backward()));
  EXPECT_EQ("", answer(TestCall().backward_with_dsum()));
  TestCall c = TestCall().backward();
  set(DType::kFloat32, "float32", {&*c.weight, &*c.dweight});
  EXPECT_EQ("", answer(c)) << "float32 weight";
  for (const auto& [dtype, name] : {std::pair(DType::kFloat32, "float32"), std::pair(DType::kFloat16, "float16"),
                                    std::pair(DType::kBFloat16, "bfloat16")}) {
    c = TestCall().backward_with_dsum();
    set(DType::kFloat32, "float32", {&c.x, &*c.dsum, &*c.dx});
    set(dtype, name, {&*c.dout});
    EXPECT_EQ("", answer(c)) << "float32 x, dout of " << name;
  }
  c = TestCall().backward();
  c.dout->strides = {0, 1};
  EXPECT_EQ("", answer(c)) << "an expanded dout";
  c.dx = c.x;
  EXPECT_EQ("", answer(c)) << "in place of x";
  c = TestCall().backward_with_dsum();
  c.dx = c.dsum;
  EXPECT_EQ("", answer(c)) << "in place of dsum";
  c = TestCall().backward();
  c.op = OpInfo("op", "op", "", "", RmsNormBackward::kInputRules);
  c.dweight.reset();
  EXPECT_EQ("", answer(c)) << "dx alone";
  c.weight.reset();
  EXPECT_EQ("", answer(c)) << "without a weight";
}

TEST(Check, RefusesWrongGradients) {
  const auto float32 = [](Place& o) { o.dtype = DType::kFloat32, o.dtype_name = "float32"; };
  const auto float16 = [](Place& o) { o.dtype = DType::kFloat16, o.dtype_name = "float16"; };
  const auto other = [](Place& o) { o.dtype = DType::kOther, o.dtype_name = "float64"; };
  expect_refusals({
      {[](TestCall& c) { c.backward().dout.reset(); }, "op: dout is needed, got none"},
      {[](TestCall& c) { c.backward().dx.reset(); }, "op: dx is needed, got none"},
      {[](TestCall& c) { c.backward().dweight.reset(); }, "op: dweight is needed, got none"},
      {[](TestCall& c) { c.backward().weight.reset(); }, "op: weight is needed, got none"},
      {[](TestCall& c) { c.backward().op = OpInfo("op", "op", "", "", RmsNormBackward::kInputRules); },
       "op: there is no operand dweight, got a tensor"},
      {[](TestCall& c) { c.dsum = c.x; }, "op: there is no operand dsum, got a tensor"},

      {[&](TestCall& c) { float32(*c.backward().dout); }, "op: dout must have x's dtype bfloat16, got float32"},
      {[&](TestCall& c) { float16(*c.backward().dout); }, "op: dout must have x's dtype bfloat16, got float16"},
      {[&](TestCall& c) { float32(c.backward().x), other(*c.dout); },
       "op: dout must have dtype float32, float16 or bfloat16, got float64"},
      {[&](TestCall& c) { float32(*c.backward_with_dsum().dsum); },
       "op: dsum must have x's dtype bfloat16, got float32"},
      {[&](TestCall& c) { float32(c.backward_with_dsum().x); }, "op: dsum must have x's dtype float32, got bfloat16"},
      {[&](TestCall& c) { float32(*c.backward().dx); }, "op: dx must have x's dtype bfloat16, got float32"},
      {[&](TestCall& c) { float32(*c.backward().dweight); },
       "op: dweight must have weight's dtype bfloat16, got float32"},
      {[&](TestCall& c) { float32(*c.backward().weight); },
       "op: dweight must have weight's dtype float32, got bfloat16"},

      {[](TestCall& c) { c.backward().dout->sizes = {4, 7}; }, "op: dout must have x's shape [4, 8], got [4, 7]"},
      {[](TestCall& c) { c.backward().dout = {40000, {8}, {1}}; }, "op: dout must have x's shape [4, 8], got [8]"},
      {[](TestCall& c) { c.backward_with_dsum().dsum->sizes = {1, 8}; },
       "op: dsum must have x's shape [4, 8], got [1, 8]"},
      {[](TestCall& c) { c.backward().dx->sizes = {3, 8}; }, "op: dx must have x's shape [4, 8], got [3, 8]"},
      {[](TestCall& c) { c.backward().dweight->sizes = {7}; }, "op: dweight must have shape [8], got [7]"},
      {[](TestCall& c) { c.backward().dout->strides = {1, 4}; },
       "op: dout must have a contiguous last dimension (stride 1), got stride 4"},
      {[](TestCall& c) { c.backward_with_dsum().dsum->strides = {0, 0}; },
       "op: dsum must have a contiguous last dimension (stride 1), got stride 0"},
      {[](TestCall& c) { c.backward().dweight->strides = {0}; },
       "op: dweight must be contiguous (stride 1), got stride 0"},

      {[](TestCall& c) { c.backward().dx->first = c.dout->first + 8; },
       "op: dx must be dout's memory exactly or not overlap it, got a partial overlap"},
      {[](TestCall& c) { c.backward().dx->strides[0] = 0; },
       "op: dx is written and must not overlap itself, got a tensor with shared elements"},
      {[](TestCall& c) { c.backward().dweight->first = c.dx->first + 31; },
       "op: dweight must not overlap dx, which is also written, got overlapping memory"},
      {[](TestCall& c) { c.backward().dweight->first = c.weight->first; },
       "op: dweight is written and must not overlap weight, got overlapping memory"},
  });
}

}  // namespace
}  // namespace gemma_norm
