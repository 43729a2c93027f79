// The emulated device does what it promises, and reports a kernel that does what no GPU promises to get right.
#include "emulated_machine.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "formats.h"

namespace gemma_norm {
namespace {

constexpr int64_t kPlenty = int64_t{1} << 32;
struct SharedValues {
  float of[512];
};
float* shared_value() { return device::shared_memory<SharedValues>().of; }

device::Error launch(const EmulatedGpu& gpu, int64_t blocks, int threads, const std::function<void()>& thread,
                     int cluster = 1) {
  device::set_machine(gpu);
  return device::run_grid(nullptr, blocks, threads, cluster, thread);
}

testing::AssertionResult says(const char* text, device::Error error) {
  if (error && std::strstr(error, text)) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "must say '" << text << "', got " << (error ? error : "success");
}

class EmulatedMachine : public testing::TestWithParam<EmulatedGpu> {};

TEST_P(EmulatedMachine, RunsEveryThreadOfEveryBlockOnce) {
  std::vector<int> runs(7 * 256);
  ASSERT_STREQ(nullptr, launch(GetParam(), 7, 256, [&] {
                 EXPECT_EQ(256, device::here.block_threads);
                 EXPECT_EQ(GetParam().wave_width, device::wave_width());
                 ++runs[device::block_index() * 256 + device::thread_index()];
               }));
  EXPECT_EQ(std::vector<int>(runs.size(), 1), runs);
}

TEST_P(EmulatedMachine, SumsOverLanesNeighboursFirst) {
  // The magnitudes are far apart, so that another order of additions rounds to another sum.
  const auto value = [](int thread) { return std::ldexp(1.0f + thread, thread * 7 % 23); };
  for (int lanes = 1; lanes <= GetParam().wave_width; lanes *= 2) {
    std::vector<float> sums(128);
    ASSERT_STREQ(nullptr, launch(GetParam(), 1, 128, [&] {
                   const int thread = device::thread_index();
                   sums[thread] = device::sum_over_lanes(value(thread), lanes);
                 }));
    const std::function<float(int, int)> tree = [&](int first, int count) -> float {
      return count == 1 ? value(first) : tree(first, count / 2) + tree(first + count / 2, count / 2);
    };
    for (int thread = 0; thread < 128; ++thread) EXPECT_EQ(tree(thread / lanes * lanes, lanes), sums[thread]) << lanes;
  }
}

TEST_P(EmulatedMachine, BarriersOrderWritesAndReads) {
  ASSERT_STREQ(nullptr, launch(GetParam(), 3, 512, [] {
                 const int thread = device::thread_index();
                 EXPECT_TRUE(std::isnan(shared_value()[thread])) << "shared memory must start as garbage";
                 shared_value()[thread] = thread;
                 device::block_barrier();
                 EXPECT_EQ(511 - thread, shared_value()[511 - thread]);
                 device::block_barrier();
                 shared_value()[thread] = -1;
               }));
}

TEST_P(EmulatedMachine, SaysWhenThreadsOfABlockDiverge) {
  const device::Error returned = launch(GetParam(), 2, 128, [] {
    if (device::thread_index() != 5) device::block_barrier();
  });
  EXPECT_TRUE(says("127 wait at a barrier, 0 for the cluster, 0 for other lanes, and 1 have returned", returned));

  const device::Error exchanging = launch(GetParam(), 2, 128, [] {
    if (device::thread_index() == 5) device::block_barrier();
    device::sum_over_lanes(1, 32);
  });
  EXPECT_TRUE(says("1 wait at a barrier", exchanging));

  const device::Error distances =
      launch(GetParam(), 2, 128, [] { device::value_of_lane(device::thread_index() % 2 ? 1 : 2, 0); });
  EXPECT_STREQ("lanes of one wave exchange over different distances", distances);

  EXPECT_STREQ(nullptr, launch(GetParam(), 2, 128, [] { device::block_barrier(); })) << "the next launch starts afresh";
}

TEST_P(EmulatedMachine, SaysWhenAnAccessIsNotAligned) {
  Vector16 words[2];
  const auto* between = reinterpret_cast<const Vector16*>(reinterpret_cast<const char*>(words) + 4);
  const device::Error error = launch(GetParam(), 1, 64, [&] {
    device::wait_for_previous_kernel();
    device::load(between);
  });
  EXPECT_TRUE(says("an access to a vector at an address that is no multiple of its size", error));
}

TEST_P(EmulatedMachine, SaysWhenAnAccessDoesNotWaitForThePreviousKernel) {
  Vector16 words[1];
  const device::Error error = launch(GetParam(), 1, 64, [&] {
    if (device::thread_index() != 3) device::wait_for_previous_kernel();
    device::load(words);
  });
  EXPECT_TRUE(says("thread 3: an access to memory before wait_for_previous_kernel", error));
}

TEST_P(EmulatedMachine, RefusesLaunchesThatNoGpuRuns) {
  const auto nothing = [] {};
  EXPECT_STREQ("a launch of 0 blocks", launch(GetParam(), 0, 128, nothing));
  EXPECT_NE(nullptr, launch(GetParam(), (kPlenty >> 7) + 1, 128, nothing));
  EXPECT_NE(nullptr, launch(GetParam(), 1, 2048, nothing));
  EXPECT_NE(nullptr, launch(GetParam(), 1, GetParam().wave_width + 1, nothing));
}

class EmulatedCluster : public testing::TestWithParam<int> {
 protected:
  device::Error launch_clusters(const std::function<void()>& thread) {
    return launch({32, kPlenty, 8, static_cast<uint32_t>(GetParam())}, 3 * 4, 64, thread, 4);
  }
};

TEST_P(EmulatedCluster, BlocksStoreIntoEachOther) {
  EXPECT_EQ(nullptr, launch_clusters([] {
              const int thread = device::thread_index(), rank = device::cluster_rank();
              EXPECT_EQ(4, device::cluster_blocks());
              EXPECT_EQ(rank, device::block_index() % 4);
              EXPECT_TRUE(std::isnan(shared_value()[rank]));
              device::cluster_arrive();
              device::cluster_wait();
              if (thread < 4) device::store_in_block(&shared_value()[rank], thread, 10 * thread + rank);
              device::cluster_arrive();
              device::cluster_wait();
              for (int from = 0; from < 4; ++from) EXPECT_EQ(10 * rank + from, shared_value()[from]);
            }));
}

TEST_P(EmulatedCluster, SaysWhenBlocksDoNotWaitForEachOther) {
  const auto store = [] { device::store_in_block(shared_value(), (device::cluster_rank() + 1) % 4, 1); };
  EXPECT_TRUE(says("a store into a block of the cluster that has not started", launch_clusters(store)));
  EXPECT_TRUE(says("a store into a block of the cluster that may have ended", launch_clusters([&] {
                     device::cluster_arrive();
                     device::cluster_wait();
                     store();
                   })));
  EXPECT_TRUE(says("a wait for the cluster without having arrived", launch_clusters([] { device::cluster_wait(); })));
  EXPECT_TRUE(says("192 for the cluster, 0 for other lanes, and 64 have returned", launch_clusters([] {
                     if (device::cluster_rank() == 3) return;
                     device::cluster_arrive();
                     device::cluster_wait();
                   })));
  EXPECT_TRUE(says("a cluster of 16 blocks", launch({32, kPlenty, 8, 0}, 16, 64, store, 16)));
}

INSTANTIATE_TEST_SUITE_P(, EmulatedCluster, testing::Range(0, 4));

INSTANTIATE_TEST_SUITE_P(, EmulatedMachine,
                         testing::Values(EmulatedGpu{32, kPlenty, 8, 0}, EmulatedGpu{64, kPlenty, 1, 0},
                                         EmulatedGpu{32, kPlenty, 8, 1}, EmulatedGpu{64, kPlenty, 1, 2}),
                         [](const auto& info) {
                           return "wave" + std::to_string(info.param.wave_width) + (info.param.order ? "shuffled" : "");
                         });

// The device's conversions agree with those of formats.h, which computes with numbers and not with bits: for every
// number of the format, and around every boundary at which rounding changes.
TEST(EmulatedConversions, RoundToNearestEven) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    const bool half = dtype == DType::kFloat16;
    const auto pack = half ? &device::float16_bits : &device::bfloat16_bits;
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
      const double value = element(dtype, bits);
      const float widened = half ? device::float16_value(bits) : device::as_float(bits << 16);
      ASSERT_TRUE(std::isnan(value) ? std::isnan(widened) : value == widened) << bits;
      if (std::isnan(value)) {
        ASSERT_TRUE(std::isnan(element(dtype, pack(widened)))) << bits;
        continue;
      }
      ASSERT_EQ(bits, pack(widened));
      const float middle = static_cast<float>(value + ulp(dtype, value) / 2 * (value < 0 ? -1 : 1));
      for (const float f : {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, 2 * middle)})
        ASSERT_EQ(rounded_bits(dtype, f), pack(f)) << f;
    }
    EXPECT_TRUE(std::isnan(element(dtype, pack(device::as_float(0x7f800001u)))))
        << "a NaN whose payload is all in the lost bits";
  }
}

}  // namespace
}  // namespace gemma_norm
