// overlap(), overlaps_itself() and same_memory() agree with brute force, which lists the bytes of a tensor one by one.
#include "core/overlap.h"

#include <gtest/gtest.h>

#include <random>
#include <set>
#include <string>
#include <vector>

namespace gemma_norm {
namespace {

struct Strided {
  std::vector<int64_t> sizes, strides;
  DType dtype;
  int64_t first;  // byte

  Tensor tensor() const {
    return {reinterpret_cast<void*>(first),     sizes.data(), strides.data(),
            static_cast<int32_t>(sizes.size()), dtype,        "float"};
  }

  template <class Visit>
  void each_byte(const Visit& visit) const {
    std::vector<int64_t> at(sizes.size());
    for (;;) {
      int64_t element = 0;
      for (size_t d = 0; d < at.size(); ++d) element += at[d] * strides[d];
      for (int64_t byte = 0; byte < size_of(dtype); ++byte) visit(first + element * size_of(dtype) + byte);
      size_t d = at.size();
      while (d > 0 && ++at[d - 1] == sizes[d - 1]) at[--d] = 0;
      if (d == 0) return;
    }
  }
  std::set<int64_t> bytes() const {
    std::set<int64_t> all;
    each_byte([&](int64_t byte) { all.insert(byte); });
    return all;
  }
  int64_t count() const {
    int64_t count = 0;
    each_byte([&](int64_t) { ++count; });
    return count;
  }

  std::string text() const {
    std::string text =
        "from byte " + std::to_string(first) + ", elements of " + std::to_string(size_of(dtype)) + ", (size, stride):";
    for (size_t d = 0; d < sizes.size(); ++d)
      text += " (" + std::to_string(sizes[d]) + ", " + std::to_string(strides[d]) + ")";
    return text;
  }
};

class Generator {
 public:
  // Half of the tensors have strides that are multiples of one number, as slices of one buffer do that take turns in
  // it.
  Strided strided() {
    Strided s;
    s.dtype = upto(1) ? DType::kFloat32 : DType::kBFloat16;
    s.first = 4096 + 2 * upto(40);
    const int64_t grid = upto(1) ? 1 : 1 + upto(7);
    for (int64_t d = upto(3); d > 0; --d) {
      s.sizes.push_back(1 + upto(3));
      s.strides.push_back(grid * upto(9));
    }
    s.sizes.push_back(1 + upto(4));
    s.strides.push_back(1);
    return s;
  }

 private:
  int64_t upto(int64_t most) { return random_() % (most + 1); }
  std::mt19937 random_{7};
};

TEST(Overlap, AgreesWithBruteForce) {
  Generator generator;
  int overlapping = 0;
  constexpr int kTries = 100000;
  for (int i = 0; i < kTries; ++i) {
    const Strided a = generator.strided(), b = generator.strided();
    const std::set<int64_t> bytes = a.bytes();
    bool shared = false;
    b.each_byte([&](int64_t byte) { shared = shared || bytes.count(byte); });
    ASSERT_EQ(shared, overlap(a.tensor(), b.tensor())) << a.text() << "\n" << b.text();
    ASSERT_EQ(shared, overlap(b.tensor(), a.tensor())) << b.text() << "\n" << a.text();
    overlapping += shared;
  }
  EXPECT_LT(kTries / 10, overlapping);
  EXPECT_LT(kTries / 10, kTries - overlapping);
}

TEST(OverlapsItself, AgreesWithBruteForce) {
  Generator generator;
  int overlapping = 0;
  constexpr int kTries = 100000;
  for (int i = 0; i < kTries; ++i) {
    const Strided a = generator.strided();
    const bool shared = static_cast<int64_t>(a.bytes().size()) != a.count();
    ASSERT_EQ(shared, overlaps_itself(a.tensor())) << a.text();
    overlapping += shared;
  }
  EXPECT_LT(kTries / 10, overlapping);
  EXPECT_LT(kTries / 10, kTries - overlapping);
}

TEST(Overlap, OfTheSlicesOfOneBufferIsNone) {
  // [tokens, q heads + k heads, 128], 16 GB in all. To list the rows would take minutes.
  const int64_t tokens = 1 << 20, heads = 64, hidden = 128;
  const auto slice = [&](int64_t first, int64_t count) {
    return Strided{{tokens, count, hidden}, {heads * hidden, hidden, 1}, DType::kBFloat16, 4096 + first * hidden * 2};
  };
  EXPECT_FALSE(overlap(slice(0, 48).tensor(), slice(48, 16).tensor()));
  EXPECT_TRUE(overlap(slice(0, 48).tensor(), slice(47, 17).tensor()));
  EXPECT_FALSE(overlaps_itself(slice(0, 48).tensor()));
}

TEST(SameMemory, MeansTheSameElementsInTheSameOrder) {
  const Strided a{{4, 1, 8}, {8, 3, 1}, DType::kFloat32, 4096};
  const auto differs = [&](const auto& change) {
    Strided b = a;
    change(b);
    return !same_memory(a.tensor(), b.tensor());
  };
  EXPECT_FALSE(differs([](Strided&) {}));
  EXPECT_FALSE(differs([](Strided& b) { b.strides[1] = 99; })) << "a dimension of size 1 takes no steps";
  EXPECT_TRUE(differs([](Strided& b) { b.strides[0] = 9; }));
  EXPECT_TRUE(differs([](Strided& b) { b.sizes[0] = 3; }));
  EXPECT_TRUE(differs([](Strided& b) { b.first += 4; }));
  EXPECT_TRUE(differs([](Strided& b) { b.dtype = DType::kBFloat16; }));
  EXPECT_TRUE(differs([](Strided& b) { b.sizes = {4, 8}, b.strides = {8, 1}; }));
}

}  // namespace
}  // namespace gemma_norm
