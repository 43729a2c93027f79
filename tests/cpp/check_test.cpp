// What check() refuses of every norm, and in which words. Heads, quantising and gradients are in files of their own.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "refusals.h"

namespace gemma_norm {
namespace {

TEST(Check, LetsRightCallsThrough) {
  EXPECT_EQ("", answer(TestCall()));
  EXPECT_EQ("", answer(TestCall().add()));
  EXPECT_EQ("", answer(TestCall().add_post()));
  EXPECT_EQ("", answer(TestCall().norm_add()));
  TestCall float_weight;
  float_weight.weight->dtype = DType::kFloat32;
  EXPECT_EQ("", answer(float_weight));
  TestCall no_eps;
  no_eps.options.eps = 0;
  EXPECT_EQ("", answer(no_eps));
}

TEST(Check, RefusesShapesAndStrides) {
  expect_refusals({
      {[](TestCall& c) { c.x.sizes = c.x.strides = {}; }, "op: x must have at least one dimension, got shape []"},
      {[](TestCall& c) { c.x.sizes.assign(65, 8), c.x.strides.assign(65, 8); },
       "op: x must have at most 64 dimensions, got 65"},
      {[](TestCall& c) { c.x.sizes = {4, 0}; }, "op: x must have a last dimension of at least 1, got shape [4, 0]"},
      {[](TestCall& c) { c.x.strides = {1, 4}; },
       "op: x must have a contiguous last dimension (stride 1), got stride 4"},
      {[](TestCall& c) { c.weight->sizes = {7}; }, "op: weight must have shape [8], got [7]"},
      {[](TestCall& c) { c.weight = {20000, {1, 8}, {8, 1}}; }, "op: weight must have shape [8], got [1, 8]"},
      {[](TestCall& c) { c.weight->sizes = c.weight->strides = {}; }, "op: weight must have shape [8], got []"},
      {[](TestCall& c) { c.weight->strides = {2}; }, "op: weight must be contiguous (stride 1), got stride 2"},
      {[](TestCall& c) { c.weight->strides = {0}; }, "op: weight must be contiguous (stride 1), got stride 0"},
      {[](TestCall& c) { c.out.sizes = {5, 8}; }, "op: out must have x's shape [4, 8], got [5, 8]"},
      {[](TestCall& c) { c.out.sizes = {4, 1, 8}, c.out.strides = {8, 8, 1}; },
       "op: out must have x's shape [4, 8], got [4, 1, 8]"},
      {[](TestCall& c) { c.out.strides = {16, 2}; },
       "op: out must have a contiguous last dimension (stride 1), got stride 2"},
      {[](TestCall& c) { c.add().residual->sizes = {4, 7}; }, "op: residual must have x's shape [4, 8], got [4, 7]"},
      {[](TestCall& c) { c.add().residual->strides = {16, 2}; },
       "op: residual must have a contiguous last dimension (stride 1), got stride 2"},
      {[](TestCall& c) { c.add().sum->sizes = {3, 8}; }, "op: residual_out must have x's shape [4, 8], got [3, 8]"},
      {[](TestCall& c) { c.add_post().post->sizes = {1, 8}; },
       "op: post_residual_addition must have x's shape [4, 8], got [1, 8]"},
      {[](TestCall& c) { c.norm_add().post_weight->sizes = {7}; }, "op: post_weight must have shape [8], got [7]"},
      {[](TestCall& c) { c.norm_add().post_weight->strides = {2}; },
       "op: post_weight must be contiguous (stride 1), got stride 2"},
  });
}

TEST(Check, RefusesDtypes) {
  const auto other = [](Place& o) { o.dtype = DType::kOther, o.dtype_name = "int32"; };
  const auto float16 = [](Place& o) { o.dtype = DType::kFloat16, o.dtype_name = "float16"; };
  expect_refusals({
      {[&](TestCall& c) { other(c.x); }, "op: x must have dtype float32, float16 or bfloat16, got int32"},
      {[&](TestCall& c) { float16(*c.weight); }, "op: weight must have dtype bfloat16 (x's) or float32, got float16"},
      {[&](TestCall& c) { other(*c.weight); }, "op: weight must have dtype bfloat16 (x's) or float32, got int32"},
      {[&](TestCall& c) { c.x.dtype = DType::kFloat32, c.x.dtype_name = "float32", other(*c.weight); },
       "op: weight must have dtype float32, float16 or bfloat16, got int32"},
      {[&](TestCall& c) { float16(c.out); }, "op: out must have x's dtype bfloat16, got float16"},
      {[&](TestCall& c) { float16(*c.add().residual); },
       "op: residual must have dtype bfloat16 (x's) or float32, got float16"},
      {[&](TestCall& c) { float16(*c.add().sum); },
       "op: residual_out must have residual's dtype bfloat16, got float16"},
      {[&](TestCall& c) { float16(*c.add_post().post); },
       "op: post_residual_addition must have residual's dtype bfloat16, got float16"},
      {[&](TestCall& c) { float16(*c.norm_add().post_weight); },
       "op: post_weight must have weight's dtype bfloat16, got float16"},
      {[&](TestCall& c) { c.norm_add().residual->dtype = DType::kFloat32, c.residual->dtype_name = "float32"; },
       "op: residual must have x's dtype bfloat16, got float32"},
  });
}

TEST(Check, RefusesEpsAndWrongNumbersOfOperands) {
  expect_refusals({
      {[](TestCall& c) { c.options.eps = -1e-6; }, "op: eps must be finite in float32 and at least 0, got -1e-06"},
      {[](TestCall& c) { c.options.eps = NAN; }, "op: eps must be finite in float32 and at least 0, got nan"},
      {[](TestCall& c) { c.options.eps = INFINITY; }, "op: eps must be finite in float32 and at least 0, got inf"},
      {[](TestCall& c) { c.options.eps = 1e39; }, "op: eps must be finite in float32 and at least 0, got 1e+39"},
      {[](TestCall& c) { c.add().residual.reset(); }, "op: residual is needed, got none"},
      {[](TestCall& c) { c.add().sum.reset(); }, "op: residual_out is needed, got none"},
      {[](TestCall& c) { c.norm_add().post_weight.reset(); }, "op: post_weight is needed, got none"},
      {[](TestCall& c) { c.norm_add().weight.reset(); }, "op: weight is needed, got none"},
      {[](TestCall& c) { c.add().post_weight = c.weight; }, "op: there is no operand post_weight, got a tensor"},
      {[](TestCall& c) { c.residual = c.x; }, "op: there is no operand residual, got a tensor"},
  });
}

TEST(Check, LetsTheModesThrough) {
  const auto float32 = [](Place& o) { o.dtype = DType::kFloat32, o.dtype_name = "float32"; };
  TestCall c;
  c.weight.reset();
  EXPECT_EQ("", answer(c)) << "no weight";
  c.options.round_each_step = true;
  EXPECT_EQ("", answer(c)) << "no weight, rounded at each step: as without";
  c = TestCall();
  c.options.round_each_step = true;
  EXPECT_EQ("", answer(c));
  c = TestCall();
  float32(c.x), float32(c.out);
  EXPECT_EQ("", answer(c)) << "float32 x, bfloat16 weight";
  c = TestCall().add_post();
  float32(*c.residual), float32(*c.post), float32(*c.sum);
  EXPECT_EQ("", answer(c)) << "float32 residual";
  EXPECT_EQ("", answer(TestCall().gated()));
  c = TestCall().gated();
  c.gate.reset();
  EXPECT_EQ("", answer(c)) << "no gate";
  for (const int64_t group : {1, 2, 4, 8}) {
    c = TestCall().gated();
    c.options.group_size = group;
    EXPECT_EQ("", answer(c)) << group;
  }
  c = TestCall().gated();
  c.out = c.x;
  EXPECT_EQ("", answer(c)) << "in place";
  c.out = *c.gate;
  EXPECT_EQ("", answer(c)) << "in place of the gate";
}

TEST(Check, RefusesModesThatDoNotGoTogether) {
  const auto float32 = [](Place& o) { o.dtype = DType::kFloat32, o.dtype_name = "float32"; };
  expect_refusals({
      {[](TestCall& c) { c.weight.reset(), c.options.gemma = true; },
       "op: gemma must be False without a weight, got True"},
      {[](TestCall& c) { c.options.gemma = c.options.round_each_step = true; },
       "op: round_each_step must be False with gemma=True, got True"},
      {[&](TestCall& c) { float32(*c.weight), c.options.round_each_step = true; },
       "op: weight must have x's dtype bfloat16 with round_each_step=True, got float32"},
      {[&](TestCall& c) { float32(c.x), float32(c.out), c.options.round_each_step = true; },
       "op: weight must have x's dtype float32 with round_each_step=True, got bfloat16"},
      {[&](TestCall& c) { float32(*c.add().residual); },
       "op: residual_out must have residual's dtype float32, got bfloat16"},
      {[&](TestCall& c) { float32(*c.add_post().residual); },
       "op: post_residual_addition must have residual's dtype float32, got bfloat16"},
      {[&](TestCall& c) { float32(*c.add_post().post); },
       "op: post_residual_addition must have residual's dtype bfloat16, got float32"},
      {[](TestCall& c) { c.gated().weight.reset(); }, "op: weight is needed, got none"},
      {[&](TestCall& c) { float32(*c.gated().gate); }, "op: gate must have x's dtype bfloat16, got float32"},
      {[](TestCall& c) { c.gated().gate->sizes = {4, 4}; }, "op: gate must have x's shape [4, 8], got [4, 4]"},
      {[](TestCall& c) { c.gated().options.group_size = 3; }, "op: group_size must divide x's last dimension 8, got 3"},
      {[](TestCall& c) { c.gated().options.group_size = 16; },
       "op: group_size must divide x's last dimension 8, got 16"},
      {[](TestCall& c) { c.gated().options.group_size = 0; }, "op: group_size must divide x's last dimension 8, got 0"},
      {[](TestCall& c) { c.gated().options.group_size = -8; },
       "op: group_size must divide x's last dimension 8, got -8"},
      {[](TestCall& c) { c.gated(), c.out.first = c.gate->first + 8; },
       "op: out must be gate's memory exactly or not overlap it, got a partial overlap"},
      {[](TestCall& c) { c.gate = c.x; }, "op: there is no operand gate, got a tensor"},
  });
}

TEST(Check, RefusesOverlapOfWhatIsWritten) {
  expect_refusals({
      {[](TestCall& c) { c.out.first = c.x.first + 1; },
       "op: out must be x's memory exactly or not overlap it, got a partial overlap"},
      {[](TestCall& c) { c.out.first = c.weight->first - 31; },
       "op: out is written and must not overlap weight, got overlapping memory"},
      {[](TestCall& c) { c.out.strides[0] = 0; },
       "op: out is written and must not overlap itself, got a tensor with shared elements"},
      {[](TestCall& c) { c.out = c.x, c.out.strides[0] = c.x.strides[0] = 0; },
       "op: x is written and must not overlap itself, got a tensor with shared elements"},
      {[](TestCall& c) { c.add(), c.out.first = c.residual->first + 8; },
       "op: out must be residual's memory exactly or not overlap it, got a partial overlap"},
      {[](TestCall& c) { c.add_post(), c.out.first = c.post->first + 8; },
       "op: out must be post_residual_addition's memory exactly or not overlap it, got a partial overlap"},
      {[](TestCall& c) { c.norm_add(), c.sum->first = c.post_weight->first - 31; },
       "op: residual_out is written and must not overlap post_weight, got overlapping memory"},
      {[](TestCall& c) { c.add().sum->first = c.x.first - 8; },
       "op: residual_out must be x's memory exactly or not overlap it, got a partial overlap"},
      {[](TestCall& c) { c.add().sum->first = c.out.first + 31; },
       "op: residual_out must not overlap out, which is also written, got overlapping memory"},
      {[](TestCall& c) { c.add(), c.sum = c.residual = c.out = c.x; },  // x twice, in place
       "op: residual must not overlap x, which is also written, got overlapping memory"},
      {[](TestCall& c) { c.add(), c.sum = c.residual = c.out = c.x, c.residual->first = c.sum->first += 8; },
       "op: residual must not overlap x, which is also written, got overlapping memory"},
  });
}

TEST(Check, LetsOverlapThroughThatDisturbsNothing) {
  TestCall c;
  c.out = c.x;
  EXPECT_EQ("", answer(c)) << "in place";
  c = TestCall();
  c.x.strides[0] = 0;
  EXPECT_EQ("", answer(c)) << "an expanded input";
  c = TestCall();
  c.x.strides[0] = c.out.strides[0] = 16, c.out.first = c.x.first + 8;
  EXPECT_EQ("", answer(c)) << "two halves of one buffer";
  c = TestCall().add();
  c.residual = c.x;
  EXPECT_EQ("", answer(c)) << "x + x";
  c = TestCall().add();
  c.out = c.x, c.sum = c.residual;
  EXPECT_EQ("", answer(c)) << "fused, in place";
  c.out = *c.residual, c.sum = c.x;
  EXPECT_EQ("", answer(c)) << "crossed";
  c = TestCall();
  c.x.sizes[0] = c.out.sizes[0] = 0, c.out.first = c.x.first + 1;
  EXPECT_EQ("", answer(c)) << "no rows, no overlap";
  c = TestCall();
  c.x = c.out = {10000, {4, 1}, {1, 77}}, c.weight = {20000, {1}, {77}};
  EXPECT_EQ("", answer(c)) << "a stride over one element is nothing";
}

TEST(Check, WorstMessageFits) {
  TestCall c;
  c.x.sizes.assign(64, INT64_MAX), c.x.strides.assign(64, 1);
  c.weight->sizes = std::vector<int64_t>(64, INT64_MIN), c.weight->strides.assign(64, 1);
  EXPECT_EQ(0u,
            answer(c).find("op: weight must have shape [9223372036854775807], got [-9223372036854775808, -92233720"));
  EXPECT_GT(sizeof(Message), answer(c).size());
}

// Where several things are wrong, the first in the documented order is told: operands by their rules, eps, memory.
TEST(Check, HasOneOrder) {
  TestCall c = TestCall().add_post();
  const auto wrong = [](Place& o) { o.dtype = DType::kOther, o.dtype_name = "int32"; };
  c.options.eps = -1, c.out.first = c.weight->first;
  for (Place* o : {&c.x, &*c.weight, &*c.residual, &*c.post, &c.out, &*c.sum}) wrong(*o);
  c.x.dtype_name = "int64";
  std::vector<std::string> told;
  for (Place* o : {&c.x, &*c.weight, &*c.residual, &*c.post, &c.out, &*c.sum}) {
    told.push_back(answer(c));
    o->dtype = DType::kBFloat16, o->dtype_name = "bfloat16";
  }
  told.push_back(answer(c));
  c.options.eps = 0;
  told.push_back(answer(c));
  const char* const want[] = {
      "x must have",   "weight must have",       "residual must have", "post_residual_addition must have",
      "out must have", "residual_out must have", "eps must be",        "out is written"};
  ASSERT_EQ(std::size(want), told.size());
  for (size_t i = 0; i < told.size(); ++i) EXPECT_EQ(0u, told[i].find(std::string("op: ") + want[i])) << told[i];
}

}  // namespace
}  // namespace gemma_norm
