// 32 floats in AVX-512's registers (F, BW, DQ, VL), for avx512.cpp and avx512_bf16.cpp. Part of row_kernel.h, with the
// same anonymous namespace.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "rows.h"

namespace gemma_norm {
namespace {

template <bool kHasBf16>
struct F32x32 {
  // Without AVX512-BF16 the loop is bound by arithmetic and not by loads from L1, so packed weights would gain nothing.
  static constexpr bool kPacksBFloat16 = kHasBf16, kHasNontemporalStores = true;

  __m512 lo, hi;

  static F32x32 broadcast(float f) { return {_mm512_set1_ps(f), _mm512_set1_ps(f)}; }

  static F32x32 load(const float* p) { return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)}; }
  static F32x32 load(const Float16* p) { return {_mm512_cvtph_ps(load16(p)), _mm512_cvtph_ps(load16(p + 16))}; }
  static F32x32 load(const BFloat16* p) { return {widen(load16(p)), widen(load16(p + 16))}; }

  // Orders 32 weights so that 32-bit lane j holds elements j and j + 16, which become lane j of lo and of hi.
  static void pack(const BFloat16* p, BFloat16* packed) {
    const __m512i from =
        _mm512_add_epi32(_mm512_mullo_epi32(lane_numbers(), _mm512_set1_epi32(0x10001)), _mm512_set1_epi32(16 << 16));
    _mm512_storeu_si512(packed, _mm512_permutexvar_epi16(from, _mm512_loadu_si512(p)));
  }
  static F32x32 load_packed(const BFloat16* p) {
    const __m512i pairs = _mm512_loadu_si512(p);
    return {evens(pairs), odds(pairs)};
  }

  void store(float* p) const {
    _mm512_storeu_ps(p, lo);
    _mm512_storeu_ps(p + 16, hi);
  }
  void store(Float16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half(lo));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), half(hi));
  }
  void store(BFloat16* p) const { _mm512_storeu_si512(p, bfloat()); }

  void store_nontemporal(float* p) const {
    _mm512_stream_ps(p, lo);
    _mm512_stream_ps(p + 16, hi);
  }
  void store_nontemporal(Float16* p) const {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), half(lo));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p + 16), half(hi));
  }
  void store_nontemporal(BFloat16* p) const { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bfloat()); }
  static void fence() { _mm_sfence(); }

  F32x32 operator+(const F32x32& b) const { return {lo + b.lo, hi + b.hi}; }
  F32x32 operator*(const F32x32& b) const { return {lo * b.lo, hi * b.hi}; }

  static F32x32 multiply_add(const F32x32& a, const F32x32& b, const F32x32& c) {
    return {_mm512_fmadd_ps(a.lo, b.lo, c.lo), _mm512_fmadd_ps(a.hi, b.hi, c.hi)};
  }

  // The operations that exponential.h needs.
  static F32x32 all(float f) { return broadcast(f); }
  static F32x32 fma(const F32x32& a, const F32x32& b, const F32x32& c) { return multiply_add(a, b, c); }
  static F32x32 clamp(const F32x32& g, float low, float high) {
    const __m512 least = _mm512_set1_ps(low), most = _mm512_set1_ps(high);
    return {_mm512_min_ps(_mm512_max_ps(g.lo, least), most), _mm512_min_ps(_mm512_max_ps(g.hi, least), most)};
  }
  static F32x32 one_unless_nan(const F32x32& g) {
    const __m512 one = _mm512_set1_ps(1);
    return {_mm512_mask_mov_ps(one, _mm512_cmp_ps_mask(g.lo, g.lo, _CMP_UNORD_Q), g.lo),
            _mm512_mask_mov_ps(one, _mm512_cmp_ps_mask(g.hi, g.hi, _CMP_UNORD_Q), g.hi)};
  }
  static F32x32 power_of_two(const F32x32& n) { return {power_of_two(n.lo), power_of_two(n.hi)}; }
  static F32x32 reciprocal(const F32x32& d) {
    const __m512 one = _mm512_set1_ps(1);
    return {_mm512_div_ps(one, d.lo), _mm512_div_ps(one, d.hi)};
  }

  // sum + odd elements^2 + even elements^2, in this order.
  static F32x32 add_squares_of_pairs(const F32x32& sum, const BFloat16* p) {
    return {add_squares(sum.lo, _mm512_loadu_si512(p)), add_squares(sum.hi, _mm512_loadu_si512(p + 32))};
  }

  F32x32 without_payload() const { return {without_payload(lo), without_payload(hi)}; }

  float sum() const {
    const __m512 v16 = lo + hi;
    const __m256 v8 = _mm512_castps512_ps256(v16) + _mm512_extractf32x8_ps(v16, 1);
    const __m128 v4 = _mm256_castps256_ps128(v8) + _mm256_extractf128_ps(v8, 1);
    const __m128 v2 = v4 + _mm_movehl_ps(v4, v4);
    return v2[0] + v2[1];
  }

 private:
  static __m512 power_of_two(__m512 n) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(n), 23)); }

  static __m256i load16(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

  static __m512i lane_numbers() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

  // Moves word j to the upper half of lane j by one shuffle. Widening and shifting would be two operations.
  static __m512 widen(__m256i words) {
    const __m512i from = _mm512_slli_epi32(lane_numbers(), 16);
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, from, _mm512_castsi256_si512(words)));
  }

  static __m512 add_squares(__m512 sum, __m512i pairs) {
    // Two fused multiply-adds, that of the odd elements first. Intel's manual says so, and so it was on Zen 4 and
    // Sapphire Rapids.
    if constexpr (kHasBf16) return _mm512_dpbf16_ps(sum, (__m512bh)pairs, (__m512bh)pairs);
    const __m512 odd = odds(pairs), even = evens(pairs);
    return _mm512_fmadd_ps(even, even, _mm512_fmadd_ps(odd, odd, sum));
  }

  static __m512 evens(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
  static __m512 odds(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }

  static __m512 without_payload(__m512 f) {
    return _mm512_mask_mov_ps(f, _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q), _mm512_set1_ps(__builtin_nanf("")));
  }

  static __m256i half(__m512 f) { return _mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

  static __m512i rounded(__m512 f) {
    const __m512i u = _mm512_castps_si512(f);
    const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
    return _mm512_mask_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd, u, _mm512_set1_epi32(0x8000));
  }
  __m512i bfloat() const {
    if constexpr (kHasBf16) {
      // The conversion turns subnormal numbers into zeros. If any result is a zero, it may have been one, so all lanes
      // are then rounded with integer arithmetic instead.
      __m512i words = (__m512i)_mm512_cvtne2ps_pbh(hi, lo);
      asm("" : "+v"(words));  // else clang 19 takes them for bfloat16 numbers and compares them one by one
      const __mmask32 zeros = _mm512_testn_epi16_mask(words, _mm512_set1_epi16(0x7fff));
      if (__builtin_expect(zeros == 0, 1)) return words;
    }
    // Takes the upper half of each lane, which is the odd one of its two words: word 2j + 1 of lo for result j, then of
    // hi.
    const __m512i from =
        _mm512_add_epi32(_mm512_mullo_epi32(lane_numbers(), _mm512_set1_epi32(0x40004)), _mm512_set1_epi32(0x30001));
    return _mm512_permutex2var_epi16(rounded(lo), from, rounded(hi));
  }
};

}  // namespace

}  // namespace gemma_norm
