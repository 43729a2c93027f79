// What check() refuses, in which words, and what it makes of the calls that it lets through.
#include "core/check.h"

#include <gtest/gtest.h>

#include <functional>
#include <optional>
#include <random>
#include <vector>

#include "gpu/row.cuh"
#include "ops/ops.h"

namespace gemma_norm {
namespace {

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

// A call that is right, to be made wrong. Nothing is read or written at its addresses.
struct TestCall {
  Place x{10000, {4, 8}, {8, 1}}, out{30000, {4, 8}, {8, 1}};
  std::optional<Place> weight = Place{20000, {8}, {1}}, residual, post, gate, sum;
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

  Status check(RowParams* params, RowSlices* slices, Message* message) const {
    const auto tensor = [](const std::optional<Place>& o) { return o ? o->tensor() : Tensor{}; };
    const Tensor t[] = {x.tensor(), tensor(weight), tensor(residual), tensor(post), tensor(gate), out.tensor(), tensor(sum)};
    const Call call{&op,
                    {&t[kX], weight ? &t[kWeight] : nullptr, residual ? &t[kResidual] : nullptr, post ? &t[kPost] : nullptr,
                     gate ? &t[kGate] : nullptr, &t[kOut], sum ? &t[kResidualOut] : nullptr},
                    options};
    return gemma_norm::check(call, params, slices, message);
  }
};

// "" for a call that is let through, else the message.
std::string answer(const TestCall& call) {
  RowParams params;
  RowSlices slices;
  Message message{};
  const Status status = call.check(&params, &slices, &message);
  EXPECT_EQ(status == Status::kOk, message.text[0] == 0);
  return status == Status::kOk ? "" : message.text;
}

struct Refusal {
  std::function<void(TestCall&)> change;
  const char* message;
};

void expect_refusals(const std::vector<Refusal>& refusals) {
  for (const Refusal& refusal : refusals) {
    TestCall call;
    refusal.change(call);
    EXPECT_EQ(refusal.message, answer(call));
  }
}

TEST(Check, LetsRightCallsThrough) {
  EXPECT_EQ("", answer(TestCall()));
  EXPECT_EQ("", answer(TestCall().add()));
  EXPECT_EQ("", answer(TestCall().add_post()));
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
      {[](TestCall& c) { c.x.sizes.assign(65, 8), c.x.strides.assign(65, 8); }, "op: x must have at most 64 dimensions, got 65"},
      {[](TestCall& c) { c.x.sizes = {4, 0}; }, "op: x must have a last dimension of at least 1, got shape [4, 0]"},
      {[](TestCall& c) { c.x.strides = {1, 4}; }, "op: x must have a contiguous last dimension (stride 1), got stride 4"},
      {[](TestCall& c) { c.weight->sizes = {7}; }, "op: weight must have shape [8], got [7]"},
      {[](TestCall& c) { c.weight = {20000, {1, 8}, {8, 1}}; }, "op: weight must have shape [8], got [1, 8]"},
      {[](TestCall& c) { c.weight->sizes = c.weight->strides = {}; }, "op: weight must have shape [8], got []"},
      {[](TestCall& c) { c.weight->strides = {2}; }, "op: weight must be contiguous (stride 1), got stride 2"},
      {[](TestCall& c) { c.weight->strides = {0}; }, "op: weight must be contiguous (stride 1), got stride 0"},
      {[](TestCall& c) { c.out.sizes = {5, 8}; }, "op: out must have x's shape [4, 8], got [5, 8]"},
      {[](TestCall& c) { c.out.sizes = {4, 1, 8}, c.out.strides = {8, 8, 1}; },
       "op: out must have x's shape [4, 8], got [4, 1, 8]"},
      {[](TestCall& c) { c.out.strides = {16, 2}; }, "op: out must have a contiguous last dimension (stride 1), got stride 2"},
      {[](TestCall& c) { c.add().residual->sizes = {4, 7}; }, "op: residual must have x's shape [4, 8], got [4, 7]"},
      {[](TestCall& c) { c.add().residual->strides = {16, 2}; },
       "op: residual must have a contiguous last dimension (stride 1), got stride 2"},
      {[](TestCall& c) { c.add().sum->sizes = {3, 8}; }, "op: residual_out must have x's shape [4, 8], got [3, 8]"},
      {[](TestCall& c) { c.add_post().post->sizes = {1, 8}; }, "op: post_residual_addition must have x's shape [4, 8], got [1, 8]"},
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
      {[&](TestCall& c) { float16(*c.add().residual); }, "op: residual must have dtype bfloat16 (x's) or float32, got float16"},
      {[&](TestCall& c) { float16(*c.add().sum); }, "op: residual_out must have residual's dtype bfloat16, got float16"},
      {[&](TestCall& c) { float16(*c.add_post().post); },
       "op: post_residual_addition must have residual's dtype bfloat16, got float16"},
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
      {[](TestCall& c) { c.weight.reset(), c.options.gemma = true; }, "op: gemma must be False without a weight, got True"},
      {[](TestCall& c) { c.options.gemma = c.options.round_each_step = true; },
       "op: round_each_step must be False with gemma=True, got True"},
      {[&](TestCall& c) { float32(*c.weight), c.options.round_each_step = true; },
       "op: weight must have x's dtype bfloat16 with round_each_step=True, got float32"},
      {[&](TestCall& c) { float32(c.x), float32(c.out), c.options.round_each_step = true; },
       "op: weight must have x's dtype float32 with round_each_step=True, got bfloat16"},
      {[&](TestCall& c) { float32(*c.add().residual); }, "op: residual_out must have residual's dtype float32, got bfloat16"},
      {[&](TestCall& c) { float32(*c.add_post().residual); },
       "op: post_residual_addition must have residual's dtype float32, got bfloat16"},
      {[&](TestCall& c) { float32(*c.add_post().post); },
       "op: post_residual_addition must have residual's dtype bfloat16, got float32"},
      {[](TestCall& c) { c.gated().weight.reset(); }, "op: weight is needed, got none"},
      {[&](TestCall& c) { float32(*c.gated().gate); }, "op: gate must have x's dtype bfloat16, got float32"},
      {[](TestCall& c) { c.gated().gate->sizes = {4, 4}; }, "op: gate must have x's shape [4, 8], got [4, 4]"},
      {[](TestCall& c) { c.gated().options.group_size = 3; }, "op: group_size must divide x's last dimension 8, got 3"},
      {[](TestCall& c) { c.gated().options.group_size = 16; }, "op: group_size must divide x's last dimension 8, got 16"},
      {[](TestCall& c) { c.gated().options.group_size = 0; }, "op: group_size must divide x's last dimension 8, got 0"},
      {[](TestCall& c) { c.gated().options.group_size = -8; }, "op: group_size must divide x's last dimension 8, got -8"},
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
  EXPECT_EQ(0u, answer(c).find("op: weight must have shape [9223372036854775807], got [-9223372036854775808, -92233720"));
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
  const char* const want[] = {"x must have",   "weight must have",       "residual must have", "post_residual_addition must have",
                              "out must have", "residual_out must have", "eps must be",        "out is written"};
  ASSERT_EQ(std::size(want), told.size());
  for (size_t i = 0; i < told.size(); ++i) EXPECT_EQ(0u, told[i].find(std::string("op: ") + want[i])) << told[i];
}

// All rows, by the kernels' own arithmetic, are those of the tensors in their order, whatever collapses into whatever.
TEST(Rows, AreThoseOfTheTensors) {
  std::mt19937 random(3);
  const auto upto = [&](int64_t most) { return static_cast<int64_t>(random() % (most + 1)); };
  int sliced = 0, collapsed = 0;
  for (int i = 0; i < 20000; ++i) {
    TestCall call = TestCall().add_post();
    std::vector<int64_t> sizes;
    for (int64_t d = upto(6); d > 0; --d) sizes.push_back(1 + upto(2));
    sizes.push_back(8);
    const int style = static_cast<int>(upto(2));  // no gaps, one gap for all, or each operand its own
    int64_t address = 30000;
    for (Place* o : {&call.x, &call.out, &*call.residual, &*call.post, &*call.sum}) {
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
        const gpu::RowIndex at(slice, r);
        const auto expect_row = [&](const Place& o, Operand operand) {
          int64_t rest = row, want = o.first;
          for (size_t d = sizes.size() - 1; d-- > 0; rest /= sizes[d]) want += rest % sizes[d] * o.strides[d];
          ASSERT_EQ(want * 2, reinterpret_cast<int64_t>(at.pointer<bfloat16>(slice, operand, 0))) << "row " << row;
        };
        expect_row(call.x, kX);
        expect_row(*call.residual, kResidual);
        expect_row(*call.post, kPost);
        expect_row(call.out, kOut);
        expect_row(*call.sum, kResidualOut);
      }
    }
    int64_t rows = 1;
    for (size_t d = 0; d + 1 < sizes.size(); ++d) rows *= sizes[d];
    ASSERT_EQ(rows, row);
  }
  EXPECT_LT(100, sliced);
  EXPECT_LT(100, collapsed);
}

// Groups of a row are rows, whose weights lie apart as they do.
TEST(Rows, OfGroupsAreThoseOfTheTensors) {
  for (const bool gaps : {false, true}) {
    TestCall call = TestCall().gated();
    call.options.group_size = 2;
    for (Place* o : {&call.x, &*call.gate, &call.out})
      o->sizes = {3, 2, 5, 8}, o->strides = gaps ? std::vector<int64_t>{1000, 200, 10, 1} : std::vector<int64_t>{80, 40, 8, 1};
    RowParams params;
    RowSlices slices;
    Message message{};
    ASSERT_EQ(Status::kOk, call.check(&params, &slices, &message)) << message.text;
    EXPECT_EQ(2, params.hidden);
    EXPECT_EQ(gaps, slices.count > 1);
    int64_t row = 0;
    for (int64_t s = 0; s < slices.count; ++s) {
      const RowParams slice = select_slice(params, slices, s);
      for (int64_t r = 0; r < slice.rows; ++r, ++row) {
        const gpu::RowIndex at(slice, r);
        const int64_t group = row % 4, outer = row / 4;
        const auto& strides = call.x.strides;
        const int64_t offset = outer / 10 * strides[0] + outer / 5 % 2 * strides[1] + outer % 5 * strides[2] + group * 2;
        for (const auto& [place, operand] : {std::pair{&call.x, kX}, {&*call.gate, kGate}, {&call.out, kOut}})
          ASSERT_EQ((place->first + offset) * 2, reinterpret_cast<int64_t>(at.pointer<bfloat16>(slice, operand, 0))) << row;
        ASSERT_EQ((call.weight->first + group * 2) * 2, reinterpret_cast<int64_t>(at.pointer<bfloat16>(slice, kWeight, 0))) << row;
      }
    }
    EXPECT_EQ(3 * 2 * 5 * 4, row);
  }
}

TEST(Rows, OfAnEmptyTensorAreNone) {
  for (const std::vector<int64_t>& sizes : {std::vector<int64_t>{0, 8}, {3, 0, 8}, {0, 3, 2, 5, 2, 8}, {2, 2, 2, 2, 0, 8}}) {
    TestCall call;
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
  p.strides[kX][0] = int64_t{1} << 20, p.strides[kX][1] = 1;
  const int64_t outer = 12345, inner = (int64_t{1} << 32) + 6789;
  const gpu::RowIndex row(p, outer * p.sizes[1] + inner);
  EXPECT_EQ((outer * p.strides[kX][0] + inner) * 2, reinterpret_cast<int64_t>(row.pointer<float16>(p, kX, 0)));
}

}  // namespace
}  // namespace gemma_norm
