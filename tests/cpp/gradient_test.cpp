// Every kernel of the backward operators, through the C interface, on every device that this machine has.
#include <gtest/gtest.h>

#include <set>

#include "each_case.h"
#include "emulated_machine.h"
#include "gradient_cases.h"
#include "runner.h"

namespace gemma_norm {
namespace {

class Gradients : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    if (const std::string why = target().missing(); !why.empty()) GTEST_SKIP() << target().name() << ": " << why;
  }
  Target& target() { return find_target(GetParam()); }
  // One in three, since they take long, and AreRightForManyRows has each kernel already.
  void check_some_of_two_rows(bool gated) {
    std::vector<Case> some;
    const std::vector<Case> all = two_rows_gradient_cases(gated);
    for (size_t i = 0; i < all.size(); i += 3) some.push_back(all[i]);
    for_each_case(some, [&](const Case& c) { return check_gradients(target(), c); });
  }
  // Emulated GPUs have the same bits at both wave widths.
  Target* alike() { return target().name() == "emulated64" ? &find_target("emulated32") : nullptr; }
};

TEST_P(Gradients, AreRightForFewRows) {
  for_each_case(few_rows_gradient_cases(false), [&](const Case& c) { return check_gradients(target(), c, alike()); });
}

TEST_P(Gradients, AreRightForManyRows) {
  for_each_case(many_rows_gradient_cases(false), [&](const Case& c) { return check_gradients(target(), c, alike()); });
}

TEST_P(Gradients, AreRightForTwoRowsOfABlock) { check_some_of_two_rows(false); }

class GatedGradients : public Gradients {};

TEST_P(GatedGradients, AreRightForFewRows) {
  for_each_case(few_rows_gradient_cases(true), [&](const Case& c) { return check_gradients(target(), c, alike()); });
}

TEST_P(GatedGradients, AreRightForFewRowsOfManyGroups) {
  for_each_case(grouped_gradient_cases(), [&](const Case& c) { return check_gradients(target(), c); });
}

TEST_P(GatedGradients, AreRightForManyRows) {
  for_each_case(many_rows_gradient_cases(true), [&](const Case& c) { return check_gradients(target(), c, alike()); });
}

TEST_P(GatedGradients, AreRightForTwoRowsOfABlock) { check_some_of_two_rows(true); }

INSTANTIATE_TEST_SUITE_P(, GatedGradients, testing::Values("emulated32", "emulated64", "cpu", "cuda"),
                         [](const auto& info) { return info.param; });

// The sum over no rows is zero.
TEST_P(Gradients, OfNoRowsAreZeros) {
  constexpr int64_t kHidden = 131;
  const int64_t sizes[] = {3, 0, kHidden}, strides[] = {kHidden, kHidden, 1};
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    const size_t bytes = kHidden * size_of(dtype);
    std::vector<uint8_t> image(bytes, 0xff);
    void *const memory = target().allocate(bytes, Guard::kAfter), *const weights =
                                                                      target().allocate(bytes, Guard::kAfter);
    target().write(memory, image.data(), bytes);
    const Tensor rows{nullptr, sizes, strides, 3, dtype, dtype_name(dtype)},
        columns{memory, sizes + 2, strides + 2, 1, dtype, dtype_name(dtype)},
        weight{weights, sizes + 2, strides + 2, 1, dtype, dtype_name(dtype)};
    Call call = make_call(
        &RmsNormBackward::kInfos[0],
        {{kX, &rows}, {kWeight, &weight}, {kDOut, &rows}, {kDSum, &rows}, {kDX, &rows}, {kDWeight, &columns}});
    call.context = &target();
    call.scratch = [](void* context, int64_t size) {
      return static_cast<Target*>(context)->allocate(size, Guard::kBefore);
    };
    Message message{};
    EXPECT_EQ(Status::kOk, target().run(call, {}, &message)) << message.text;
    target().read(image.data(), memory, bytes);
    EXPECT_EQ(std::vector<uint8_t>(bytes), image) << dtype_name(dtype);

    call = make_call(&RmsNormBackward::kInfos[1], {{kX, &rows}, {kDOut, &rows}, {kDX, &rows}});
    EXPECT_EQ(Status::kOk, target().run(call, {}, &message)) << message.text;
    target().free_all();
  }
}

TEST_P(Gradients, AreNotWrittenWhenACallIsRefused) {
  Case c = simple_gradient_case(DType::kBFloat16, DType::kBFloat16, 3, 64);
  c.eps = -1;
  c.dx_place = kDOut;
  const Tensors inputs = make_inputs(c);
  std::string error;
  const Tensors outputs = run_case(target(), c, inputs, &error);
  EXPECT_EQ("rms_norm_backward: eps must be finite in float32 and at least 0, got -1", error);
  EXPECT_EQ(inputs[kDOut], outputs[kDX]);
  EXPECT_EQ(Packed(64 * 2, 0xff), outputs[kDWeight]);
}

INSTANTIATE_TEST_SUITE_P(, Gradients, testing::Values("emulated32", "emulated64", "cpu", "cuda"),
                         [](const auto& info) { return info.param; });

// All these targets have the same bits in every case.
void expect_same_bits(const std::vector<Case>& cases, const std::vector<Target*>& same) {
  for_each_case(cases, [&](const Case& c) {
    std::string error;
    const Tensors inputs = make_inputs(c);
    const Tensors want = run_case(*same[0], c, inputs, &error);
    for (size_t i = 1; i < same.size() && error.empty(); ++i) {
      error = compare_outputs(c, want, run_case(*same[i], c, inputs, &error));
      if (!error.empty()) error = same[i]->name() + " is not as " + same[0]->name() + ": " + error;
    }
    return error;
  });
}

std::vector<Target*> cpu_targets() {
  std::vector<Target*> all;
  for (const auto& t : targets())
    if (t->name().rfind("cpu", 0) == 0 && t->missing().empty()) all.push_back(t.get());
  return all;
}

TEST(CpuGradients, HaveTheSameBitsWithEveryInstructionSet) {
  const std::vector<Target*> all = cpu_targets();
  ASSERT_LE(2u, all.size());
  for (const bool gated : {false, true}) {
    expect_same_bits(few_rows_gradient_cases(gated), all);
    expect_same_bits(many_rows_gradient_cases(gated), all);
  }
}

// See CpuKernels.HaveTheBitsOfEveryOtherProcessor in cpu_test.cpp. Whoever changes the number of chunks changes these.
TEST(CpuGradients, HaveTheBitsOfEveryOtherProcessor) {
  constexpr uint64_t kWant[] = {0x95bb250d4187099e, 0x7dd97ab6e4bfe678, 0x1c25c412fde34ab6, 0xd97aaa9727a78f99,
                                0x6acb0a172f380dff};
  Target& cpu = find_target("cpu");
  for (size_t d = 0; d < std::size(kGradientDTypes); ++d) {
    uint64_t hash = kHashOfNothing;
    for (const auto& [rows, hidden] : std::initializer_list<std::pair<int64_t, int64_t>>{
             {1, 1}, {3, 31}, {7, 64}, {40, 100}, {300, 576}, {100, 4097}, {2, 20000}})
      for (const Values values : {Values::kNormal, Values::kSubnormal, Values::kHuge, Values::kSpecialWeight}) {
        Case c = simple_gradient_case(kGradientDTypes[d][0], kGradientDTypes[d][1], rows, hidden);
        c.values = values;
        c.seed = 3;
        c.gemma = c.dsum = hidden % 2;
        std::string error;
        const Tensors outputs = run_case(cpu, c, make_inputs(c), &error);
        ASSERT_EQ("", error);
        add_to_hash(c.dtype, outputs[kDX], &hash);
        add_to_hash(c.weight_dtype, outputs[kDWeight], &hash);
      }
    EXPECT_EQ(kWant[d], hash) << "0x" << std::hex << hash << ": x " << dtype_name(kGradientDTypes[d][0]) << ", dout "
                              << dtype_name(kGradientDTypes[d][1]);
  }
}

// Both compute as IEEE 754 says, and neither the number of chunks nor the order of a sum depends on the GPU.
TEST(CudaGradients, HaveTheBitsOfTheEmulatedOnes) {
  Target& cuda = find_target("cuda");
  if (const std::string why = cuda.missing(); !why.empty()) GTEST_SKIP() << why;
  for (const bool gated : {false, true})
    expect_same_bits(few_rows_gradient_cases(gated), {&find_target("emulated32"), &cuda});
}

// Which kernels a case launches depends on its memory and options alone. So they need not run here.
TEST(EmulatedGradients, ReachEveryKernel) {
  device::run_kernels(false);
  const auto launch = [&](const Case& c) {
    std::string error;
    run_case(find_target("emulated32"), c, {}, &error);
    return error;
  };
  for_each_case(gradient_cases(), launch, 1);
  device::run_kernels(true);
  const std::set<const void*> all = backward_kernels(), &launched = device::launched_kernels();
  EXPECT_LE((5u + 3) * (9 + 3) + 1, all.size()) << "of each pair of dtypes; three kernels are also for unaligned rows";
  EXPECT_EQ(all.size(), launched.size());
  EXPECT_EQ(all, launched);
}

}  // namespace
}  // namespace gemma_norm
