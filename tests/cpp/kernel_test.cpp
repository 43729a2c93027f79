// Every kernel, through the C interface, on every device that this machine has.
#include <gtest/gtest.h>

#include <set>

#include "each_case.h"
#include "emulated_machine.h"
#include "gpu/plan.h"
#include "runner.h"

namespace gemma_norm {
namespace {

template <class Check>
void for_all_cases(const Check& check) {
  for_each_case(all_cases(), check);
}

LaunchPlan plan_of(const Case& c, const DeviceFacts& device) {
  return make_plan(c.normed(), c.row_dtype(), device, c.held());
}

// Whether one block holds the row in registers, on a GPU without clusters. Only then have clusters the same bits.
bool is_held_by_a_block(const Case& c) {
  return plan_of(c, {32, int64_t{1} << 42, true, 1}).scope != Scope::kTwoPasses;
}

// Whether, on a GPU with clusters, few rows are spread over a cluster or over two threads a slot.
bool may_be_spread(const Case& c) {
  const DeviceFacts device{32, int64_t{1} << 42, true, kMaxCluster, 132};
  int64_t most_bytes = 0;
  for (const OperandRule& rule : c.op()) most_bytes += c.normed() * size_of(c.dtype_of(rule.operand));
  const int64_t rows = c.row_count() * (c.hidden / c.normed());
  const LaunchPlan plan = spread(plan_of(c, device), rows, most_bytes, device);
  return plan.scope == Scope::kCluster || plan.slot_threads > 1;
}

// All these targets have the same bits in every case.
void expect_same_bits(const std::vector<Target*>& same) {
  for_all_cases([&](const Case& c) {
    std::string error;
    const Tensors inputs = make_inputs(c);
    const Tensors want = run_case(*same[0], c, inputs, &error);
    for (size_t i = 1; i < same.size(); ++i) {
      const Tensors got = run_case(*same[i], c, inputs, &error);
      if (error.empty()) error = compare_outputs(c, want, got);
      if (!error.empty()) return same[i]->name() + " is not as " + same[0]->name() + ": " + error;
    }
    return error;
  });
}

class Kernels : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    if (const std::string why = target().missing(); !why.empty()) GTEST_SKIP() << target().name() << ": " << why;
  }
  Target& target() { return find_target(GetParam()); }
};

// On emulated GPUs, they also have the same bits at both wave widths, and spread over several blocks as in one. Both
// claims are checked here, since a pass over the cases takes most of a minute.
TEST_P(Kernels, AreRightInEveryCase) {
  Target& narrow = find_target("emulated32");
  const bool wide = target().name() == "emulated64", clusters = target().name() == "emulated_clusters";
  for_all_cases([&](const Case& c) -> std::string {
    if (clusters && !may_be_spread(c)) return "";  // as on emulated32
    return check_case(target(), c, wide || (clusters && is_held_by_a_block(c)) ? &narrow : nullptr);
  });
}

TEST_P(Kernels, DoNothingWithNoRows) {
  const int64_t x_sizes[] = {3, 0, 8}, x_strides[] = {8, 8, 1}, hidden[] = {8}, one[] = {1};
  const Tensor x{nullptr, x_sizes, x_strides, 3, DType::kFloat16, "float16"},
      weight{nullptr, hidden, one, 1, DType::kFloat16, "float16"};
  Message message{};
  for (const Call& call : {
           make_call(RmsNorm::kInfos, {{kX, &x}, {kWeight, &weight}, {kOut, &x}}),
           make_call(AddRmsNorm::kInfos,
                     {{kX, &x}, {kWeight, &weight}, {kResidual, &x}, {kPost, &x}, {kOut, &x}, {kResidualOut, &x}}),
           make_call(GatedRmsNorm::kInfos, {{kX, &x}, {kWeight, &weight}, {kGate, &x}, {kOut, &x}}),
           make_call(
               RmsNormAddRmsNorm::kInfos,
               {{kX, &x}, {kWeight, &weight}, {kResidual, &x}, {kPostWeight, &weight}, {kOut, &x}, {kResidualOut, &x}}),
       })
    EXPECT_EQ(Status::kOk, target().run(call, {}, &message)) << call.op->name << ": " << message.text;
}

TEST_P(Kernels, WriteNothingWhenTheyRefuse) {
  Case c = simple_case(DType::kBFloat16, DType::kBFloat16, Operands::kFusedPost, 3, 64);
  c.eps = -1;
  const Tensors inputs = make_inputs(c);
  std::string error;
  const Tensors outputs = run_case(target(), c, inputs, &error);
  EXPECT_EQ("add_rms_norm: eps must be finite in float32 and at least 0, got -1", error);
  EXPECT_EQ(inputs[kX], outputs[kOut]);
  EXPECT_EQ(inputs[kResidual], outputs[kResidualOut]);
}

TEST_P(Kernels, RefuseAnOperatorOutsideTheTable) {
  const OpInfo op("odd_norm", "odd_norm.out", "", "", RmsNorm::kRules);
  Message message{};
  EXPECT_EQ(Status::kInvalidArgument, target().run(make_call(&op, {}), {}, &message));
  EXPECT_STREQ("there is no operator odd_norm.out", message.text);
}

INSTANTIATE_TEST_SUITE_P(, Kernels, testing::Values("emulated32", "emulated64", "emulated_clusters", "cpu", "cuda"),
                         [](const auto& info) { return info.param; });

// Which kernels a case launches depends on its memory and options alone. So they need not run here.
TEST(EmulatedKernels, AreAllReachedByTheCases) {
  device::run_kernels(false);
  Target &plain = find_target("emulated32"), &clusters = find_target("emulated_clusters");
  const auto launch = [&](const Case& c) {
    std::string error;
    const Tensors nothing;
    run_case(plain, c, nothing, &error);
    if (may_be_spread(c)) run_case(clusters, c, nothing, &error);
    return error;
  };
  for_each_case(all_cases(), launch, 1);
  device::run_kernels(true);
  const std::set<const void*> reachable = reachable_kernels(600000), &launched = device::launched_kernels();
  EXPECT_LE((12u + 20 + 18 + 9) * 2 * 4, reachable.size())
      << "at least four scopes, for aligned rows and for others, of each operator's 12, 20, 18 and 9 variants";
  EXPECT_EQ(0u, reachable.count(nullptr)) << "a plan without a kernel";
  EXPECT_EQ(reachable.size(), launched.size());
  EXPECT_EQ(reachable, launched);
}

TEST(EmulatedKernels, ReportALaunchThatFails) {
  const int64_t sizes[] = {8}, strides[] = {1};
  float memory[8] = {};
  const Tensor x{memory, sizes, strides, 1, DType::kFloat32, "float32"}, weight = x;
  float result[8] = {};
  const Tensor out{result, sizes, strides, 1, DType::kFloat32, "float32"};
  const EmulatedGpu gpu{1024, int64_t{1} << 32, 1, 0};  // Its waves are wider than any block of a plan.
  Message message{};
  const Call call = make_call(RmsNorm::kInfos, {{kX, &x}, {kWeight, &weight}, {kOut, &out}});
  EXPECT_EQ(Status::kDeviceError, gemma_norm_emulated(&call, &gpu, &message));
  EXPECT_EQ(0u, std::string(message.text).find("rms_norm: launch failed: a block of ")) << message.text;
}

TEST(CpuKernels, HaveTheSameBitsWithEveryInstructionSet) {
  std::vector<Target*> all;
  for (const auto& t : targets())
    if (t->name().rfind("cpu", 0) == 0 && t->missing().empty()) all.push_back(t.get());
  ASSERT_LE(2u, all.size());
  expect_same_bits(all);
}

// 2112 rows of 4128 elements of 2 bytes are so much output that the CPU writes around its caches.
constexpr int64_t kRowsOfOneCall = 64, kTimesOfManyRows = 33, kHiddenOfManyRows = 4128;

TEST(CpuKernels, TreatManyRowsLikeFew) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
    for (const Operands operands : {Operands::kPlain, Operands::kAddPost, Operands::kNormAdd}) {
      Case c = simple_case(dtype, dtype, operands, kRowsOfOneCall, kHiddenOfManyRows);
      c.gemma = true;
      EXPECT_EQ("", check_repeated(find_target("cpu"), c, kTimesOfManyRows)) << describe(c);

      // On either side of the lengths at which a thread with many rows changes what it sets up first.
      for (const int64_t hidden : {3276, 3277, 16383, 16384}) {
        c = simple_case(dtype, dtype, operands, 1, hidden);
        c.gemma = true;
        EXPECT_EQ("", check_repeated(find_target("cpu"), c, 6)) << describe(c);
      }
    }
}

TEST(CpuKernels, TreatManyRowsLikeFewInEveryMode) {
  for (Case c : all_variants()) {
    if (c.dtype != DType::kBFloat16 || !(c.round_each_step || c.float32_residual || is_gated(c.operands))) continue;
    c.rows = {"rows", {kRowsOfOneCall}, {0}, 0};
    c.hidden = kHiddenOfManyRows;
    c.gate = is_gated(c.operands);
    c.eps = 1e-6;
    c.seed = 4;
    EXPECT_EQ("", check_repeated(find_target("cpu"), c, kTimesOfManyRows)) << describe(c);

    c.rows.sizes = {1};
    for (const int64_t hidden :
         {3277, 16384, 16385}) {  // A thread with many rows sets something up for up to 16384 elements.
      c.hidden = hidden;
      EXPECT_EQ("", check_repeated(find_target("cpu"), c, 6)) << describe(c);
    }
    if (!c.gate) continue;
    c.rows.sizes = {2};
    for (const int64_t groups :
         {3, 40}) {  // The weights of all groups are set up first; those of 40 groups are too many.
      c.group_size = 512;
      c.hidden = groups * c.group_size;
      EXPECT_EQ("", check_repeated(find_target("cpu"), c, 6)) << describe(c);
    }
    c.group_size = kWholeRow;
  }
}

// docs/contract.md, "The order in which squares are added": a float32 row of each shape, whose last bits tell in which
// order its squares were added. These hashes change only with that order or with a rounding, that is, with the bits
// that users get. Whoever changes them says so in the CHANGELOG.
TEST(GpuKernels, AddInTheOrderOfTheContract) {
  constexpr std::pair<int64_t, uint64_t> kWant[] = {{200, 0x6009453df7485202},   {500, 0xf06cad80ad667f2d},
                                                    {2000, 0x582abdd31999e1ea},  {4000, 0xaa733441b264fb03},
                                                    {32000, 0x2e4a6e2e90b08a53}, {140000, 0xbd324100be10d4e8}};
  for (const auto& [hidden, want] : kWant) {
    Case c = simple_case(DType::kFloat32, DType::kFloat32, Operands::kPlain, 3, hidden);
    c.seed = 2;
    c.variation.order = 1;
    const Tensors inputs = make_inputs(c);
    for (const char* const name : {"emulated32", "emulated64", "cuda"}) {
      Target& target = find_target(name);
      if (!target.missing().empty()) continue;
      if (hidden > 32768 && name == std::string("cuda")) continue;  // There, a GPU with clusters has another order.
      std::string error;
      const Tensors outputs = run_case(target, c, inputs, &error);
      ASSERT_EQ("", error);
      uint64_t hash = kHashOfNothing;
      add_to_hash(DType::kFloat32, outputs[kOut], &hash);
      EXPECT_EQ(want, hash) << "0x" << std::hex << hash << std::dec << ": " << name << ", hidden " << hidden;
    }
  }
}

// Few rows are spread over clusters, many rows are not.
class Spreading : public Kernels {};

TEST_P(Spreading, TreatsManyRowsLikeFew) {
  for (const auto& [dtype, weight_dtype] : kDTypePairs)
    for (const Operands operands :
         {Operands::kPlain, Operands::kAdd, Operands::kFusedPost, Operands::kNormAdd, Operands::kFusedNormAdd})
      for (const int64_t hidden : {2560, 4096, 5120, 8192, 12288, 16384, 32768}) {
        Case c = simple_case(dtype, weight_dtype, operands, 2, hidden);
        c.gemma = true;
        c.variation.processors = true;
        EXPECT_EQ("", check_repeated(target(), c, 70)) << describe(c);
      }
}

INSTANTIATE_TEST_SUITE_P(, Spreading, testing::Values("emulated_clusters", "cuda"),
                         [](const auto& info) { return info.param; });

// Both compute as IEEE 754 says. (A GPU without clusters would have to be compared with emulated32.)
TEST(CudaKernels, HaveTheBitsOfTheEmulatedOnes) {
  Target& cuda = find_target("cuda");
  if (const std::string why = cuda.missing(); !why.empty()) GTEST_SKIP() << why;
  expect_same_bits({&find_target("emulated_clusters"), &cuda});
}

class FarApart : public testing::TestWithParam<const char*> {};

// The offsets of the rows exceed 32 bits, in elements and in bytes. The pages between the rows are never touched, hence
// take no memory.
TEST_P(FarApart, RowsAreReached) {
  constexpr int64_t kHidden = 1000, kStride = (int64_t{1} << 31) + 8, kRows = 3;
  Case c = simple_case(DType::kBFloat16, DType::kBFloat16, Operands::kPlain, kRows, kHidden);
  c.gemma = true;
  const Tensors inputs = make_inputs(c);
  Target& target = find_target(GetParam());
  std::string error;
  const Tensors want = run_case(target, c, inputs, &error);
  ASSERT_EQ("", error);

  const size_t row_bytes = kHidden * 2, bytes = (kRows - 1) * kStride * 2 + row_bytes;
  char* const x = static_cast<char*>(target.allocate(bytes, Guard::kBefore));
  char* const weight = static_cast<char*>(target.allocate(row_bytes, Guard::kBefore));
  for (int64_t row = 0; row < kRows; ++row)
    target.write(x + row * kStride * 2, &inputs[kX][row * row_bytes], row_bytes);
  target.write(weight, inputs[kWeight].data(), row_bytes);
  const int64_t sizes[] = {kRows, kHidden}, strides[] = {kStride, 1};
  const Tensor tensor{x, sizes, strides, 2, c.dtype, "bfloat16"};
  Message message{};
  const Tensor weight_tensor{weight, sizes + 1, strides + 1, 1, c.dtype, "bfloat16"};
  const Call call =
      make_call(RmsNorm::kInfos, {{kX, &tensor}, {kWeight, &weight_tensor}, {kOut, &tensor}}, c.options());
  ASSERT_EQ(Status::kOk, target.run(call, {}, &message)) << message.text;
  Packed got(want[kOut].size());
  for (int64_t row = 0; row < kRows; ++row) target.read(&got[row * row_bytes], x + row * kStride * 2, row_bytes);
  target.free_all();
  EXPECT_EQ("", compare_bits(c.dtype, kHidden, want[kOut], got));
}

INSTANTIATE_TEST_SUITE_P(, FarApart, testing::Values("emulated32", "cpu"), [](const auto& info) { return info.param; });

}  // namespace
}  // namespace gemma_norm
