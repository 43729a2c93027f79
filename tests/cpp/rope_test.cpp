// qk_norm_rope through the C interface, on every device that this machine has.
#include <gtest/gtest.h>

#include <functional>
#include <set>

#include "emulated_machine.h"
#include "rope_cases.h"

namespace gemma_norm {

std::set<const void*> rope_kernels();  // emulated_qk_norm_rope.cpp

namespace {

void for_each(const std::function<std::string(const RopeCase&)>& check) {
  int failures = 0, number = 0;
  for (const RopeCase& c : rope_cases()) {
    if (number++ % GEMMA_NORM_CASE_STEP != 0) continue;
    const std::string error = check(c);
    if (error.empty()) continue;
    ADD_FAILURE() << describe(c) << "\n  " << error;
    ASSERT_LT(++failures, 5) << "and so on";
  }
}

class Rope : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    if (const std::string why = target().missing(); !why.empty()) GTEST_SKIP() << target().name() << ": " << why;
  }
  Target& target() { return find_target(GetParam()); }
};

TEST_P(Rope, IsRight) {
  for_each([&](const RopeCase& c) { return check_rope(target(), c); });
}

INSTANTIATE_TEST_SUITE_P(, Rope, testing::Values("emulated32", "cpu", "cuda"),
                         [](const auto& info) { return info.param; });

TEST(EmulatedRope, HasTheSameBitsAtBothWaveWidths) {
  for_each([](const RopeCase& c) { return compare_ropes(find_target("emulated32"), find_target("emulated64"), c); });
}

TEST(CudaRope, HasTheBitsOfTheEmulatedOne) {
  Target& cuda = find_target("cuda");
  if (const std::string why = cuda.missing(); !why.empty()) GTEST_SKIP() << why;
  for_each([&](const RopeCase& c) { return compare_ropes(find_target("emulated32"), cuda, c); });
}

TEST(CpuRope, HasTheSameBitsWithEveryInstructionSet) {
  int compared = 0;
  for (const auto& t : targets())
    if (t->name().rfind("cpu_", 0) == 0 && t->missing().empty()) {
      ++compared;
      for_each([&](const RopeCase& c) { return compare_ropes(find_target("cpu"), *t, c); });
    }
  EXPECT_LE(1, compared);
}

TEST(EmulatedRope, ReachesEveryKernel) {
  device::run_kernels(false);
  for (const RopeCase& c : rope_cases()) ASSERT_EQ("", run_rope(find_target("emulated32"), c)) << describe(c);
  device::run_kernels(true);
  const std::set<const void*> all = rope_kernels(), &launched = device::launched_kernels();
  // Three dtypes of weights at two numbers of vectors, for float32; two of weights and two of angles for each other.
  // All of these for each place where the other element of a pair may be.
  EXPECT_EQ((3u * 2 + 2 * 2 * 2) * 4, all.size());
  for (const void* kernel : all) EXPECT_EQ(1u, launched.count(kernel));
}

}  // namespace
}  // namespace gemma_norm
