// The row kernel for AVX-512 (F, BW, DQ, VL: Skylake-X, Zen 4 and later).
#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#endif

#include "row_kernel.h"

namespace gemma_norm {
namespace {

struct F32x16 {
  __m512 v;

  static F32x16 broadcast(float f) { return {_mm512_set1_ps(f)}; }

  static F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static F32x16 load(const Float16* p) { return {_mm512_cvtph_ps(load16(p))}; }
  static F32x16 load(const BFloat16* p) {
    // Word j to the upper half of lane j: one shuffle, where widening and shifting would take two operations.
    const __m512i words = _mm512_castsi256_si512(load16(p));
    return {_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, upper_words(), words))};
  }

  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(Float16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half()); }
  void store(BFloat16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bfloat()); }

  void stream(float* p) const { _mm512_stream_ps(p, v); }
  void stream(Float16* p) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), half()); }
  void stream(BFloat16* p) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bfloat()); }
  static void fence() { _mm_sfence(); }

  friend F32x16 operator+(F32x16 a, F32x16 b) { return {a.v + b.v}; }
  friend F32x16 operator*(F32x16 a, F32x16 b) { return {a.v * b.v}; }

  float sum() const {
    const __m256 v8 = _mm512_castps512_ps256(v) + _mm512_extractf32x8_ps(v, 1);
    const __m128 v4 = _mm256_castps256_ps128(v8) + _mm256_extractf128_ps(v8, 1);
    const __m128 v2 = v4 + _mm_movehl_ps(v4, v4);
    return v2[0] + v2[1];
  }

 private:
  static __m256i load16(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

  // Words 2j + 1 <- j.
  static __m512i upper_words() {
    return _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 16);
  }

  __m256i half() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

  __m256i bfloat() const {
    const __m512i u = _mm512_castps_si512(v);
    const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
    __m512i r = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
    r = _mm512_mask_add_epi32(r, odd, u, _mm512_set1_epi32(0x8000));
    const __m512i lower = _mm512_setr_epi32(0x30001, 0x70005, 0xb0009, 0xf000d, 0x130011, 0x170015, 0x1b0019, 0x1f001d, 0, 0, 0, 0, 0, 0, 0, 0);
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16(lower, r));
  }
};

}  // namespace

void rows_avx512(const RowParams& params, int64_t begin, int64_t end) { run<F32x16>(params, begin, end); }

}  // namespace gemma_norm

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
