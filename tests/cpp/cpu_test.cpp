// The CPU kernels of every instruction set: their conversions, number by number, and the bits that all of them have in
// common.
#include <gtest/gtest.h>

#include <cfloat>
#include <cmath>
#include <cstring>
#include <random>

#include "formats.h"
#include "runner.h"

namespace gemma_norm {
namespace {

constexpr DType kHalves[] = {DType::kFloat16, DType::kBFloat16};

std::vector<Target*> cpu_targets() {
  std::vector<Target*> all;
  for (const auto& t : targets())
    if (t->name().rfind("cpu_", 0) == 0 && t->missing().empty()) all.push_back(t.get());
  return all;
}

Packed packed(DType dtype, const std::vector<double>& values) {
  Packed elements(values.size() * size_of(dtype));
  for (size_t i = 0; i < values.size(); ++i) round_to(dtype, values[i], &elements[i * size_of(dtype)]);
  return elements;
}

// A row without eps.
Case one_row(DType dtype, DType weight_dtype, Operands operands, size_t hidden) {
  Case c = simple_case(dtype, weight_dtype, operands, 1, static_cast<int64_t>(hidden));
  c.eps = 0;
  return c;
}

// The norm of a row of ones is the weight, since the root mean square of ones is 1. In float32 that is exact if their
// number is a power of two.
Tensors norm_of_ones(Target& target, DType dtype, DType weight_dtype, const Packed& weight) {
  const size_t hidden = weight.size() / size_of(weight_dtype);
  std::string error;
  const Tensors inputs{{packed(dtype, std::vector<double>(hidden, 1)), weight}};
  Tensors outputs = run_case(target, one_row(dtype, weight_dtype, Operands::kPlain, hidden), inputs, &error);
  EXPECT_EQ("", error);
  return outputs;
}

// All numbers of a 16-bit format, infinities and NaNs included.
Packed every_number() {
  Packed elements(2 << 16);
  for (uint32_t bits = 0; bits < 1 << 16; ++bits) std::memcpy(&elements[2 * bits], &bits, 2);
  return elements;
}

TEST(CpuKernels, ReadEveryNumber) {
  const Packed all = every_number();
  for (Target* const target : cpu_targets())
    for (const DType dtype : kHalves) {
      SCOPED_TRACE(target->name() + " " + dtype_name(dtype));
      EXPECT_EQ("", compare_bits(dtype, 1 << 16, all, norm_of_ones(*target, dtype, dtype, all)[kOut]))
          << "of the weight";

      std::string error;
      const Tensors inputs{{all, all, packed(dtype, std::vector<double>(1 << 16, -0.0))}};
      const Tensors outputs = run_case(*target, one_row(dtype, dtype, Operands::kAdd, 1 << 16), inputs, &error);
      EXPECT_EQ("", error);
      EXPECT_EQ("", compare_bits(dtype, 1 << 16, all, outputs[kResidualOut])) << "of the sum with zero";
    }
}

// Every number of the format, every tie between two of them, and the float32 on either side of each tie.
TEST(CpuKernels, RoundToNearestEven) {
  for (const DType dtype : kHalves) {
    std::vector<float> values = {FLT_MAX, FLT_MIN, FLT_TRUE_MIN, INFINITY};
    for (uint32_t bits = 0; std::isfinite(element(dtype, bits)); ++bits) {
      const double number = element(dtype, bits),
                   tie = number + ulp(dtype, number) / 2;  // of the last number, with infinity
      for (const float f : {static_cast<float>(number), std::nextafter(static_cast<float>(tie), 0.0f),
                            static_cast<float>(tie), std::nextafter(static_cast<float>(tie), INFINITY)})
        values.push_back(f);
    }
    std::vector<uint32_t> weight(size_t{1} << 18);  // the rest is zeros
    ASSERT_LE(2 * values.size() + 4, weight.size());
    size_t count = 0;
    for (const float f : values) {
      std::memcpy(&weight[count++], &f, sizeof f);
      weight[count] = weight[count - 1] ^ 0x80000000;
      ++count;
    }
    for (const uint32_t nan : {0x7f800001u, 0x7fffffffu, 0xff800001u, 0xffffffffu}) weight[count++] = nan;

    Packed elements(weight.size() * sizeof(float)), want(weight.size() * size_of(dtype));
    std::memcpy(elements.data(), weight.data(), elements.size());
    for (size_t i = 0; i < weight.size(); ++i)
      round_to(dtype, element(DType::kFloat32, weight[i]), &want[i * size_of(dtype)]);
    for (Target* const target : cpu_targets()) {
      SCOPED_TRACE(target->name() + " " + dtype_name(dtype));
      const Tensors outputs = norm_of_ones(*target, dtype, DType::kFloat32, elements);
      EXPECT_EQ("", compare_bits(dtype, weight.size(), want, outputs[kOut]));
    }
  }
}

// Squares below the least normal float32. The AVX-512 instruction that multiplies pairs of bfloat16 would take them for
// zero.
TEST(CpuKernels, AddUpSubnormalSquares) {
  constexpr DType kDType = DType::kBFloat16;
  constexpr size_t kHidden = 512;
  std::vector<double> values(kHidden);
  double squares = 0;
  for (size_t i = 0; i < kHidden; ++i) {
    values[i] = std::ldexp(1 + static_cast<double>(i * 37 % 128) / 128, -65 - static_cast<int>(i / 64));
    squares += values[i] * values[i];
  }
  const double rstd = 1 / std::sqrt(squares / kHidden);

  const Case c = one_row(kDType, kDType, Operands::kPlain, kHidden);
  const Tensors inputs{{packed(kDType, values), packed(kDType, std::vector<double>(kHidden, 1))}};
  for (Target* const target : cpu_targets()) {
    SCOPED_TRACE(target->name());
    std::string error;
    const Tensors outputs = run_case(*target, c, inputs, &error);
    ASSERT_EQ("", error);
    for (size_t i = 0; i < kHidden; ++i) {
      const double want = values[i] * rstd;
      ASSERT_NEAR(want, element_at(kDType, &outputs[kOut][i * size_of(kDType)]), ulp(kDType, want)) << i;
    }
  }
}

// Rounding to 16 bits hides the last bits of a sum. Here each result is near a tie of two numbers, on a side that the
// last bits of the sum decide.
TEST(CpuKernels, SumInTheSameOrder) {
  constexpr size_t kHidden = 5000;
  for (const DType dtype : kHalves)
    for (uint32_t seed = 1; seed <= 20; ++seed) {
      std::minstd_rand random(seed);
      std::vector<double> values(kHidden), weight(kHidden);
      double squares = 0;
      for (double& v : values) {
        v = rounded(dtype, std::ldexp(1 + random() % 1024 / 1024.0, -static_cast<int>(random() % 8)));
        squares += v * v;
      }
      const double tie = 1 + ulp(dtype, 1) / 2, rstd = 1 / std::sqrt(squares / kHidden);
      for (size_t i = 0; i < kHidden; ++i)
        weight[i] = tie / (values[i] * rstd) * (1 + (static_cast<double>(i) / kHidden - 0.5) * 64 * FLT_EPSILON);

      const Case c = one_row(dtype, DType::kFloat32, Operands::kPlain, kHidden);
      const Tensors inputs{{packed(dtype, values), packed(DType::kFloat32, weight)}};
      Packed first;
      for (Target* const target : cpu_targets()) {
        SCOPED_TRACE(target->name() + " " + dtype_name(dtype));
        std::string error;
        const Tensors outputs = run_case(*target, c, inputs, &error);
        ASSERT_EQ("", error);
        if (first.empty()) first = outputs[kOut];
        EXPECT_EQ("", compare_bits(dtype, kHidden, first, outputs[kOut]));
      }
    }
}

// No machine has the instructions of both x86-64 and AArch64, so that they are compared by way of these hashes. The
// hashes change only with the order of a sum or with a rounding, that is, with the bits that users get. Whoever changes
// them says so in the CHANGELOG.
TEST(CpuKernels, HaveTheBitsOfEveryOtherProcessor) {
  constexpr uint64_t kWant[] = {0x84b1dc53eca18504, 0x73e6cdfcc98e2dc9, 0xa4e7e2e83d9ade58, 0x84dc70f549d0acd1,
                                0x4744457582bd1cff};
  const std::vector<Target*> all = cpu_targets();
  for (size_t i = 0; i < std::size(kDTypePairs); ++i) {
    const auto& [dtype, weight_dtype] = kDTypePairs[i];
    std::vector<uint64_t> hashes(all.size(), kHashOfNothing);
    for (const int64_t hidden : {1, 31, 64, 100, 576, 4097, 20000})
      for (const Operands operands : {Operands::kPlain, Operands::kAdd, Operands::kAddPost})
        for (const Values values : {Values::kNormal, Values::kSubnormal, Values::kSpecialWeight}) {
          Case c = simple_case(dtype, weight_dtype, operands, 4, hidden);
          c.gemma = true;
          c.values = values;
          c.seed = 3;
          const Tensors inputs = make_inputs(c);
          for (size_t t = 0; t < all.size(); ++t) {
            std::string error;
            const Tensors outputs = run_case(*all[t], c, inputs, &error);
            ASSERT_EQ("", error);
            add_to_hash(dtype, outputs[kResidualOut], &hashes[t]);
            add_to_hash(dtype, outputs[kOut], &hashes[t]);
          }
        }
    for (size_t t = 0; t < all.size(); ++t)
      EXPECT_EQ(kWant[i], hashes[t]) << "0x" << std::hex << hashes[t] << ": " << all[t]->name() << ", "
                                     << dtype_name(dtype) << ", weight " << dtype_name(weight_dtype);
  }
}

// The same for the modes and the gated norm.
TEST(CpuKernels, HaveTheBitsOfEveryOtherProcessorInEveryMode) {
  struct Mode {
    uint64_t want;
    Operands operands;
    bool round_each_step, float32_residual, norm_before_gate;
  };
  constexpr Mode kModes[] = {
      {0x881e1dc75ea71abc, Operands::kPlain, true, false, true},
      {0x1bf9b74f0f2b7f08, Operands::kAddPost, true, false, true},
      {0xee042f38b27e9ec7, Operands::kAddPost, false, true, true},
      {0x8f437c9a4897ca3e, Operands::kGated, false, false, true},
      {0xc1592d63ea39f212, Operands::kGated, true, false, true},
      {0x63349ec2c772299b, Operands::kGated, false, false, false},
      {0x6cbbbc04ec3ff601, Operands::kNormAdd, false, false, true},
      {0x2bc72985856e87ff, Operands::kNormAdd, true, false, true},
  };
  const std::vector<Target*> all = cpu_targets();
  for (const Mode& mode : kModes) {
    std::vector<uint64_t> hashes(all.size(), kHashOfNothing);
    for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
      for (const int64_t hidden : {1, 64, 100, 576, 4097, 20000})
        for (const Values values : {Values::kNormal, Values::kSubnormal, Values::kSpecialWeight}) {
          if (dtype == DType::kFloat32 && mode.float32_residual) continue;
          Case c = simple_case(dtype, dtype, mode.operands, 4, hidden);
          c.values = values;
          c.seed = 3;
          c.round_each_step = mode.round_each_step;
          c.float32_residual = mode.float32_residual;
          c.norm_before_gate = mode.norm_before_gate;
          c.sigmoid = hidden == 100;
          if (c.gate && hidden == 576) c.group_size = 64;
          const Tensors inputs = make_inputs(c);
          for (size_t t = 0; t < all.size(); ++t) {
            std::string error;
            const Tensors outputs = run_case(*all[t], c, inputs, &error);
            ASSERT_EQ("", error);
            add_to_hash(c.dtype_of(kResidualOut), outputs[kResidualOut], &hashes[t]);
            add_to_hash(dtype, outputs[kOut], &hashes[t]);
          }
        }
    for (size_t t = 0; t < all.size(); ++t)
      EXPECT_EQ(mode.want, hashes[t]) << "0x" << std::hex << hashes[t] << ": " << all[t]->name() << ", mode "
                                      << &mode - kModes;
  }
}

}  // namespace
}  // namespace gemma_norm
