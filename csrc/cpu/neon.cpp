// The kernels for AArch64: Advanced SIMD, which every such processor has.

#if defined(__aarch64__)
#include <arm_neon.h>

#include "isa.h"
#include "kernels.h"

namespace gemma_norm {
namespace {

struct F32x32 {
  static constexpr bool kPacksBFloat16 = false, kHasNontemporalStores = false;

  float32x4_t v[8];

  static F32x32 broadcast(float f) {
    const float32x4_t all = vdupq_n_f32(f);
    return {{all, all, all, all, all, all, all, all}};
  }

  static F32x32 load(const float* p) {
    F32x32 r;
    for (int j = 0; j < 8; ++j) r.v[j] = vld1q_f32(p + 4 * j);
    return r;
  }
  static F32x32 load(const Float16* p) {
    F32x32 r;
    for (int j = 0; j < 8; ++j) r.v[j] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p[4 * j].bits)));
    return r;
  }
  static F32x32 load(const BFloat16* p) {
    F32x32 r;
    for (int j = 0; j < 8; ++j) r.v[j] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p[4 * j].bits), 16));
    return r;
  }

  void store(float* p) const {
    for (int j = 0; j < 8; ++j) vst1q_f32(p + 4 * j, v[j]);
  }
  void store(Float16* p) const {
    for (int j = 0; j < 8; ++j) vst1_u16(&p[4 * j].bits, vreinterpret_u16_f16(vcvt_f16_f32(v[j])));
  }
  void store(BFloat16* p) const {  // the upper halves of the rounded lanes
    for (int j = 0; j < 8; j += 2) vst1q_u16(&p[4 * j].bits, vuzp2q_u16(rounded(v[j]), rounded(v[j + 1])));
  }

  template <class T>
  void store_nontemporal(T* p) const {
    store(p);
  }
  static void fence() {}

  F32x32 operator+(const F32x32& b) const {
    F32x32 r;
    for (int j = 0; j < 8; ++j) r.v[j] = vaddq_f32(v[j], b.v[j]);
    return r;
  }
  F32x32 operator*(const F32x32& b) const {
    F32x32 r;
    for (int j = 0; j < 8; ++j) r.v[j] = vmulq_f32(v[j], b.v[j]);
    return r;
  }

  static F32x32 multiply_add(const F32x32& a, const F32x32& b, const F32x32& c) {
    F32x32 r;
    for (int j = 0; j < 8; ++j) r.v[j] = vfmaq_f32(c.v[j], a.v[j], b.v[j]);
    return r;
  }

  // The operations that exponential.h needs.
  static F32x32 all(float f) { return broadcast(f); }
  static F32x32 fma(const F32x32& a, const F32x32& b, const F32x32& c) { return multiply_add(a, b, c); }
  static F32x32 clamp(const F32x32& g, float low, float high) {
    F32x32 r;
    for (int j = 0; j < 8; ++j) r.v[j] = vminnmq_f32(vmaxnmq_f32(g.v[j], vdupq_n_f32(low)), vdupq_n_f32(high));
    return r;
  }
  static F32x32 one_unless_nan(const F32x32& g) {
    F32x32 r;
    for (int j = 0; j < 8; ++j) r.v[j] = vbslq_f32(vceqq_f32(g.v[j], g.v[j]), vdupq_n_f32(1), g.v[j]);
    return r;
  }
  static F32x32 power_of_two(const F32x32& n) {
    F32x32 r;
    for (int j = 0; j < 8; ++j) r.v[j] = vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(n.v[j]), 23));
    return r;
  }
  static F32x32 reciprocal(const F32x32& d) {
    F32x32 r;
    for (int j = 0; j < 8; ++j) r.v[j] = vdivq_f32(vdupq_n_f32(1), d.v[j]);
    return r;
  }

  // sum + odd elements^2 + even elements^2, in this order.
  static F32x32 add_squares_of_pairs(const F32x32& sum, const BFloat16* p) {
    F32x32 r;
    for (int j = 0; j < 8; ++j) {
      const uint32x4_t pairs = vreinterpretq_u32_u16(vld1q_u16(&p[8 * j].bits));
      const float32x4_t odds = vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000)));
      const float32x4_t evens = vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16));
      r.v[j] = vfmaq_f32(vfmaq_f32(sum.v[j], odds, odds), evens, evens);
    }
    return r;
  }

  F32x32 without_payload() const {
    F32x32 r;
    for (int j = 0; j < 8; ++j) r.v[j] = vbslq_f32(vceqq_f32(v[j], v[j]), v[j], vdupq_n_f32(__builtin_nanf("")));
    return r;
  }

  float sum() const {
    float32x4_t v16[4], v8[2];
    for (int j = 0; j < 4; ++j) v16[j] = vaddq_f32(v[j], v[j + 4]);
    for (int j = 0; j < 2; ++j) v8[j] = vaddq_f32(v16[j], v16[j + 2]);
    const float32x4_t v4 = vaddq_f32(v8[0], v8[1]);
    const float32x2_t v2 = vadd_f32(vget_low_f32(v4), vget_high_f32(v4));
    return vget_lane_f32(v2, 0) + vget_lane_f32(v2, 1);
  }

 private:
  static uint16x8_t rounded(float32x4_t f) {
    const uint32x4_t u = vreinterpretq_u32_f32(f);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    return vreinterpretq_u16_u32(vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), odd));
  }
};

}  // namespace

const CpuKernels kNeonKernels = cpu_kernels<F32x32>(ForwardOps());

}  // namespace gemma_norm

#endif
