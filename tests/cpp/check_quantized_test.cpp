// What check() refuses of the operators that quantise, in which words, and the strides that it finds for scales.
#include <gtest/gtest.h>

#include "refusals.h"

namespace gemma_norm {
namespace {

TEST(Check, LetsQuantisedCallsThrough) {
  const Place one{50000, {}, {}, DType::kFloat32, "float32"};
  TestCall call;
  call.quantised();
  RowParams params;
  RowSlices slices;
  Message message{};
  ASSERT_EQ(Status::kOk, call.check(&params, &slices, &message)) << message.text;
  EXPECT_EQ(4, params.scale_group);
  EXPECT_EQ(4, params.scale_stride);
  EXPECT_EQ(1, params.strides[kScaleOut][1]);
  EXPECT_EQ(448.0f, params.format.largest);
  call.scale = one;  // a bound
  EXPECT_EQ("", answer(call));

  call.options.scale_group_size = kWholeRow;
  call.scales = Place{40000, {4, 1}, {1, 1}, DType::kFloat32, "float32"};
  ASSERT_EQ(Status::kOk, call.check(&params, &slices, &message)) << message.text;
  EXPECT_EQ(8, params.scale_group);

  TestCall given;
  ASSERT_EQ(Status::kOk, given.quantised_by(one).check(&params, &slices, &message)) << message.text;
  EXPECT_EQ(0, params.scale_group);
}

TEST(Check, LetsScalesOfNormedGroupsThrough) {
  TestCall call;
  RowParams params;
  RowSlices slices;
  Message message{};
  ASSERT_EQ(Status::kOk, call.gated_and_quantised().check(&params, &slices, &message)) << message.text;
  EXPECT_EQ(8, params.rows);
  EXPECT_EQ(4, params.scale_group);
  EXPECT_EQ(1, params.scale_groups);
  EXPECT_EQ(4, params.strides[kScaleOut][1]) << "from a group's scale to the next group's";
  EXPECT_EQ(1, params.strides[kScaleOut][0]);

  // Two elements are a byte, and four scales are an element.
  TestCall float4;
  float4.quantised().options.scale_group_size = 16;
  float4.x = Place{10000, {4, 128}, {128, 1}};
  float4.y = float4.x;
  float4.y->first = 30000;
  float4.weight = Place{20000, {128}, {1}};
  float4.options.dtype = DType::kFloat4E2M1FNx2;
  float4.options.scale_dtype = DType::kInt32;
  float4.out = Place{50000, {4, 64}, {64, 1}, DType::kFloat4E2M1FNx2, "float4_e2m1fn_x2"};
  float4.scales = Place{40000, {4, 2}, {1, 4}, DType::kInt32, "int32"};
  float4.op = RmsNormQuant::kInfos[2];
  ASSERT_EQ(Status::kOk, float4.check(&params, &slices, &message)) << message.text;
  EXPECT_EQ(64, params.strides[kOut][1]);
  EXPECT_EQ(8, params.scale_groups);
  EXPECT_TRUE(params.scale_ue8m0);
}

TEST(Check, RefusesWhatCannotBeQuantised) {
  const Place two{50000, {2}, {1}, DType::kFloat32, "float32"}, half{50000, {1}, {1}, DType::kFloat16, "float16"};
  expect_refusals({
      {[](TestCall& c) { c.quantised().options.dtype = DType::kOther, c.options.dtype_name = "float16"; },
       "op: dtype must be float8_e4m3fn, float8_e4m3fnuz, float8_e5m2, int8 or float4_e2m1fn_x2, got float16"},
      {[](TestCall& c) {
         c.quantised().options.dtype = DType::kFloat4E2M1FNx2, c.out.dtype = c.options.dtype, c.out.sizes = {4, 4};
       },
       "op: scale_group_size must be a multiple of 16 with float4_e2m1fn_x2, got 4"},
      {[](TestCall& c) { c.quantised().options.dtype = DType::kFloat4E2M1FNx2, c.out.dtype = c.options.dtype; },
       "op: out must have shape [4, 4], got [4, 8]"},
      {[](TestCall& c) { c.quantised().options.scale_dtype = DType::kFloat16, c.options.scale_dtype_name = "float16"; },
       "op: scale_dtype must be float32, float8_e8m0fnu, float8_e4m3fn or int32, got float16"},
      {[](TestCall& c) { c.quantised().options.scale_dtype = DType::kInt32, c.options.scale_dtype_name = "int32"; },
       "op: scale_out must have dtype int32, got float32"},
      {[](TestCall& c) { c.quantised().global_scale = Place{50000, {}, {}, DType::kFloat32, "float32"}; },
       "op: global_scale must be None unless scale_dtype is float8_e4m3fn, got a tensor"},
      {[](TestCall& c) { c.gated_and_quantised().options.scale_group_size = 8, c.scales->sizes = {4, 1}; },
       "op: scale_group_size must divide group_size 4, got 8"},
      {[](TestCall& c) { c.quantised().options.dtype = DType::kInt8, c.options.dtype_name = "int8"; },
       "op: out must have dtype int8, got float8_e4m3fn"},
      {[](TestCall& c) { c.quantised().options.scale_group_size = 0; },
       "op: scale_group_size must divide x's last dimension 8, got 0"},
      {[](TestCall& c) { c.quantised().options.scale_group_size = 3; },
       "op: scale_group_size must divide x's last dimension 8, got 3"},
      {[](TestCall& c) { c.quantised().scales->sizes = {4, 8}; }, "op: scale_out must have shape [4, 2], got [4, 8]"},
      {[](TestCall& c) { c.quantised().scales.reset(); }, "op: scale_out is needed, got none"},
      {[&](TestCall& c) { c.quantised().scale = two; }, "op: scale_ub must have one element, got shape [2]"},
      {[&](TestCall& c) { c.quantised_by(two); }, "op: scale must have one element, got shape [2]"},
      {[&](TestCall& c) { c.quantised_by(half); }, "op: scale must have dtype float32, got float16"},
      {[](TestCall& c) { c.quantised().scales->first = 10000; },
       "op: scale_out is written and must not overlap x, got overlapping memory"},
      {[](TestCall& c) { c.quantised().scales->strides = {1, 2}; },
       "op: scale_out is written and must not overlap itself, got a tensor with shared elements"},
      {[](TestCall& c) { c.quantised().out.first = 9998; },
       "op: out must be x's memory exactly or not overlap it, got a partial overlap"},
  });
}

}  // namespace
}  // namespace gemma_norm
