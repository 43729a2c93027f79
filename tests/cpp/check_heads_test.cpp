// What check() refuses of heads and their angles, in which words, and how it collapses tokens.
#include <gtest/gtest.h>

#include "refusals.h"

namespace gemma_norm {
namespace {

// A head of q is another row than the head of k at the same place, and a token's angles are read for all its heads.
TEST(Check, KeepsHeadsAndAnglesApart) {
  EXPECT_EQ("", answer(TestCall().rotated()));
  TestCall in_place;
  in_place.rotated().out = in_place.x;
  in_place.k_out = in_place.k;
  EXPECT_EQ("", answer(in_place));
  expect_refusals({
      {[](TestCall& c) { c.rotated().out = *c.k; },
       "op: q_out is written and must not overlap k, got overlapping memory"},
      {[](TestCall& c) { c.rotated().k_out = c.x; },
       "op: k_out is written and must not overlap q, got overlapping memory"},
      {[](TestCall& c) { c.rotated().k_out = c.out; },
       "op: k_out must not overlap q_out, which is also written, got overlapping memory"},
      {[](TestCall& c) { c.rotated().out.first = c.cos->first - 8; },
       "op: q_out is written and must not overlap cos, got overlapping memory"},
  });
}

TEST(Check, CopiesWhatIsGivenWithItsCopy) {
  EXPECT_EQ("", answer(TestCall().with_copies()));
  expect_refusals({
      {[](TestCall& c) { c.with_copies().gate_out.reset(); },
       "op: gate and gate_out must both be given or both be left out, got one of them"},
      {[](TestCall& c) { c.with_copies().residual = c.gate; },
       "op: v and v_out must both be given or both be left out, got one of them"},
      {[](TestCall& c) { c.with_copies().gate_out->first = c.out.first; },
       "op: gate_out must not overlap q_out, which is also written, got overlapping memory"},
      {[](TestCall& c) { c.with_copies().gate_out->first = c.k->first; },
       "op: gate_out must be k's memory exactly or not overlap it, got a partial overlap"},
      {[](TestCall& c) { c.with_copies().gate->sizes[3] = 4; },
       "op: gate must have q's shape [2, 3, 4, 8], but for the number of heads, got [2, 3, 2, 4]"},
  });
}

// The tokens are collapsed as far as the angles allow, and the heads are not among them.
TEST(Check, CollapsesTokens) {
  TestCall call;
  RowParams params;
  RowSlices slices;
  Message message{};
  ASSERT_EQ(Status::kOk, call.rotated().check(&params, &slices, &message)) << message.text;
  EXPECT_EQ(6, params.rows);
  EXPECT_EQ(2, params.sizes[0]);
  EXPECT_EQ(3, params.sizes[1]);
  EXPECT_EQ(0, params.strides[kCos][0]);
  EXPECT_EQ(4, params.strides[kCos][1]);
  call.cos->strides = call.sin->strides = {12, 4, 1};
  ASSERT_EQ(Status::kOk, call.check(&params, &slices, &message)) << message.text;
  EXPECT_EQ(6, params.rows);
  EXPECT_EQ(1, params.sizes[0]);
  EXPECT_EQ(32, params.strides[kX][1]);
  EXPECT_EQ(4, params.strides[kSin][1]);
}

}  // namespace
}  // namespace gemma_norm
