// What check() refuses, in which words, and what it makes of the calls that it lets through.
#include "check.h"

#include <gtest/gtest.h>

#include <functional>
#include <optional>
#include <random>
#include <vector>

#include "kernels/row.cuh"

namespace gemma_norm {
namespace {

struct Operand {
  int64_t first;  // address, in elements of two bytes
  std::vector<int64_t> sizes, strides;
  DType dtype = DType::kBFloat16;
  const char* dtype_name = "bfloat16";

  Tensor tensor() const {
    return {reinterpret_cast<void*>(first * 2), sizes.data(), strides.data(),
            static_cast<int32_t>(sizes.size()), dtype,        dtype_name};
  }
};

// A call that is right, to be made wrong. Nothing is read or written at its addresses.
struct Call {
  Operand x{10000, {4, 8}, {8, 1}}, weight{20000, {8}, {1}}, out{30000, {4, 8}, {8, 1}};
  std::optional<Operand> residual, post, sum;
  double eps = 1e-6;

  Call& add() {
    residual = Operand{40000, {4, 8}, {8, 1}};
    sum = Operand{60000, {4, 8}, {8, 1}};
    return *this;
  }
  Call& add_post() {
    add().post = Operand{50000, {4, 8}, {8, 1}};
    return *this;
  }

  Status check(RowParams* params, RowSlices* slices, Message* message) const {
    const auto tensor = [](const std::optional<Operand>& o) { return o ? o->tensor() : Tensor{}; };
    const Tensor r = tensor(residual), p = tensor(post), s = tensor(sum);
    const NormArgs args{
        "op", x.tensor(), weight.tensor(), out.tensor(), residual ? &r : nullptr, post ? &p : nullptr, sum ? &s : nullptr,
        eps,  false};
    return gemma_norm::check(args, params, slices, message);
  }
};

// "" for a call that is let through, else the message.
std::string answer(const Call& call) {
  RowParams params;
  RowSlices slices;
  Message message{};
  const Status status = call.check(&params, &slices, &message);
  EXPECT_EQ(status == Status::kOk, message.text[0] == 0);
  return status == Status::kOk ? "" : message.text;
}

struct Refusal {
  std::function<void(Call&)> change;
  const char* message;
};

void expect_refusals(const std::vector<Refusal>& refusals) {
  for (const Refusal& refusal : refusals) {
    Call call;
    refusal.change(call);
    EXPECT_EQ(refusal.message, answer(call));
  }
}

TEST(Check, LetsRightCallsThrough) {
  EXPECT_EQ("", answer(Call()));
  EXPECT_EQ("", answer(Call().add()));
  EXPECT_EQ("", answer(Call().add_post()));
  Call float_weight;
  float_weight.weight.dtype = DType::kFloat32;
  EXPECT_EQ("", answer(float_weight));
  Call no_eps;
  no_eps.eps = 0;
  EXPECT_EQ("", answer(no_eps));
}

TEST(Check, RefusesShapesAndStrides) {
  expect_refusals({
      {[](Call& c) { c.x.sizes = c.x.strides = {}; }, "op: x must have at least one dimension, got shape []"},
      {[](Call& c) { c.x.sizes.assign(65, 8), c.x.strides.assign(65, 8); }, "op: x must have at most 64 dimensions, got 65"},
      {[](Call& c) { c.x.sizes = {4, 0}; }, "op: x must have a last dimension of at least 1, got shape [4, 0]"},
      {[](Call& c) { c.x.strides = {1, 4}; }, "op: x must have a contiguous last dimension (stride 1), got stride 4"},
      {[](Call& c) { c.weight.sizes = {7}; }, "op: weight must have shape [8], got [7]"},
      {[](Call& c) { c.weight = {20000, {1, 8}, {8, 1}}; }, "op: weight must have shape [8], got [1, 8]"},
      {[](Call& c) { c.weight.sizes = c.weight.strides = {}; }, "op: weight must have shape [8], got []"},
      {[](Call& c) { c.weight.strides = {2}; }, "op: weight must be contiguous (stride 1), got stride 2"},
      {[](Call& c) { c.weight.strides = {0}; }, "op: weight must be contiguous (stride 1), got stride 0"},
      {[](Call& c) { c.out.sizes = {5, 8}; }, "op: out must have x's shape [4, 8], got [5, 8]"},
      {[](Call& c) { c.out.sizes = {4, 1, 8}, c.out.strides = {8, 8, 1}; }, "op: out must have x's shape [4, 8], got [4, 1, 8]"},
      {[](Call& c) { c.out.strides = {16, 2}; }, "op: out must have a contiguous last dimension (stride 1), got stride 2"},
      {[](Call& c) { c.add().residual->sizes = {4, 7}; }, "op: residual must have x's shape [4, 8], got [4, 7]"},
      {[](Call& c) { c.add().residual->strides = {16, 2}; },
       "op: residual must have a contiguous last dimension (stride 1), got stride 2"},
      {[](Call& c) { c.add().sum->sizes = {3, 8}; }, "op: residual_out must have x's shape [4, 8], got [3, 8]"},
      {[](Call& c) { c.add_post().post->sizes = {1, 8}; }, "op: post_residual_addition must have x's shape [4, 8], got [1, 8]"},
  });
}

TEST(Check, RefusesDtypes) {
  const auto other = [](Operand& o) { o.dtype = DType::kOther, o.dtype_name = "int32"; };
  const auto float16 = [](Operand& o) { o.dtype = DType::kFloat16, o.dtype_name = "float16"; };
  expect_refusals({
      {[&](Call& c) { other(c.x); }, "op: x must have dtype float32, float16 or bfloat16, got int32"},
      {[&](Call& c) { float16(c.weight); }, "op: weight must have dtype bfloat16 (x's) or float32, got float16"},
      {[&](Call& c) { other(c.weight); }, "op: weight must have dtype bfloat16 (x's) or float32, got int32"},
      {[&](Call& c) { c.x.dtype = DType::kFloat32, c.x.dtype_name = "float32"; },
       "op: weight must have dtype float32, got bfloat16"},
      {[&](Call& c) { float16(c.out); }, "op: out must have x's dtype bfloat16, got float16"},
      {[&](Call& c) { float16(*c.add().residual); }, "op: residual must have x's dtype bfloat16, got float16"},
      {[&](Call& c) { float16(*c.add().sum); }, "op: residual_out must have x's dtype bfloat16, got float16"},
      {[&](Call& c) { float16(*c.add_post().post); }, "op: post_residual_addition must have x's dtype bfloat16, got float16"},
  });
}

TEST(Check, RefusesEpsAndMissingOperands) {
  expect_refusals({
      {[](Call& c) { c.eps = -1e-6; }, "op: eps must be finite in float32 and at least 0, got -1e-06"},
      {[](Call& c) { c.eps = NAN; }, "op: eps must be finite in float32 and at least 0, got nan"},
      {[](Call& c) { c.eps = INFINITY; }, "op: eps must be finite in float32 and at least 0, got inf"},
      {[](Call& c) { c.eps = 1e39; }, "op: eps must be finite in float32 and at least 0, got 1e+39"},
      {[](Call& c) { c.add().residual.reset(); }, "op: residual_out needs residual, got none"},
      {[](Call& c) { c.add().sum.reset(); }, "op: residual_out is needed with residual, got none"},
      {[](Call& c) { c.add_post().residual.reset(), c.sum.reset(); }, "op: post_residual_addition needs residual, got none"},
  });
}

TEST(Check, RefusesOverlapOfWhatIsWritten) {
  expect_refusals({
      {[](Call& c) { c.out.first = c.x.first + 1; }, "op: out must be x's memory exactly or not overlap it, got a partial overlap"},
      {[](Call& c) { c.out.first = c.weight.first - 31; },
       "op: out is written and must not overlap weight, got overlapping memory"},
      {[](Call& c) { c.out.strides[0] = 0; }, "op: out is written and must not overlap itself, got a tensor with shared elements"},
      {[](Call& c) { c.out = c.x, c.out.strides[0] = c.x.strides[0] = 0; },
       "op: x is written and must not overlap itself, got a tensor with shared elements"},
      {[](Call& c) { c.add(), c.out.first = c.residual->first + 8; },
       "op: out must be residual's memory exactly or not overlap it, got a partial overlap"},
      {[](Call& c) { c.add_post(), c.out.first = c.post->first + 8; },
       "op: out must be post_residual_addition's memory exactly or not overlap it, got a partial overlap"},
      {[](Call& c) { c.add().sum->first = c.x.first - 8; },
       "op: residual_out must be x's memory exactly or not overlap it, got a partial overlap"},
      {[](Call& c) { c.add().sum->first = c.out.first + 31; },
       "op: residual_out must not overlap out, which is also written, got overlapping memory"},
      {[](Call& c) { c.add(), c.sum = c.residual = c.out = c.x; },  // x twice, in place
       "op: residual must not overlap x, which is also written, got overlapping memory"},
      {[](Call& c) { c.add(), c.sum = c.residual = c.out = c.x, c.residual->first = c.sum->first += 8; },
       "op: residual must not overlap x, which is also written, got overlapping memory"},
  });
}

TEST(Check, LetsOverlapThroughThatDisturbsNothing) {
  Call c;
  c.out = c.x;
  EXPECT_EQ("", answer(c)) << "in place";
  c = Call();
  c.x.strides[0] = 0;
  EXPECT_EQ("", answer(c)) << "an expanded input";
  c = Call();
  c.x.strides[0] = c.out.strides[0] = 16, c.out.first = c.x.first + 8;
  EXPECT_EQ("", answer(c)) << "two halves of one buffer";
  c = Call().add();
  c.residual = c.x;
  EXPECT_EQ("", answer(c)) << "x + x";
  c = Call().add();
  c.out = c.x, c.sum = c.residual;
  EXPECT_EQ("", answer(c)) << "fused, in place";
  c.out = *c.residual, c.sum = c.x;
  EXPECT_EQ("", answer(c)) << "crossed";
  c = Call();
  c.x.sizes[0] = c.out.sizes[0] = 0, c.out.first = c.x.first + 1;
  EXPECT_EQ("", answer(c)) << "no rows, no overlap";
  c = Call();
  c.x = c.out = {10000, {4, 1}, {1, 77}}, c.weight = {20000, {1}, {77}};
  EXPECT_EQ("", answer(c)) << "a stride over one element is nothing";
}

TEST(Check, WorstMessageFits) {
  Call c;
  c.x.sizes.assign(64, INT64_MAX), c.x.strides.assign(64, 1);
  c.weight.sizes = std::vector<int64_t>(64, INT64_MIN), c.weight.strides.assign(64, 1);
  EXPECT_EQ(0u, answer(c).find("op: weight must have shape [9223372036854775807], got [-9223372036854775808, -92233720"));
  EXPECT_GT(sizeof(Message), answer(c).size());
}

// All rows, by the kernels' own arithmetic, are those of the tensors in their order, whatever collapses into whatever.
TEST(Rows, AreThoseOfTheTensors) {
  std::mt19937 random(3);
  const auto upto = [&](int64_t most) { return static_cast<int64_t>(random() % (most + 1)); };
  int sliced = 0, collapsed = 0;
  for (int i = 0; i < 20000; ++i) {
    Call call = Call().add_post();
    std::vector<int64_t> sizes;
    for (int64_t d = upto(6); d > 0; --d) sizes.push_back(1 + upto(2));
    sizes.push_back(8);
    const int style = static_cast<int>(upto(2));  // no gaps, one gap for all, or each operand its own
    int64_t address = 30000;
    for (Operand* o : {&call.x, &call.out, &*call.residual, &*call.post, &*call.sum}) {
      o->first = address;
      o->sizes = sizes;
      o->strides.assign(sizes.size(), 1);
      int64_t extent = 8;
      for (size_t d = sizes.size() - 1; d-- > 0; extent *= sizes[d])
        o->strides[d] = extent += style == 0 ? 0 : style == 1 ? 8 : 8 * upto(1);
      address += extent + 8;
    }
    RowParams params;
    RowSlices slices;
    Message message{};
    ASSERT_EQ(Status::kOk, call.check(&params, &slices, &message)) << message.text;
    ASSERT_LE(params.row_dims, kMaxRowDims);
    sliced += slices.count > 1;
    collapsed += slices.count == 1 && params.row_dims == 1 && sizes.size() > 2;

    // In the tensors' order: slices are the outer dimensions, and their first is the innermost of those.
    int64_t row = 0;
    for (int64_t s = 0; s < slices.count; ++s) {
      const RowParams slice = select_slice(params, slices, s);
      for (int64_t r = 0; r < slice.rows; ++r, ++row) {
        const kernels::Row<bfloat16, true> at(slice, r, 0);
        const auto expect_row = [&](const Operand& o, const bfloat16* address) {
          int64_t rest = row, want = o.first;
          for (size_t d = sizes.size() - 1; d-- > 0; rest /= sizes[d]) want += rest % sizes[d] * o.strides[d];
          ASSERT_EQ(want * 2, reinterpret_cast<int64_t>(address)) << "row " << row;
        };
        expect_row(call.x, at.x);
        expect_row(*call.residual, at.residual);
        expect_row(*call.post, at.post);
        expect_row(call.out, at.out);
        expect_row(*call.sum, at.residual_out);
      }
    }
    int64_t rows = 1;
    for (size_t d = 0; d + 1 < sizes.size(); ++d) rows *= sizes[d];
    ASSERT_EQ(rows, row);
  }
  EXPECT_LT(100, sliced);
  EXPECT_LT(100, collapsed);
}

TEST(Rows, OfAnEmptyTensorAreNone) {
  for (const std::vector<int64_t>& sizes : {std::vector<int64_t>{0, 8}, {3, 0, 8}, {0, 3, 2, 5, 2, 8}, {2, 2, 2, 2, 0, 8}}) {
    Call call;
    call.x.sizes = call.out.sizes = sizes;
    call.x.strides.assign(sizes.size(), 1);
    call.out.strides = call.x.strides;
    RowParams params;
    RowSlices slices;
    Message message{};
    ASSERT_EQ(Status::kOk, call.check(&params, &slices, &message)) << message.text;
    EXPECT_TRUE(slices.count == 0 || params.rows == 0);
    EXPECT_EQ(0, slices.count);
  }
}

// A row index past 2^32 takes the kernels' 64-bit division.
TEST(Rows, BeyondThirtyTwoBitsAreReached) {
  RowParams p{};
  p.row_dims = 2;
  p.sizes[0] = int64_t{1} << 40, p.sizes[1] = int64_t{1} << 33;
  p.x_strides[0] = int64_t{1} << 20, p.x_strides[1] = 1;
  const int64_t outer = 12345, inner = (int64_t{1} << 32) + 6789;
  const kernels::Row<float16, false> row(p, outer * p.sizes[1] + inner, 0);
  EXPECT_EQ((outer * p.x_strides[0] + inner) * 2, reinterpret_cast<int64_t>(row.x));
}

}  // namespace
}  // namespace gemma_norm
