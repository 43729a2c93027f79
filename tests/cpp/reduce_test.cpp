// A kernel may exchange several numbers, several times: no thread reads what another has already written for the next
// exchange.
#include "gpu/reduce.cuh"

#include <gtest/gtest.h>

#include <cmath>

#include "emulated_machine.h"

namespace gemma_norm {
namespace {

constexpr int kNumbers = 3, kExchanges = 5;
constexpr int64_t kPlenty = int64_t{1} << 32;

// The magnitudes are far apart, so that another order of additions rounds to another sum.
float value(int thread, int number, int exchange) {
  return std::ldexp(1.0f + thread, (thread * 7 + number * 5 + exchange) % 23);
}

float tree(int first, int count, int threads, int number, int exchange) {
  if (count == 1) return first < threads ? value(first, number, exchange) : 0;
  return tree(first, count / 2, threads, number, exchange) +
         tree(first + count / 2, count / 2, threads, number, exchange);
}

// Every thread of a row of `blocks` blocks exchanges, then checks what it got.
template <Scope kScope, int kThreads>
void expect_sums(const EmulatedGpu& gpu, int blocks, int block_threads) {
  const int threads = blocks * block_threads;
  float want[kExchanges][kNumbers];
  for (int e = 0; e < kExchanges; ++e)
    for (int n = 0; n < kNumbers; ++n) want[e][n] = tree(0, 2048, threads, n, e);
  gpu::Launch launch{};
  launch.block_threads = block_threads;
  const auto kernel = [&] {
    gpu::open_exchanges<kScope, kNumbers, 2>();
    const int thread = static_cast<int>(device::block_index() % blocks) * block_threads + device::thread_index();
    for (int e = 0; e < kExchanges; ++e) {
      float numbers[kNumbers];
      for (int n = 0; n < kNumbers; ++n) numbers[n] = value(thread, n, e);
      gpu::sum_over_row<kScope, kThreads, 2>(numbers, launch, e);
      for (int n = 0; n < kNumbers; ++n) EXPECT_EQ(want[e][n], numbers[n]) << "exchange " << e << ", number " << n;
    }
  };
  device::set_machine(gpu);
  EXPECT_STREQ(nullptr, device::run_grid(nullptr, 2 * blocks, block_threads, blocks, kernel));
}

class Exchanges : public testing::TestWithParam<uint32_t> {};

TEST_P(Exchanges, OfABlockDoNotMeet) {
  for (const int wave : {32, 64}) {
    expect_sums<Scope::kBlock, 128>({wave, kPlenty, 1, GetParam()}, 1, 128);
    expect_sums<Scope::kBlock, 512>({wave, kPlenty, 1, GetParam()}, 1, 512);
    expect_sums<Scope::kBlock, 1024>({wave, kPlenty, 1, GetParam()}, 1, 1024);
  }
}

TEST_P(Exchanges, OfAClusterDoNotMeet) {
  expect_sums<Scope::kCluster, 256>({32, kPlenty, 8, GetParam()}, 8, 32);
  expect_sums<Scope::kCluster, 256>({32, kPlenty, 8, GetParam()}, 3, 128);
}

INSTANTIATE_TEST_SUITE_P(, Exchanges, testing::Range(0u, 6u));  // orders of blocks, waves and lanes

}  // namespace
}  // namespace gemma_norm
