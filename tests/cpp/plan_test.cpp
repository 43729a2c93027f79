// What every plan must be, whatever csrc/gpu/tuning.h says: for each hidden size up to 20000, and for some that are
// much larger.
#include "gpu/plan.h"

#include <gtest/gtest.h>

#include <set>
#include <tuple>
#include <vector>

#include "cases.h"
#include "gpu/row.cuh"
#include "hidden_sizes.h"

namespace gemma_norm {
namespace {

constexpr int64_t kNoLimit = int64_t{1} << 42, kHipLimit = (int64_t{1} << 32) - 1;
bool is_power_of_two(int32_t n) { return n > 0 && (n & (n - 1)) == 0; }

class Plans : public testing::TestWithParam<DeviceFacts> {
 protected:
  template <class Check>
  void for_all(const Check& check) {
    for (const DType dtype : kDTypes)
      for (const int64_t hidden : hidden_sizes()) {
        const LaunchPlan plan = make_plan(hidden, dtype, GetParam());
        check(plan, hidden, dtype);
        ASSERT_FALSE(HasFailure()) << hidden << " " << dtype_name(dtype) << ": " << describe(plan, dtype);
      }
  }
};

TEST_P(Plans, FitTheGpu) {
  const int32_t wave = GetParam().wave_width;
  for_all([&](const LaunchPlan& plan, int64_t, DType) {
    EXPECT_EQ(0, plan.block_threads % wave);
    EXPECT_LE(plan.block_threads, plan.max_block_threads);
    EXPECT_LE(1, plan.slots);
    EXPECT_LE(plan.slots, plan.group_threads);
    switch (plan.scope) {
      case Scope::kWave:  // Lanes exchange in aligned groups of one wave.
        EXPECT_TRUE(is_power_of_two(plan.group_threads));
        EXPECT_LE(plan.group_threads, wave);
        EXPECT_EQ(0, plan.block_threads % plan.group_threads);
        EXPECT_LE(plan.block_threads, 128);
        break;
      case Scope::kBlock:
        EXPECT_EQ(plan.group_threads, plan.block_threads);
        EXPECT_LE(plan.block_threads, kMaxBlockThreads);
        EXPECT_LT(plan.block_threads - plan.slots, wave) << "a wave with nothing to do";
        break;
      case Scope::kCluster:
        EXPECT_TRUE(is_power_of_two(plan.block_threads)) << "the sum's tree would not be that of one block";
        EXPECT_LT(plan.group_threads - plan.slots, plan.block_threads) << "a block with nothing to do";
        EXPECT_EQ(plan.group_threads, plan.cluster * plan.block_threads);
        EXPECT_LE(plan.block_threads, kMaxBlockThreads);
        break;
      case Scope::kTwoPasses:
        EXPECT_EQ(plan.group_threads, plan.block_threads);
        EXPECT_LE(plan.block_threads, kMaxBlockThreads);
        EXPECT_EQ(plan.slots, plan.block_threads);
        break;
    }
    EXPECT_LE(plan.cluster, plan.scope == Scope::kCluster ? GetParam().max_cluster : 1);
  });
}

// By the arithmetic of the kernels, every element belongs to exactly one slot.
TEST_P(Plans, CoverTheRowExactly) {
  std::vector<char> owners;
  const auto count = [&](const LaunchPlan& plan, int64_t hidden, auto x) {
    using X = decltype(x);
    const gpu::Launch launch{plan.slots, __builtin_ctz(plan.group_threads / plan.slot_threads), plan.block_threads,
                             plan.vectors, plan.whole_vectors};
    const int step = gpu::item_step(launch);
    owners.assign(hidden, 0);
    for (int k = 0; k < plan.vectors; ++k)
      for (int slot = 0; slot < plan.slots; ++slot)
        for (int i = 0; i < gpu::kItems<X>; ++i) {
          const int64_t at = gpu::first_item<false, X, int64_t>(launch, slot, k) + static_cast<int64_t>(i) * step;
          if (at < hidden) ++owners[at];
        }
    EXPECT_EQ(hidden, std::count(owners.begin(), owners.end(), 1));
  };
  for_all([&](const LaunchPlan& plan, int64_t hidden, DType dtype) {
    EXPECT_EQ(hidden * size_of(dtype) % kVectorBytes == 0, plan.whole_vectors);
    const int64_t vectors = int64_t{plan.vectors} * plan.slots,
                  needed = (hidden * size_of(dtype) + kVectorBytes - 1) / kVectorBytes;
    EXPECT_LE(needed, vectors);
    EXPECT_LT(vectors - needed, plan.scope == Scope::kTwoPasses ? plan.slots : plan.vectors)
        << "a slot with nothing to do";
    if (dtype == DType::kFloat32)
      count(plan, hidden, float{});
    else if (dtype == DType::kFloat16)
      count(plan, hidden, float16{});
  });
}

// Which slot owns which elements decides the order of the sum. It must not depend on the wave width, on limits of
// launches, or on which of two dtypes of one size it is. (For rows that no single block holds, it depends on whether
// there are clusters.)
TEST_P(Plans, OwnElementsAlikeOnEveryGpu) {
  for_all([&](const LaunchPlan& plan, int64_t hidden, DType dtype) {
    for (const DeviceFacts& other : {DeviceFacts{32, kNoLimit, false, GetParam().max_cluster},
                                     DeviceFacts{64, kHipLimit, true, GetParam().max_cluster}})
      for (const DType twin : {dtype, dtype == DType::kFloat16 ? DType::kBFloat16 : dtype}) {
        const LaunchPlan same = make_plan(hidden, twin, other);
        EXPECT_EQ(plan.scope, same.scope);
        EXPECT_EQ(plan.vectors, same.vectors);
        EXPECT_EQ(plan.slots, same.slots);
        EXPECT_EQ(plan.whole_vectors, same.whole_vectors);
      }
    const LaunchPlan block = make_plan(hidden, dtype, {32, kNoLimit, false, 1});
    if (block.scope == Scope::kBlock) {
      EXPECT_EQ(std::tie(block.vectors, block.slots), std::tie(plan.vectors, plan.slots));
    }
  });
}

// A row has the same bits alone and among thousands. So when few rows are spread, the slots and what they own stay the
// same, and the tree of sums is cut between waves and blocks where the waves of one block cut it.
TEST_P(Plans, SpreadFewRowsInTheSameLayout) {
  DeviceFacts device = GetParam();
  device.processors = 132;
  std::set<int32_t> vectors;
  for_all([&](const LaunchPlan& ungated, int64_t hidden, DType dtype) {
    for (const int tensors : {3, 5, 6}) {
      const LaunchPlan plan = tensors == 3 ? make_plan(hidden, dtype, GetParam(), Held::kRowAndGates) : ungated;
      const int64_t bytes = tensors * hidden * size_of(dtype);
      const LaunchPlan one = spread(plan, 1, bytes, device);
      EXPECT_EQ(std::tie(plan.vectors, plan.slots, plan.whole_vectors),
                std::tie(one.vectors, one.slots, one.whole_vectors));
      for (const int64_t rows : {8, 264, 1000000}) {
        const LaunchPlan more = spread(plan, rows, bytes, device);
        EXPECT_EQ(more.slot_threads * plan.group_threads, more.cluster == 1 ? more.group_threads : plan.group_threads);
        EXPECT_TRUE(more.cluster == one.cluster || more.cluster == plan.cluster);
        EXPECT_FALSE(rows > device.processors && more.cluster != plan.cluster) << "there is enough to do";
      }
      if (one.cluster == plan.cluster) {
        EXPECT_EQ(std::tie(plan.scope, plan.block_threads, plan.max_block_threads),
                  std::tie(one.scope, one.block_threads, one.max_block_threads));
        continue;
      }
      vectors.insert(one.vectors);
      EXPECT_EQ(Scope::kCluster, one.scope);
      EXPECT_TRUE(is_power_of_two(one.block_threads));
      EXPECT_EQ(0, one.block_threads % device.wave_width);
      EXPECT_LT(one.block_threads, plan.block_threads);
      EXPECT_EQ(256, one.max_block_threads) << "what the kernels are compiled for";
      EXPECT_LE(one.block_threads, one.max_block_threads);
      EXPECT_LE(one.cluster, device.max_cluster);
      EXPECT_EQ(one.group_threads, one.cluster * one.block_threads);
      EXPECT_LT(one.group_threads - one.slots, one.block_threads) << "a block with nothing to do";
    }
  });
  EXPECT_EQ(device.max_cluster > 1 ? (std::set<int32_t>{2, 4, 8}) : std::set<int32_t>{}, vectors);
}

TEST_P(Plans, KeepWithinTheLimitsOfALaunch) {
  for_all([&](const LaunchPlan& plan, int64_t, DType) {
    const int64_t blocks = max_blocks(plan, GetParam());
    EXPECT_LE(1, blocks);
    EXPECT_LE(blocks * plan.cluster, INT32_MAX);
    EXPECT_LE(blocks * plan.cluster * plan.block_threads, GetParam().max_threads);
    const int64_t more = (blocks + 1) * plan.cluster;
    EXPECT_TRUE(more > INT32_MAX || more * plan.block_threads > GetParam().max_threads) << "more launches than needed";
  });
}

constexpr const char* kGpuNames[] = {"hopper", "ampere", "rdna", "cdna"};
INSTANTIATE_TEST_SUITE_P(, Plans,
                         testing::Values(DeviceFacts{32, kNoLimit, true, 8}, DeviceFacts{32, kNoLimit, false, 1},
                                         DeviceFacts{32, kHipLimit, false, 1}, DeviceFacts{64, kHipLimit, false, 1}),
                         [](const auto& info) { return kGpuNames[info.index]; });

TEST(AllPlans, ReachEveryScope) {
  const DeviceFacts device{32, kNoLimit, true, 8};
  for (const DType dtype : kDTypes) {
    std::set<Scope> scopes;
    for (const int64_t hidden : hidden_sizes()) scopes.insert(make_plan(hidden, dtype, device).scope);
    EXPECT_EQ((std::set<Scope>{Scope::kWave, Scope::kBlock, Scope::kCluster, Scope::kTwoPasses}), scopes);
    EXPECT_LE(4u * 5, plan_edges(dtype).size()) << "the cases of kernel_test are made from these";
  }
}

// Rows of the lengths that models have are held in registers, so that they are read once.
TEST(AllPlans, HoldTheRowsOfModelsInRegisters) {
  for (const int32_t wave : {32, 64})
    for (const int64_t hidden : {64, 128, 256, 2048, 2560, 4096, 5120, 8192, 16384}) {
      const LaunchPlan plan = make_plan(hidden, DType::kBFloat16, {wave, kNoLimit, false, 1});
      EXPECT_NE(Scope::kTwoPasses, plan.scope) << hidden;
      EXPECT_EQ(hidden <= 256, plan.scope == Scope::kWave) << hidden;
    }
}

// Where the row's kernel finds the largest element of each group. Elsewhere a block takes each row, in passes, which is
// slower and has the same bits.
TEST(AllPlans, SayWhichKernelsFindTheLargestOfGroups) {
  const auto groups = [](int64_t hidden, int64_t group, DType dtype = DType::kBFloat16) {
    RowParams params{};
    params.hidden = hidden;
    params.scale_group = group;
    return plan_groups(make_plan(hidden, dtype, {32, kNoLimit, false, 1}), params, dtype);
  };
  for (const int64_t hidden : {256, 2048, 4096, 5376, 8192}) {
    EXPECT_TRUE(groups(hidden, 0).held) << hidden << ", and the scale is given";
    EXPECT_TRUE(groups(hidden, hidden).held) << hidden << ", one scale";
    EXPECT_TRUE(groups(hidden, 128).held) << hidden;
    EXPECT_EQ(4, groups(hidden, 128).log2_vectors);
  }
  EXPECT_EQ(16, groups(4096, 128).lanes);
  EXPECT_EQ(32, groups(4096, 128, DType::kFloat32).lanes);
  EXPECT_FALSE(groups(4096, 4).held) << "half a vector";
  EXPECT_FALSE(groups(3072, 24).held) << "three vectors";
  EXPECT_FALSE(groups(200000, 0).held) << "two passes";
  EXPECT_FALSE(groups(200000, 200000).held) << "two passes";
  EXPECT_EQ(kMaxBlockThreads, make_plan(16384, DType::kFloat32, {32, kNoLimit, false, 1}).max_block_threads);
  EXPECT_FALSE(groups(16384, 16384, DType::kFloat32).held) << "a kernel of 1024 threads has too few registers";
}

// How many rows are spread at most, by hidden size and by the number of bfloat16 tensors that are moved: as many as it
// pays for on an H200 (docs/performance.md).
TEST(Spread, StopsWhereItNoLongerPays) {
  const auto most_rows = [](int64_t hidden, int tensors, int32_t processors) {
    const DeviceFacts device{32, kNoLimit, true, 8, processors};
    const LaunchPlan plan = make_plan(hidden, DType::kBFloat16, device);
    int64_t rows = 0;
    while (spread(plan, rows + 1, hidden * tensors * 2, device).cluster != plan.cluster) ++rows;
    return rows;
  };
  const auto plain = [&](int64_t hidden) { return most_rows(hidden, 3, 132); };
  const auto fused = [&](int64_t hidden) { return most_rows(hidden, 5, 132); };
  EXPECT_EQ((std::vector<int64_t>{0, 0, 26, 33, 33, 33}),
            (std::vector<int64_t>{plain(2048), plain(4096), plain(5120), plain(8192), plain(16384), plain(65536)}));
  EXPECT_EQ((std::vector<int64_t>{0, 26, 16, 52, 33, 33}),
            (std::vector<int64_t>{fused(2048), fused(2560), fused(4096), fused(5120), fused(8192), fused(65536)}));
  EXPECT_EQ(4, most_rows(8192, 3, 16)) << "a slice of a GPU";
}

// There are two threads a slot for up to two blocks a multiprocessor, if the rows are so short that a wave has the
// threads for it.
TEST(Spread, GivesSmallGatedRowsTwoThreadsASlotWhereItPays) {
  const auto most_rows = [](int64_t hidden, const DeviceFacts& device, Held held = Held::kRowAndGates) {
    const LaunchPlan plan = make_plan(hidden, DType::kBFloat16, device, held);
    int64_t rows = 0;
    while (spread(plan, rows + 1, hidden * 6, device).slot_threads == 2) ++rows;
    return rows;
  };
  const DeviceFacts hopper{32, kNoLimit, true, 8, 132};
  EXPECT_EQ((std::vector<int64_t>{264 * 128 / 2, 264 * 128 / 8, 264 * 128 / 16, 264 * 128 / 32, 0, 0}),
            (std::vector<int64_t>{most_rows(8, hopper), most_rows(64, hopper), most_rows(128, hopper),
                                  most_rows(256, hopper), most_rows(264, hopper), most_rows(1000, hopper)}));
  EXPECT_EQ(0, most_rows(128, {32, kNoLimit, false, 1, 132})) << "no clusters";
  EXPECT_EQ(0, most_rows(128, hopper, Held::kTwoRows)) << "no gates";
}

TEST(Plan, PrintsItself) {
  LaunchPlan plan{};
  plan.scope = Scope::kBlock;
  plan.vectors = 2;
  plan.slots = 250;
  plan.slot_threads = 1;
  plan.group_threads = plan.block_threads = 256;
  plan.whole_vectors = true;
  EXPECT_EQ("block: 250 of 256 threads a row, 1 rows a block, 2 x 8 consecutive elements a thread",
            describe(plan, DType::kBFloat16));
  plan.scope = Scope::kWave;
  plan.slots = 13;
  plan.group_threads = 16;
  plan.whole_vectors = false;
  EXPECT_EQ("wave: 13 of 16 threads a row, 16 rows a block, 2 x 4 interleaved elements a thread",
            describe(plan, DType::kFloat32));
  plan.slot_threads = 2;
  plan.group_threads = 32;
  plan.whole_vectors = true;
  EXPECT_EQ("wave: 26 of 32 threads a row, 8 rows a block, 1 x 4 consecutive elements a thread",
            describe(plan, DType::kFloat32));
}

TEST(Plan, IsPrintedOnceWhereAskedFor) {
  setenv("GEMMA_NORM_PRINT_PLAN", "1", 1);
  EXPECT_TRUE(prints_plans());
  RowParams params{};
  params.hidden = 4096;
  params.dtypes[kX] = params.dtypes[kWeight] = DType::kBFloat16;
  const DeviceFacts device{32, kNoLimit, true, 8, 132};
  const LaunchPlan plan = make_plan(params.hidden, params.dtypes[kX], device);
  testing::internal::CaptureStderr();
  for (int i = 0; i < 2; ++i) print_plan(RmsNorm::kInfos[0], params, params.dtypes[kX], plan, true);
  print_plan(RmsNorm::kInfos[0], params, params.dtypes[kX], plan, false);
  params.dtypes[kWeight] = DType::kFloat32;  // another kernel
  print_plan(RmsNorm::kInfos[0], params, params.dtypes[kX], plan, false);
  const std::string call = "gemma_norm: rms_norm, hidden 4096, bfloat16, weight ",
                    how = ": block: 256 of 256 threads a row, 1 rows a block, 2 x 8 consecutive elements a thread, ";
  EXPECT_EQ(call + "bfloat16" + how + "16 bytes an access\n" + call + "bfloat16" + how + "an element an access\n" +
                call + "float32" + how + "an element an access\n",
            testing::internal::GetCapturedStderr());
}

// Each kernel in the table of tuning.h is that of some plan.
TEST(Kernels, AreAllOfSomePlan) {
  std::set<int32_t> kernels;
  for (const int32_t max_cluster : {1, 8})
    for (const Held held :
         {Held::kRow, Held::kRowWideWeights, Held::kTwoRows, Held::kRowAndGates, Held::kTwoRowsTwoWeights})
      for (const int64_t hidden : hidden_sizes()) {
        const DeviceFacts device{32, kNoLimit, true, max_cluster, 132};
        const LaunchPlan plan = make_plan(hidden, DType::kFloat32, device, held);
        for (const LaunchPlan& p : {plan, spread(plan, 1, hidden * 20, device)}) {
          kernels.insert(p.kernel);
          EXPECT_EQ(kKernels[p.kernel].scope, p.scope);
          EXPECT_EQ(kKernels[p.kernel].max_block_threads, p.max_block_threads);
          EXPECT_TRUE(p.scope == Scope::kTwoPasses || kKernels[p.kernel].vectors * p.slot_threads == p.vectors)
              << "the vectors of a slot, shared out among its threads, must be those of the kernel's thread";
          EXPECT_LT(0, kKernels[p.kernel].resident_threads[static_cast<int>(held)]);
        }
      }
  EXPECT_EQ(kKernelCount, static_cast<int>(kernels.size()));
}

}  // namespace
}  // namespace gemma_norm
