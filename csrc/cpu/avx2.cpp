// The kernels for AVX2, F16C and FMA (Haswell, Zen and later).

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,f16c,fma")
#endif

#include "isa.h"
#include "kernels.h"

namespace gemma_norm {
namespace {

struct F32x32 {
  static constexpr bool kPacksBFloat16 = false, kHasNontemporalStores = true;

  __m256 v[4];

  static F32x32 broadcast(float f) {
    const __m256 all = _mm256_set1_ps(f);
    return {all, all, all, all};
  }

  template <class T>
  static F32x32 load(const T* p) {
    return {load8(p), load8(p + 8), load8(p + 16), load8(p + 24)};
  }

  void store(float* p) const {
    for (int j = 0; j < 4; ++j) _mm256_storeu_ps(p + 8 * j, v[j]);
  }
  template <class T>
  void store(T* p) const {
    for (int j = 0; j < 4; j += 2)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8 * j), narrow(v[j], v[j + 1], p));
  }

  void store_nontemporal(float* p) const {
    for (int j = 0; j < 4; ++j) _mm256_stream_ps(p + 8 * j, v[j]);
  }
  template <class T>
  void store_nontemporal(T* p) const {
    for (int j = 0; j < 4; j += 2)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(p + 8 * j), narrow(v[j], v[j + 1], p));
  }
  static void fence() { _mm_sfence(); }

  F32x32 operator+(const F32x32& b) const { return {v[0] + b.v[0], v[1] + b.v[1], v[2] + b.v[2], v[3] + b.v[3]}; }
  F32x32 operator*(const F32x32& b) const { return {v[0] * b.v[0], v[1] * b.v[1], v[2] * b.v[2], v[3] * b.v[3]}; }

  static F32x32 multiply_add(const F32x32& a, const F32x32& b, const F32x32& c) {
    return {_mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], c.v[1]),
            _mm256_fmadd_ps(a.v[2], b.v[2], c.v[2]), _mm256_fmadd_ps(a.v[3], b.v[3], c.v[3])};
  }

  // The operations that exponential.h needs.
  static F32x32 all(float f) { return broadcast(f); }
  static F32x32 fma(const F32x32& a, const F32x32& b, const F32x32& c) { return multiply_add(a, b, c); }
  static F32x32 clamp(const F32x32& g, float low, float high) {
    F32x32 r;
    for (int j = 0; j < 4; ++j)
      r.v[j] = _mm256_min_ps(_mm256_max_ps(g.v[j], _mm256_set1_ps(low)), _mm256_set1_ps(high));
    return r;
  }
  static F32x32 one_unless_nan(const F32x32& g) {
    F32x32 r;
    for (int j = 0; j < 4; ++j)
      r.v[j] = _mm256_blendv_ps(_mm256_set1_ps(1), g.v[j], _mm256_cmp_ps(g.v[j], g.v[j], _CMP_UNORD_Q));
    return r;
  }
  static F32x32 power_of_two(const F32x32& n) {
    F32x32 r;
    for (int j = 0; j < 4; ++j) r.v[j] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(n.v[j]), 23));
    return r;
  }
  static F32x32 reciprocal(const F32x32& d) {
    F32x32 r;
    for (int j = 0; j < 4; ++j) r.v[j] = _mm256_div_ps(_mm256_set1_ps(1), d.v[j]);
    return r;
  }

  // sum + odd elements^2 + even elements^2, in this order.
  static F32x32 add_squares_of_pairs(const F32x32& sum, const BFloat16* p) {
    return {add_squares(sum.v[0], p), add_squares(sum.v[1], p + 16), add_squares(sum.v[2], p + 32),
            add_squares(sum.v[3], p + 48)};
  }

  F32x32 without_payload() const {
    return {without_payload(v[0]), without_payload(v[1]), without_payload(v[2]), without_payload(v[3])};
  }

  float sum() const {
    const __m256 v8 = (v[0] + v[2]) + (v[1] + v[3]);
    const __m128 v4 = _mm256_castps256_ps128(v8) + _mm256_extractf128_ps(v8, 1);
    const __m128 v2 = v4 + _mm_movehl_ps(v4, v4);
    return v2[0] + v2[1];
  }

 private:
  static __m128i words(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
  static __m256 load8(const Float16* p) { return _mm256_cvtph_ps(words(p)); }
  static __m256 load8(const BFloat16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words(p)), 16));
  }

  static __m256 add_squares(__m256 sum, const BFloat16* p) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256 odds = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
    const __m256 evens = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    return _mm256_fmadd_ps(evens, evens, _mm256_fmadd_ps(odds, odds, sum));
  }

  static __m256 without_payload(__m256 f) {
    return _mm256_blendv_ps(f, _mm256_set1_ps(__builtin_nanf("")), _mm256_cmp_ps(f, f, _CMP_UNORD_Q));
  }

  static __m256i narrow(__m256 a, __m256 b, const Float16*) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return _mm256_set_m128i(_mm256_cvtps_ph(b, kNearest), _mm256_cvtps_ph(a, kNearest));
  }
  static __m256i narrow(__m256 a, __m256 b, const BFloat16*) {
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded(a), rounded(b)), 0xd8);
  }
  static __m256i rounded(__m256 f) {
    const __m256i u = _mm256_castps_si256(f);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
  }
};

}  // namespace

const CpuKernels kAvx2Kernels = cpu_kernels<F32x32>(ForwardOps());

}  // namespace gemma_norm

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
