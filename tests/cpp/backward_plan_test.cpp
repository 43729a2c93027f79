// What every plan of a backward operator must be, whatever csrc/gpu/backward_tuning.h says.
#include "gpu/backward_plan.h"

#include <gtest/gtest.h>

#include <set>
#include <tuple>
#include <vector>

#include "cases.h"
#include "gpu/row.cuh"
#include "hidden_sizes.h"

namespace gemma_norm {
namespace {

class BackwardPlans : public testing::Test {
 protected:
  static BackwardPlan plan_of(int64_t hidden, DType dtype, int64_t rows, bool aligned, int32_t wave = 32) {
    RowParams p{};
    p.hidden = hidden;
    p.rows = rows;
    p.dtypes[kX] = dtype;
    return make_backward_plan(p, aligned, wave);
  }
  template <class Check>
  void for_all(const Check& check) {
    for (const DType dtype : kDTypes)
      for (const int64_t hidden : hidden_sizes())
        for (const bool aligned : {false, true}) {
          if (aligned && hidden * size_of(dtype) % kVectorBytes) continue;
          check(hidden, dtype, aligned);
          ASSERT_FALSE(HasFailure()) << hidden << " " << dtype_name(dtype) << (aligned ? ", aligned" : "");
        }
  }
};

TEST_F(BackwardPlans, TakeTheFirstKernelThatFits) {
  for_all([&](int64_t hidden, DType dtype, bool aligned) {
    const int64_t vectors = (hidden * size_of(dtype) + kVectorBytes - 1) / kVectorBytes;
    const BackwardPlan plan = plan_of(hidden, dtype, 5, aligned);
    const BackwardTuning& kernel = kBackwardKernels[plan.kernel];
    EXPECT_LE(vectors, kernel.row_vectors);
    EXPECT_EQ(kernel.scope, plan.scope);
    EXPECT_TRUE(aligned || plan.scope != Scope::kBlock) << "there is no such kernel for unaligned rows";
    if (plan.kernel > 0 && (aligned || plan.scope != Scope::kTwoPasses)) {
      EXPECT_GT(vectors, kBackwardKernels[plan.kernel - 1].row_vectors);
    }
    if (!aligned && plan.scope == Scope::kTwoPasses) {
      EXPECT_LT(kBackwardKernels[1].row_vectors, vectors) << "rows of a wave need not be aligned";
    }
  });
  std::set<int32_t> kernels;
  for (const int64_t hidden : hidden_sizes()) kernels.insert(plan_of(hidden, DType::kFloat32, 5, true).kernel);
  EXPECT_EQ(kBackwardKernelCount, static_cast<int>(kernels.size()));
}

// In float32, the longest rows of each kernel.
TEST_F(BackwardPlans, ChangeAtTheEdgesOfTheTable) {
  std::vector<int64_t> edges;
  for (int64_t hidden = 4; hidden <= 9000; hidden += 4)
    if (plan_of(hidden, DType::kFloat32, 5, true).kernel != plan_of(hidden + 4, DType::kFloat32, 5, true).kernel)
      edges.push_back(hidden / 4);
  std::vector<int64_t> want;
  for (const BackwardTuning& kernel : kBackwardKernels)
    if (kernel.row_vectors != INT64_MAX) want.push_back(kernel.row_vectors);
  EXPECT_EQ(want, edges);
}

TEST_F(BackwardPlans, FitTheGpu) {
  for_all([&](int64_t hidden, DType dtype, bool aligned) {
    for (const int32_t wave : {32, 64}) {
      const BackwardPlan plan = plan_of(hidden, dtype, 5, aligned, wave);
      EXPECT_EQ(0, plan.block_threads % wave);
      EXPECT_LE(plan.block_threads, kBackwardKernels[plan.kernel].max_block_threads);
      EXPECT_LE(plan.slots, plan.block_threads);
      if (plan.scope == Scope::kWave) {
        EXPECT_LE(1 << plan.log2_slots, 32) << "lanes of one wave on every GPU";
        EXPECT_LE(plan.slots, 1 << plan.log2_slots);
        EXPECT_LT(1 << plan.log2_slots, 2 * plan.slots);
        EXPECT_EQ(plan.block_threads, plan.groups() << plan.log2_slots);
      } else {
        EXPECT_EQ(1, plan.groups());
        EXPECT_TRUE(plan.scope != Scope::kBlock || plan.block_threads - plan.slots < wave)
            << "a wave with nothing to do";
      }
    }
  });
  EXPECT_EQ(0, (kSumColumns << kLog2MinSumParts) % 64) << "blocks of sum_chunks have whole waves";
}

TEST_F(BackwardPlans, CoverTheRowExactly) {
  std::vector<char> owners;
  const auto count = [&](const BackwardPlan& plan, int64_t hidden, auto x) {
    using X = decltype(x);
    const gpu::Launch launch{plan.slots, plan.log2_slots, plan.block_threads, plan.vectors, plan.whole_vectors};
    owners.assign(hidden, 0);
    for (int k = 0; k < plan.vectors; ++k)
      for (int slot = 0; slot < plan.slots; ++slot)
        for (int i = 0; i < gpu::kItems<X>; ++i) {
          const int64_t at =
              gpu::first_item<false, X, int64_t>(launch, slot, k) + static_cast<int64_t>(i) * gpu::item_step(launch);
          if (at < hidden) ++owners[at];
        }
    EXPECT_EQ(hidden, std::count(owners.begin(), owners.end(), 1));
  };
  for_all([&](int64_t hidden, DType dtype, bool aligned) {
    const BackwardPlan plan = plan_of(hidden, dtype, 5, aligned);
    EXPECT_EQ(hidden * size_of(dtype) % kVectorBytes == 0, plan.whole_vectors);
    if (dtype == DType::kFloat32)
      count(plan, hidden, float{});
    else if (dtype == DType::kFloat16)
      count(plan, hidden, float16{});
  });
}

TEST_F(BackwardPlans, HaveAKernelOfTheirOwnForOneRowOfAGroup) {
  for_all([&](int64_t hidden, DType dtype, bool aligned) {
    const BackwardPlan one = plan_of(hidden, dtype, 1, aligned);
    const BackwardTuning& kernel = kBackwardKernels[one.kernel];
    EXPECT_EQ(aligned && kernel.scope != Scope::kTwoPasses && kernel.vectors < 4, one.one_row);
    const int64_t most = int64_t{kernel.chunks} * one.groups();
    EXPECT_EQ(one.one_row, plan_of(hidden, dtype, most, aligned).one_row);
    EXPECT_FALSE(plan_of(hidden, dtype, most + 1, aligned).one_row);
  });
}

// Which rows a chunk has, and which elements a slot owns, decides the order of the sums, and so the bits.
TEST_F(BackwardPlans, AreAlikeOnEveryGpu) {
  for_all([&](int64_t hidden, DType dtype, bool aligned) {
    for (const int64_t rows : {1, 2, 131, 132, 133, 4096, 1000000}) {
      const BackwardPlan plan = plan_of(hidden, dtype, rows, aligned), wide = plan_of(hidden, dtype, rows, aligned, 64);
      EXPECT_EQ(std::tie(plan.kernel, plan.chunks, plan.slots, plan.vectors, plan.log2_slots),
                std::tie(wide.kernel, wide.chunks, wide.slots, wide.vectors, wide.log2_slots));
      EXPECT_EQ(plan.groups(), wide.groups());
      EXPECT_LE(1, plan.chunks);
      EXPECT_LE(plan.chunks, kBackwardKernels[plan.kernel].chunks);
      EXPECT_LT((plan.chunks - 1) * plan.groups(), rows) << "a block with nothing to do";
      EXPECT_TRUE(plan.chunks == kBackwardKernels[plan.kernel].chunks || plan.chunks * plan.groups() >= rows)
          << "a block has two rows, though there could be more blocks";
    }
    const DType twin = dtype == DType::kFloat16 ? DType::kBFloat16 : dtype;
    EXPECT_EQ(plan_of(hidden, dtype, 4096, aligned).chunks, plan_of(hidden, twin, 4096, aligned).chunks);
  });
}

// The other kernels count rows in 32 bits.
TEST_F(BackwardPlans, CountVeryManyRowsIn64Bits) {
  constexpr int64_t kMany = INT32_MAX / 2;
  EXPECT_EQ(Scope::kWave, plan_of(8, DType::kBFloat16, kMany - 1, true).scope);
  EXPECT_EQ(Scope::kTwoPasses, plan_of(8, DType::kBFloat16, kMany, true).scope);
  EXPECT_EQ(Scope::kTwoPasses, plan_of(4096, DType::kBFloat16, int64_t{1} << 40, true).scope);
}

}  // namespace
}  // namespace gemma_norm
