// check() describes a call's tensors as rows, whose addresses kernels compute.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <utility>
#include <vector>

#include "gpu/plan.h"
#include "gpu/row.cuh"
#include "test_call.h"

namespace gemma_norm {
namespace {

// By the arithmetic of the kernels, the rows are those of the tensors, each once, whichever dimensions collapse into
// one and in whichever order they lie in memory.
TEST(Rows, AreThoseOfTheTensors) {
  std::mt19937 random(3);
  const auto upto = [&](int64_t most) { return static_cast<int64_t>(random() % (most + 1)); };
  int sliced = 0, collapsed = 0, transposed = 0;
  for (int i = 0; i < 20000; ++i) {
    TestCall call = TestCall().add_post();
    const std::pair<Place*, Operand> places[] = {{&call.x, kX},
                                                 {&*call.residual, kResidual},
                                                 {&*call.post, kPost},
                                                 {&call.out, kOut},
                                                 {&*call.sum, kResidualOut}};
    std::vector<int64_t> sizes;
    for (int64_t d = upto(6); d > 0; --d) sizes.push_back(1 + upto(2));
    sizes.push_back(8);
    std::vector<size_t> order;  // of the leading dimensions in memory, the outermost first
    for (size_t d = 0; d + 1 < sizes.size(); ++d) order.insert(order.begin() + (i % 2 ? upto(d) : d), d);
    const bool is_transposed = !std::is_sorted(order.begin(), order.end());
    const int style =
        static_cast<int>(upto(2));  // of gaps: none, the same for all operands, or of each operand its own
    int64_t address = 30000;
    for (const auto& [o, operand] : places) {
      o->first = address;
      o->sizes = sizes;
      o->strides.assign(sizes.size(), 1);
      int64_t extent = 8;
      for (size_t k = order.size(); k-- > 0; extent *= sizes[order[k]])
        o->strides[order[k]] = extent += style == 0 ? 0 : style == 1 ? 8 : 8 * upto(1);
      address += extent + 8;
    }
    RowParams params;
    RowSlices slices;
    Message message{};
    ASSERT_EQ(Status::kOk, call.check(&params, &slices, &message)) << message.text;
    sliced += slices.count > 1;
    collapsed += slices.count == 1 && params.sizes[0] == 1 && sizes.size() > 2;
    transposed += slices.count == 1 && params.sizes[0] == 1 && is_transposed;

    int64_t rows = 1;
    for (size_t d = 0; d + 1 < sizes.size(); ++d) rows *= sizes[d];
    std::map<int64_t, std::vector<int64_t>> expected;  // the addresses of a row in all operands, by that in x
    for (int64_t row = 0; row < rows; ++row) {
      std::vector<int64_t> addresses;
      for (const auto& [o, operand] : places) {
        int64_t rest = row, at = o->first;
        for (size_t d = sizes.size() - 1; d-- > 0; rest /= sizes[d]) at += rest % sizes[d] * o->strides[d];
        addresses.push_back(at * 2);
      }
      expected[addresses[0]] = addresses;
    }
    ASSERT_EQ(rows, static_cast<int64_t>(expected.size()));
    for (int64_t s = 0; s < slices.count; ++s) {
      const RowParams slice = select_slice(params, slices, s);
      for (int64_t r = 0; r < slice.rows; ++r) {
        const gpu::RowIndex at(gpu::Divider(slice.sizes[1]), static_cast<uint32_t>(r));
        std::vector<int64_t> addresses;
        for (const auto& [o, operand] : places)
          addresses.push_back(reinterpret_cast<int64_t>(at.pointer<bfloat16>(slice, operand, 0)));
        ASSERT_EQ(expected[addresses[0]], addresses) << "slice " << s << ", row " << r;
        expected.erase(addresses[0]);
      }
    }
    ASSERT_TRUE(expected.empty());
  }
  EXPECT_LT(100, sliced);
  EXPECT_LT(100, collapsed);
  EXPECT_LT(100, transposed);
}

// Kernels look at strides to see whether they can take whole vectors.
TEST(Rows, OfOneAreAStrideOfZeroApart) {
  TestCall call;
  RowParams params;
  RowSlices slices;
  Message message{};
  ASSERT_EQ(Status::kOk, call.check(&params, &slices, &message)) << "leaves strides on the stack";
  call.x.sizes = call.out.sizes = {8};
  call.x.strides = call.out.strides = {1};
  ASSERT_EQ(Status::kOk, call.check(&params, &slices, &message)) << message.text;
  EXPECT_EQ(1, params.rows);
  for (const int64_t size : params.sizes) EXPECT_EQ(1, size);
  for (const Operand o : {kX, kOut})
    for (const int64_t stride : params.strides[o]) EXPECT_EQ(0, stride);
}

// A slice is a launch of its own, so there are few of them, in whichever order the dimensions of x lie in memory.
TEST(Rows, AreFewSlicesOfManyRows) {
  std::vector<int64_t> memory = {0, 1, 2};  // the dimensions, the outermost in memory first
  do {
    TestCall call;
    call.x.sizes = call.out.sizes = {2, 8, 4096, 8};
    call.out.strides = {8 * 4096 * 8, 4096 * 8, 8, 1};
    call.x.strides = {0, 0, 0, 1};
    int64_t stride = 8;
    for (size_t k = memory.size(); k-- > 0; stride *= call.x.sizes[memory[k]]) call.x.strides[memory[k]] = stride;
    call.x.first = 100000, call.out.first = 10000000;
    RowParams params;
    RowSlices slices;
    Message message{};
    ASSERT_EQ(Status::kOk, call.check(&params, &slices, &message)) << message.text;
    EXPECT_LE(slices.count, 2);
  } while (std::next_permutation(memory.begin(), memory.end()));
}

// Groups of a row are rows of their own, whose weights lie apart as the groups do.
TEST(Rows, OfGroupsAreThoseOfTheTensors) {
  for (const bool gaps : {false, true}) {
    TestCall call = TestCall().gated();
    call.options.group_size = 2;
    for (Place* o : {&call.x, &*call.gate, &call.out})
      o->sizes = {3, 2, 5, 8},
      o->strides = gaps ? std::vector<int64_t>{1000, 200, 10, 1} : std::vector<int64_t>{80, 40, 8, 1};
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
        const gpu::RowIndex at(gpu::Divider(slice.sizes[1]), static_cast<uint32_t>(r));
        const int64_t group = row % 4, outer = row / 4;
        const auto& strides = call.x.strides;
        const int64_t offset =
            outer / 10 * strides[0] + outer / 5 % 2 * strides[1] + outer % 5 * strides[2] + group * 2;
        for (const auto& [place, operand] : {std::pair{&call.x, kX}, {&*call.gate, kGate}, {&call.out, kOut}})
          ASSERT_EQ((place->first + offset) * 2, reinterpret_cast<int64_t>(at.pointer<bfloat16>(slice, operand, 0)))
              << row;
        ASSERT_EQ((call.weight->first + group * 2) * 2,
                  reinterpret_cast<int64_t>(at.pointer<bfloat16>(slice, kWeight, 0)))
            << row;
      }
    }
    EXPECT_EQ(3 * 2 * 5 * 4, row);
  }
}

TEST(Rows, OfAnEmptyTensorAreNone) {
  for (const std::vector<int64_t>& sizes :
       {std::vector<int64_t>{0, 8}, {3, 0, 8}, {0, 3, 2, 5, 2, 8}, {2, 2, 2, 2, 0, 8}}) {
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

// Where one launch is too small, several have all rows, each once, and none has more rows than it may.
TEST(Rows, OfSeveralLaunchesAreAllRowsOnce) {
  struct {
    Operand operand;
    DType dtype;
    int64_t first, outer, inner;  // in bytes
  } const operands[] = {{kX, DType::kFloat16, 40000, 200, 16},
                        {kWeight, DType::kFloat32, 50000, 0, 32},  // of groups
                        {kOut, DType::kFloat4E2M1FNx2, 60000, 50, 4},
                        {kScaleOut, DType::kInt32, 70000, 4, 400}};
  for (const int64_t outer : {1, 2, 7})
    for (const int64_t inner : {1, 3, 10})
      for (int64_t most = 1; most <= outer * inner + 1; ++most) {
        RowParams p{};
        p.rows = outer * inner;
        p.sizes[0] = outer, p.sizes[1] = inner;
        for (const auto& o : operands) {
          p.data[o.operand] = reinterpret_cast<void*>(o.first);
          p.dtypes[o.operand] = o.dtype;
          p.strides[o.operand][0] = o.outer / size_of(o.dtype), p.strides[o.operand][1] = o.inner / size_of(o.dtype);
        }
        std::map<std::vector<int64_t>, int> found;  // where a row is in all operands
        each_launch(p, most, [&](const RowParams& part) {
          EXPECT_EQ(part.rows, part.sizes[0] * part.sizes[1]);
          EXPECT_LE(part.rows, most);
          for (uint32_t r = 0; r < part.rows; ++r) {
            const gpu::RowIndex row(gpu::Divider(part.sizes[1]), r);
            std::vector<int64_t> places;
            for (const auto& o : operands)
              places.push_back(reinterpret_cast<int64_t>(part.data[o.operand]) +
                               row.offset(part, o.operand) * size_of(o.dtype));
            ++found[places];
          }
          return false;  // no error
        });
        EXPECT_EQ(static_cast<size_t>(outer * inner), found.size());
        for (int64_t i = 0; i < outer; ++i)
          for (int64_t j = 0; j < inner; ++j) {
            std::vector<int64_t> places;
            for (const auto& o : operands) places.push_back(o.first + i * o.outer + j * o.inner);
            EXPECT_EQ(1, found[places]) << i << ' ' << j;
          }
      }
}

TEST(Rows, OfSeveralLaunchesEndWithAnError) {
  RowParams p{};
  p.rows = 6;
  p.sizes[0] = 2, p.sizes[1] = 3;
  int launches = 0;
  EXPECT_EQ(2, each_launch(p, 1, [&](const RowParams&) { return ++launches == 2 ? 2 : 0; }));
  EXPECT_EQ(2, launches);
}

// Kernels find rows in 32 bits, and their offsets in 64.
TEST(Rows, BeyondThirtyTwoBitsAreReached) {
  RowParams p{};
  p.sizes[0] = 5, p.sizes[1] = int64_t{1} << 33;
  p.rows = p.sizes[0] * p.sizes[1];
  p.strides[kX][0] = int64_t{1} << 40, p.strides[kX][1] = 48;
  p.dtypes[kX] = DType::kFloat16;
  p.data[kX] = reinterpret_cast<void*>(int64_t{4096});
  int64_t rows = 0, last = 0;
  each_launch(p, INT64_MAX, [&](const RowParams& part) {
    EXPECT_LT(part.rows, int64_t{1} << 31);
    const gpu::RowIndex row(gpu::Divider(part.sizes[1]), static_cast<uint32_t>(part.rows - 1));
    last = reinterpret_cast<int64_t>(row.pointer<float16>(part, kX, 0));
    rows += part.rows;
    EXPECT_EQ(4096 + 2 * ((rows - 1) / p.sizes[1] * p.strides[kX][0] + (rows - 1) % p.sizes[1] * 48), last);
    return false;
  });
  EXPECT_EQ(p.rows, rows);
}

}  // namespace
}  // namespace gemma_norm
