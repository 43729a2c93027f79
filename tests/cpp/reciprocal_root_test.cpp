// The reciprocal and the reciprocal root, refined by Newton's steps, have the bits of IEEE 754's division and square
// root.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "device/emulated.h"

namespace gemma_norm::device {
namespace {

TEST(Reciprocal, IsRightForEveryMantissaAndEveryErrorOfTheApproximation) {
  for (uint32_t bits = as_bits(1.0f); bits < as_bits(2.0f); ++bits) {
    const float d = as_float(bits), expected = 1 / d;
    for (int error = -1; error <= 1; ++error)
      ASSERT_EQ(expected, refine_reciprocal<Scalar>(d, as_float(as_bits(expected) + error)))
          << std::hexfloat << d << ", " << error;
  }
}

TEST(Reciprocal, IsRightForEveryExponentThatItIsFor) {
  for (uint32_t bits = as_bits(0x1p-120f); bits <= as_bits(0x1p120f); bits += 4093) {
    const float d = as_float(bits);
    ASSERT_EQ(1 / d, Scalar::reciprocal(d)) << std::hexfloat << d;
  }
}

// All mantissas, with an even and with an odd exponent. That is enough, because a power of four comes out of the root
// exactly.
TEST(ReciprocalRoot, IsRightForEveryMantissaAndEveryErrorOfTheApproximation) {
  for (uint32_t bits = as_bits(1.0f); bits < as_bits(4.0f); ++bits) {
    const float v = as_float(bits), expected = 1.0f / std::sqrt(v);
    const uint32_t nearest = as_bits(static_cast<float>(1 / std::sqrt(static_cast<double>(v))));
    for (int error = -3; error <= 3; ++error)
      ASSERT_EQ(expected, refine_reciprocal_root(v, as_float(nearest + error))) << std::hexfloat << v << ", " << error;
  }
}

TEST(ReciprocalRoot, IsRightForEveryExponent) {
  for (uint32_t bits = 1; bits < as_bits(std::numeric_limits<float>::infinity()); bits += 4093) {
    const float v = as_float(bits);
    ASSERT_EQ(1.0f / std::sqrt(v), newton_reciprocal_root(v)) << std::hexfloat << v;
  }
  const float largest = std::numeric_limits<float>::max(), least = std::numeric_limits<float>::denorm_min();
  for (const float v : {least, 0x1p-126f, 0x1p-96f, std::nextafter(0x1p-96f, 0.0f), largest})
    EXPECT_EQ(1.0f / std::sqrt(v), newton_reciprocal_root(v)) << std::hexfloat << v;
}

TEST(ReciprocalRoot, OfZeroInfinityAndNan) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(kInfinity, newton_reciprocal_root(0.0f));
  EXPECT_EQ(0.0f, newton_reciprocal_root(kInfinity));
  EXPECT_TRUE(std::isnan(newton_reciprocal_root(std::numeric_limits<float>::quiet_NaN())));
}

}  // namespace
}  // namespace gemma_norm::device
