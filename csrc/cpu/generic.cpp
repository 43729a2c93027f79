// The kernels in plain C++, for processors that none of the other files supports.
#include <cstdint>
#include <cstring>

#include "isa.h"
#include "kernels.h"

namespace gemma_norm {
namespace {

uint32_t to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  return u;
}

float to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

float widen(float f) { return f; }
float widen(BFloat16 b) { return to_float(uint32_t{b.bits} << 16); }

// Both conversions of float16 compute the result of each case and then select one, so that compilers can vectorise
// them.
float widen(Float16 h) {
  const uint32_t rest = h.bits & 0x7fffu;
  const float normal = to_float((rest << 13) + (224u << 23)) * 0x1p-112f;  // 224 turns exponent 31 (Inf, NaN) into 255
  const float subnormal = to_float(rest | to_bits(0.5f)) - 0.5f;
  return to_float((h.bits & 0x8000u) << 16 | to_bits(rest < 0x400 ? subnormal : normal));
}

void narrow(float f, float* to) { *to = f; }

void narrow(float f, BFloat16* to) {
  const uint32_t u = to_bits(f);
  to->bits = static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);  // a NaN with an empty lower half stays a NaN
}

void narrow(float f, Float16* to) {
  const uint32_t u = to_bits(f);
  const uint32_t rest = u & 0x7fffffff;
  const uint32_t normal = (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13;
  // The addition rounds to a multiple of 2^-24.
  const uint32_t subnormal = to_bits(to_float(rest) + 0.5f) - to_bits(0.5f);
  const uint32_t special = rest > 0x7f800000 ? 0x7e00 : 0x7c00;
  const uint32_t half = rest < 0x38800000 ? subnormal : rest < 0x47800000 ? normal : special;
  to->bits = static_cast<uint16_t>((u >> 16 & 0x8000) | half);
}

struct F32x32 {
  static constexpr bool kPacksBFloat16 = false, kHasNontemporalStores = false;

  float v[kLanes];

  static F32x32 broadcast(float f) {
    F32x32 r;
    for (float& lane : r.v) lane = f;
    return r;
  }

  template <class T>
  [[gnu::noinline]] static F32x32 load(const T* p) {
    F32x32 r;
    for (int j = 0; j < kLanes; ++j) r.v[j] = widen(p[j]);
    return r;
  }

  template <class T>
  [[gnu::noinline]] void store(T* p) const {
    for (int j = 0; j < kLanes; ++j) narrow(v[j], p + j);
  }

  template <class T>
  void store_nontemporal(T* p) const {
    store(p);
  }
  static void fence() {}

  F32x32 operator+(const F32x32& b) const {
    F32x32 r;
    for (int j = 0; j < kLanes; ++j) r.v[j] = v[j] + b.v[j];
    return r;
  }
  F32x32 operator*(const F32x32& b) const {
    F32x32 r;
    for (int j = 0; j < kLanes; ++j) r.v[j] = v[j] * b.v[j];
    return r;
  }

  static F32x32 multiply_add(const F32x32& a, const F32x32& b, const F32x32& c) {
    F32x32 r;
    for (int j = 0; j < kLanes; ++j) r.v[j] = multiply_add(a.v[j], b.v[j], c.v[j]);
    return r;
  }

  // exponential.h needs these. Like load() and store() they are not inlined: this file then compiles faster by a third.
  static F32x32 all(float f) { return broadcast(f); }
  [[gnu::noinline]] static F32x32 fma(const F32x32& a, const F32x32& b, const F32x32& c) {
    F32x32 r;
    for (int j = 0; j < kLanes; ++j) r.v[j] = rounded_once(a.v[j], b.v[j], c.v[j]);
    return r;
  }
  [[gnu::noinline]] static F32x32 clamp(const F32x32& g, float low, float high) {
    F32x32 r;
    for (int j = 0; j < kLanes; ++j) {
      const float above = g.v[j] > low ? g.v[j] : low;
      r.v[j] = above < high ? above : high;
    }
    return r;
  }
  [[gnu::noinline]] static F32x32 one_unless_nan(const F32x32& g) {
    F32x32 r;
    for (int j = 0; j < kLanes; ++j) r.v[j] = g.v[j] == g.v[j] ? 1 : g.v[j];
    return r;
  }
  [[gnu::noinline]] static F32x32 power_of_two(const F32x32& n) {
    F32x32 r;
    for (int j = 0; j < kLanes; ++j) r.v[j] = to_float(to_bits(n.v[j]) << 23);
    return r;
  }
  [[gnu::noinline]] static F32x32 reciprocal(const F32x32& d) {
    F32x32 r;
    for (int j = 0; j < kLanes; ++j) r.v[j] = 1 / d.v[j];
    return r;
  }

  // sum + odd elements^2 + even elements^2, in this order.
  static F32x32 add_squares_of_pairs(const F32x32& sum, const BFloat16* p) {
    F32x32 r;
    for (int j = 0; j < kLanes; ++j) {
      const float even = widen(p[2 * j]), odd = widen(p[2 * j + 1]);
      r.v[j] = multiply_add(even, even, multiply_add(odd, odd, sum.v[j]));
    }
    return r;
  }

  F32x32 without_payload() const {
    F32x32 r;
    for (int j = 0; j < kLanes; ++j) r.v[j] = v[j] == v[j] ? v[j] : __builtin_nanf("");
    return r;
  }

  float sum() const {
    F32x32 r = *this;
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int j = 0; j < half; ++j) r.v[j] += r.v[j + half];
    return r.v[0];
  }

 private:
  // a * b + c, rounded once, if a and b have 16 bits. Their product is exact in double. If the sum is not exact in
  // double, the smaller term is far below half a unit in the last place of the larger one in float32, so rounding twice
  // does no harm.
  static float multiply_add(float a, float b, float c) { return static_cast<float>(static_cast<double>(a) * b + c); }

  // a * b + c, rounded once, for any finite numbers. The product is exact in double. The sum is rounded to double by
  // rounding to odd: such a number lies half way between two floats only if it is exact, so rounding it to float
  // afterwards gives the correct result (Boldo and Melquiond 2008).
  static float rounded_once(float a, float b, float c) {
    const double product = static_cast<double>(a) * b, sum = product + c;
    const double of_c = sum - product, error = (product - (sum - of_c)) + (c - of_c);
    uint64_t bits;
    std::memcpy(&bits, &sum, sizeof bits);
    if (error != 0 && bits % 2 == 0) bits += (error > 0) == (sum > 0) ? 1 : -1;
    double odd;
    std::memcpy(&odd, &bits, sizeof odd);
    return static_cast<float>(odd);
  }
};

}  // namespace

const CpuKernels kGenericKernels = cpu_kernels<F32x32>(ForwardOps());

}  // namespace gemma_norm
