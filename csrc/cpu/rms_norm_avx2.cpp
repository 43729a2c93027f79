// The row kernel for AVX2 and F16C (Haswell, Zen and later).
#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,f16c")
#endif

#include "row_kernel.h"

namespace gemma_norm {
namespace {

struct F32x16 {
  __m256 lo, hi;

  static F32x16 broadcast(float f) { return {_mm256_set1_ps(f), _mm256_set1_ps(f)}; }

  static F32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static F32x16 load(const Float16* p) { return {_mm256_cvtph_ps(load8(p)), _mm256_cvtph_ps(load8(p + 8))}; }
  static F32x16 load(const BFloat16* p) { return {widen(load8(p)), widen(load8(p + 8))}; }

  void store(float* p) const {
    _mm256_storeu_ps(p, lo);
    _mm256_storeu_ps(p + 8, hi);
  }
  void store(Float16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half()); }
  void store(BFloat16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bfloat()); }

  void stream(float* p) const {
    _mm256_stream_ps(p, lo);
    _mm256_stream_ps(p + 8, hi);
  }
  void stream(Float16* p) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), half()); }
  void stream(BFloat16* p) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bfloat()); }
  static void fence() { _mm_sfence(); }

  friend F32x16 operator+(F32x16 a, F32x16 b) { return {a.lo + b.lo, a.hi + b.hi}; }
  friend F32x16 operator*(F32x16 a, F32x16 b) { return {a.lo * b.lo, a.hi * b.hi}; }

  float sum() const {
    const __m256 v8 = lo + hi;
    const __m128 v4 = _mm256_castps256_ps128(v8) + _mm256_extractf128_ps(v8, 1);
    const __m128 v2 = v4 + _mm_movehl_ps(v4, v4);
    return v2[0] + v2[1];
  }

 private:
  static __m128i load8(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static __m256 widen(__m128i words) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16)); }

  __m256i half() const {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return _mm256_set_m128i(_mm256_cvtps_ph(hi, kNearest), _mm256_cvtps_ph(lo, kNearest));
  }

  static __m256i rounded(__m256 f) {
    const __m256i u = _mm256_castps_si256(f);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
  }
  __m256i bfloat() const {
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded(lo), rounded(hi)), 0xd8);
  }
};

}  // namespace

void rows_avx2(const RowParams& params, int64_t begin, int64_t end) { run<F32x16>(params, begin, end); }

}  // namespace gemma_norm

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
