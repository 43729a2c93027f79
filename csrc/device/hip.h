// AMD: CDNA (wave 64) and RDNA (wave 32). See platform.h for what each name promises.
#pragma once

#include <hip/hip_runtime.h>

#include <atomic>
#include <cstdint>

#include "../plan.h"
#include "types.h"

#define GEMMA_NORM_DEVICE __device__ __forceinline__
#define GEMMA_NORM_KERNEL(max_threads) __global__ void __launch_bounds__(max_threads)
#define GEMMA_NORM_SHARED __shared__

namespace gemma_norm::device {

GEMMA_NORM_DEVICE int thread_index() { return threadIdx.x; }
GEMMA_NORM_DEVICE int block_threads() { return blockDim.x; }
GEMMA_NORM_DEVICE int64_t block_index() { return blockIdx.x; }
GEMMA_NORM_DEVICE void block_barrier() { __syncthreads(); }

// Of the target being compiled; the host asks the device (facts). ROCm 7 has no macro or constant for it any more.
#if defined(__GFX9__)
GEMMA_NORM_DEVICE constexpr int wave_width() { return 64; }
#else
GEMMA_NORM_DEVICE constexpr int wave_width() { return 32; }
#endif

GEMMA_NORM_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
GEMMA_NORM_DEVICE uint32_t as_bits(float f) { return __float_as_uint(f); }

// Lanes exchange through the VALU's data-parallel primitives: no LDS instruction, no wait.
template <int Control>
GEMMA_NORM_DEVICE float dpp(float v) {
  return as_float(__builtin_amdgcn_update_dpp(0, as_bits(v), Control, 0xf, 0xf, true));
}
constexpr int kSwapNeighbours = 0xB1, kSwapPairs = 0x4E, kMirrorHalfRow = 0x141, kMirrorRow = 0x140;  // a row is 16 lanes

GEMMA_NORM_DEVICE float lane_value(float v, int lane) { return as_float(__builtin_amdgcn_readlane(as_bits(v), lane)); }

GEMMA_NORM_DEVICE float sum_over_lanes(float v, int lanes) {
  // Each step adds the other half of a group whose halves are each uniform already, so a mirror serves as an exchange.
  if (lanes > 1) v += dpp<kSwapNeighbours>(v);
  if (lanes > 2) v += dpp<kSwapPairs>(v);
  if (lanes > 4) v += dpp<kMirrorHalfRow>(v);
  if (lanes > 8) v += dpp<kMirrorRow>(v);
#if defined(__GFX9__)
  if (lanes > 16) {
    const float low = lane_value(v, 0) + lane_value(v, 16), high = lane_value(v, 32) + lane_value(v, 48);
    v = lanes > 32 ? low + high : __lane_id() < 32 ? low : high;
  }
#else
  if (lanes > 16) v += as_float(__builtin_amdgcn_permlanex16(0, as_bits(v), 0x76543210, 0xfedcba98, true, false));
#endif
  return v;
}

using Vector4 = uint32_t __attribute__((ext_vector_type(4)));
GEMMA_NORM_DEVICE Words words(Vector4 v) { return {v.x, v.y, v.z, v.w}; }
GEMMA_NORM_DEVICE Words load_once(const Words* p) { return words(__builtin_nontemporal_load(reinterpret_cast<const Vector4*>(p))); }
GEMMA_NORM_DEVICE void store_once(Words* p, Words v) {
  __builtin_nontemporal_store(Vector4{v.word[0], v.word[1], v.word[2], v.word[3]}, reinterpret_cast<Vector4*>(p));
}
GEMMA_NORM_DEVICE Words load(const Words* p) { return words(*reinterpret_cast<const Vector4*>(p)); }

GEMMA_NORM_DEVICE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
GEMMA_NORM_DEVICE float sqrt(float v) { return __builtin_sqrtf(v); }

template <class T>
GEMMA_NORM_DEVICE void unpack(uint32_t word, float* f);
template <>
GEMMA_NORM_DEVICE void unpack<float>(uint32_t word, float* f) {
  f[0] = as_float(word);
}
template <>
GEMMA_NORM_DEVICE void unpack<bfloat16>(uint32_t word, float* f) {
  f[0] = as_float(word << 16);
  f[1] = as_float(word & 0xffff0000u);
}
template <>
GEMMA_NORM_DEVICE void unpack<float16>(uint32_t word, float* f) {
  f[0] = __builtin_bit_cast(_Float16, static_cast<uint16_t>(word));
  f[1] = __builtin_bit_cast(_Float16, static_cast<uint16_t>(word >> 16));
}

#if !defined(__gfx950__)
// To nearest even. A NaN would round to Inf, so it is made quiet instead, its payload cut.
GEMMA_NORM_DEVICE uint32_t bfloat16_bits(float f) {
  const uint32_t bits = as_bits(f);
  return f != f ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
#endif

template <class T>
GEMMA_NORM_DEVICE uint32_t pack(const float* f);
template <>
GEMMA_NORM_DEVICE uint32_t pack<float>(const float* f) {
  return as_bits(f[0]);
}
template <>
GEMMA_NORM_DEVICE uint32_t pack<bfloat16>(const float* f) {
#if defined(__gfx950__)
  using Float2 = float __attribute__((ext_vector_type(2)));
  using BFloat2 = __bf16 __attribute__((ext_vector_type(2)));
  return __builtin_bit_cast(uint32_t, __builtin_convertvector((Float2{f[0], f[1]}), BFloat2));  // v_cvt_pk_bf16_f32
#else
  return bfloat16_bits(f[0]) | bfloat16_bits(f[1]) << 16;
#endif
}
template <>
GEMMA_NORM_DEVICE uint32_t pack<float16>(const float* f) {
  const uint16_t low = __builtin_bit_cast(uint16_t, static_cast<_Float16>(f[0]));
  const uint16_t high = __builtin_bit_cast(uint16_t, static_cast<_Float16>(f[1]));
  return low | static_cast<uint32_t>(high) << 16;
}

template <class... Pointers>
GEMMA_NORM_DEVICE void wait_for_previous_kernel(Pointers...) {}
GEMMA_NORM_DEVICE void allow_next_kernel() {}

constexpr bool kHasClusters = false;

using Stream = hipStream_t;
using Error = hipError_t;
constexpr Error kSuccess = hipSuccess;
inline const char* error_text(Error e) { return hipGetErrorString(e); }

// Of the current device, asked for once.
inline Error facts(DeviceFacts* result, const void*) {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> known[kMaxDevices];  // 0: not yet; else the wave width
  int device;
  if (const Error e = hipGetDevice(&device)) return e;
  int width = device < kMaxDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (width == 0) {
    if (const Error e = hipDeviceGetAttribute(&width, hipDeviceAttributeWarpSize, device)) return e;
    if (device < kMaxDevices) known[device].store(width, std::memory_order_relaxed);
  }
  *result = {width, (int64_t{1} << 32) - 1, false, 1};
  return kSuccess;
}

template <class... Args>
Error launch(void (*kernel)(Args...), int64_t blocks, const LaunchPlan& plan, Stream stream, const DeviceFacts&, Args... args) {
  void* pointers[] = {&args...};
  return hipLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                         dim3(static_cast<unsigned>(plan.block_threads)), pointers, 0, stream);
}

}  // namespace gemma_norm::device

#include "no_clusters.h"
