// AMD: CDNA (wave 64) and RDNA (wave 32). See platform.h for what each name promises.
#pragma once

#include <hip/hip_runtime.h>

#include <atomic>
#include <cstdint>

#include "facts.h"
#include "types.h"

#define GEMMA_NORM_DEVICE __device__ __forceinline__
// At least two waves fit on a SIMD, so a thread has at most 256 registers. tests/amdgpu asserts how many waves fit.
#define GEMMA_NORM_KERNEL(max_threads, min_blocks) __global__ void __launch_bounds__(max_threads, 2)

namespace gemma_norm::device {

GEMMA_NORM_DEVICE int thread_index() { return threadIdx.x; }
GEMMA_NORM_DEVICE uint32_t block_index() { return blockIdx.x; }
// Waves exchange data only through LDS, so this barrier waits only for LDS accesses. __syncthreads() would also wait
// for the wave's own stores to global memory, with clang 15 on gfx90a and with newer versions on RDNA.
GEMMA_NORM_DEVICE void block_barrier() {
#if defined(__GFX9__) || defined(__GFX10__) || defined(__GFX11__)
  asm volatile("s_waitcnt lgkmcnt(0)\n\ts_barrier" ::: "memory");
#elif defined(__GFX12__)
  asm volatile("s_wait_dscnt 0x0\n\ts_barrier_signal -1\n\ts_barrier_wait -1" ::: "memory");
#else  // what __syncthreads() does; in ROCm 5's headers that is a call, which newer compilers do not inline
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
#endif
}

template <class T>
GEMMA_NORM_DEVICE T& shared_memory() {
  __shared__ T memory;
  return memory;
}

// The wave width of the target being compiled for; ROCm 7 has no macro or constant for it any more. The host asks the
// device instead (see facts()).
#if defined(__GFX9__)
GEMMA_NORM_DEVICE constexpr int wave_width() { return 64; }
#else
GEMMA_NORM_DEVICE constexpr int wave_width() { return 32; }
#endif
// On wave 64, true only if the condition is true in every lane, so that the branch is uniform. In a divergent branch,
// compilers keep the values loaded on its two sides in separate registers.
GEMMA_NORM_DEVICE bool in_all_lanes(bool condition) { return wave_width() == 64 ? __all(condition) != 0 : condition; }
GEMMA_NORM_DEVICE bool any_lane(bool condition) { return __any(condition) != 0; }

GEMMA_NORM_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
GEMMA_NORM_DEVICE uint32_t as_bits(float f) { return __float_as_uint(f); }

// Lanes exchange values through the data-parallel primitives (DPP) of vector instructions, which need no LDS access and
// no wait.
template <int Control>
GEMMA_NORM_DEVICE float dpp(float v) {
  return as_float(__builtin_amdgcn_update_dpp(0, as_bits(v), Control, 0xf, 0xf, true));
}
constexpr int kSwapNeighbours = 0xB1, kSwapPairs = 0x4E, kMirrorHalfRow = 0x141,
              kMirrorRow = 0x140;  // a row is 16 lanes

GEMMA_NORM_DEVICE float lane_value(float v, int lane) { return as_float(__builtin_amdgcn_readlane(as_bits(v), lane)); }

// combine(a, b) of all lanes of a group, as the tree of sum_over_lanes.
template <class Combine>
GEMMA_NORM_DEVICE float over_lanes(float v, int lanes, const Combine& combine) {
  // Before each step, all lanes of a half-group hold the same value, so mirroring the group swaps its halves.
  if (lanes > 1) v = combine(v, dpp<kSwapNeighbours>(v));
  if (lanes > 2) v = combine(v, dpp<kSwapPairs>(v));
  if (lanes > 4) v = combine(v, dpp<kMirrorHalfRow>(v));
  if (lanes > 8) v = combine(v, dpp<kMirrorRow>(v));
#if defined(__GFX9__)
  if (lanes > 16) {
    const float low = combine(lane_value(v, 0), lane_value(v, 16));
    const float high = combine(lane_value(v, 32), lane_value(v, 48));
    v = lanes > 32 ? combine(low, high) : threadIdx.x & 32 ? high : low;
  }
#else
  if (lanes > 16)
    v = combine(v, as_float(__builtin_amdgcn_permlanex16(0, as_bits(v), 0x76543210, 0xfedcba98, true, false)));
#endif
  return v;
}
GEMMA_NORM_DEVICE float sum_over_lanes(float v, int lanes) {
  return over_lanes(v, lanes, [](float a, float b) { return a + b; });
}
GEMMA_NORM_DEVICE uint32_t max_over_lanes(uint32_t v, int lanes) {
  return as_bits(over_lanes(as_float(v), lanes, [](float a, float b) { return as_bits(a) > as_bits(b) ? a : b; }));
}

GEMMA_NORM_DEVICE float value_of_lane(int distance, float v) {
  const int lane = (static_cast<int>(threadIdx.x) ^ distance) & (wave_width() - 1);
  return as_float(__builtin_amdgcn_ds_bpermute(lane * 4, as_bits(v)));
}

constexpr bool kSwapsInRegisters = false;
GEMMA_NORM_DEVICE float value_in_group(int k, float v, int lanes) {
  if (lanes == 1) return v;  // the compiler does not know that the swap below would change nothing
  const int lane = ((static_cast<int>(threadIdx.x) & -lanes) | (k & (lanes - 1))) & (wave_width() - 1);
  return as_float(__builtin_amdgcn_ds_bpermute(lane * 4, as_bits(v)));
}

// The lanes of a wave run together, so only the compiler must keep the order.
GEMMA_NORM_DEVICE void wave_barrier() {
  asm volatile("" ::: "memory");
  __builtin_amdgcn_wave_barrier();
}

using Float2 = float __attribute__((ext_vector_type(2)));  // CDNA computes two floats at once
using UInt2 = uint32_t __attribute__((ext_vector_type(2)));
using Vector4 = uint32_t __attribute__((ext_vector_type(4)));
// Pointers to global memory. Compilers do not always infer that, and then make flat accesses, which may go to LDS and
// are slower.
using GlobalVector4 = Vector4 __attribute__((address_space(1)));
using GlobalUInt2 = UInt2 __attribute__((address_space(1)));
GEMMA_NORM_DEVICE Vector16 vector16(Vector4 v) { return {v.x, v.y, v.z, v.w}; }
GEMMA_NORM_DEVICE Vector16 load(const Vector16* p) { return vector16(*(const GlobalVector4*)p); }
GEMMA_NORM_DEVICE Vector16 load_once(const Vector16* p) {
  return vector16(__builtin_nontemporal_load((const GlobalVector4*)p));
}
GEMMA_NORM_DEVICE void store_once(Vector16* p, Vector16 v) {
  __builtin_nontemporal_store(Vector4{v.word[0], v.word[1], v.word[2], v.word[3]}, (GlobalVector4*)p);
}
GEMMA_NORM_DEVICE Vector8 vector8(UInt2 v) { return {v.x, v.y}; }
GEMMA_NORM_DEVICE Vector8 load(const Vector8* p) { return vector8(*(const GlobalUInt2*)p); }
GEMMA_NORM_DEVICE Vector8 load_once(const Vector8* p) {
  return vector8(__builtin_nontemporal_load((const GlobalUInt2*)p));
}
GEMMA_NORM_DEVICE void store_once(Vector8* p, Vector8 v) {
  __builtin_nontemporal_store(UInt2{v.word[0], v.word[1]}, (GlobalUInt2*)p);
}
template <class Vector>
GEMMA_NORM_DEVICE Vector load_early(const Vector* p) {  // kernels do not overlap
  return load(p);
}
constexpr bool kPrefetches = false;  // only gfx12 has an instruction for it
GEMMA_NORM_DEVICE void prefetch(const void*) {}
// CDNA counts outstanding loads and stores in one counter. After a branch around a store, compilers do not know how
// many accesses followed the load that they must wait for, so they wait for all, the store included. RDNA has a counter
// for each, and the order makes no difference; but on gfx1250, clang 22 would need 50 more registers to load first.
#if defined(__gfx1250__) || defined(__gfx1251__)
constexpr bool kLoadsBeforeStores = false;
#else
constexpr bool kLoadsBeforeStores = true;
#endif
// Neither emits an instruction. wait_for_load only reads one word, because reading and writing all four would take
// registers.
GEMMA_NORM_DEVICE void wait_for_load(const Vector16& v) { asm volatile("" ::"v"(v.word[0])); }
GEMMA_NORM_DEVICE void keep_packed(Vector16* v) {
  asm volatile("" : "+v"(v->word[0]), "+v"(v->word[1]), "+v"(v->word[2]), "+v"(v->word[3]));
}
GEMMA_NORM_DEVICE void leave_unset(Vector16*) {}

GEMMA_NORM_DEVICE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
GEMMA_NORM_DEVICE float add(float a, float b) { return a + b; }  // built with -ffp-contract=off
GEMMA_NORM_DEVICE float clamp(float v, float low, float high) { return __builtin_amdgcn_fmed3f(v, low, high); }
GEMMA_NORM_DEVICE float approximate_reciprocal(float v) { return __builtin_amdgcn_rcpf(v); }
GEMMA_NORM_DEVICE float approximate_rsqrt(float v) { return __builtin_amdgcn_rsqf(v); }

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

template <class T>
GEMMA_NORM_DEVICE uint32_t pack(const float* f);
template <>
GEMMA_NORM_DEVICE uint32_t pack<float>(const float* f) {
  return as_bits(f[0]);
}
#if defined(__gfx950__) || defined(__gfx1250__) || defined(__gfx1251__)
GEMMA_NORM_DEVICE float keep_nan(float v) { return v; }
template <>
GEMMA_NORM_DEVICE uint32_t pack<bfloat16>(const float* f) {
  const Float2 value = {f[0], f[1]};
  return __builtin_bit_cast(uint32_t, __builtin_convertvector(value, __bf16 __attribute__((ext_vector_type(2)))));
}
#else
GEMMA_NORM_DEVICE float keep_nan(float v) { return v == v ? v : as_float(0x7fc00000u); }
template <>
GEMMA_NORM_DEVICE uint32_t pack<bfloat16>(const float* f) {
  // Rounds to nearest even in the upper halves. A NaN whose lower half is not 0 could become Inf or zero.
  const UInt2 bits = {as_bits(f[0]), as_bits(f[1])}, rounded = bits + (bits >> 16 & 1u) + 0x7fffu;
  return __builtin_amdgcn_perm(rounded.y, rounded.x, 0x07060302u);
}
#endif
template <>
GEMMA_NORM_DEVICE uint32_t pack<float16>(const float* f) {
  Float2 value = {f[0], f[1]};
  // Keeps compilers from merging a product and its rounding into one v_fma_mixlo_f16. That instruction adds +0, so -0
  // would become +0.
  asm("" : "+v"(value));
  return __builtin_bit_cast(uint32_t, __builtin_convertvector(value, _Float16 __attribute__((ext_vector_type(2)))));
}

// Emits no instruction. An argument of a kernel is in memory, and a compiler loads it in the branch that uses it,
// behind a wait of its own. Values that this takes are loaded before, and those of successive calls are waited for
// together.
template <class... Values>
GEMMA_NORM_DEVICE void need_together(Values... values) {
  const auto need = [](auto value) { asm volatile("" ::"s"(value)); };
  (need(values), ...);
}

template <class... Pointers>
GEMMA_NORM_DEVICE void wait_for_previous_kernel(Pointers...) {}
GEMMA_NORM_DEVICE void allow_next_kernel() {}

constexpr bool kHasClusters = false, kTargetHasClusters = false;

using Stream = hipStream_t;
using Error = hipError_t;
constexpr Error kSuccess = hipSuccess;
inline const char* error_text(Error e) {
  if (e != hipErrorNoBinaryForGpu && e != hipErrorInvalidDeviceFunction) return hipGetErrorString(e);
  return "this library has no code for this GPU: gemma_norm.libraries() names both, PYTORCH_ROCM_ARCH is what to build "
         "for";
}

// The facts of the current device, queried once for each device.
static Error facts(DeviceFacts* result, const void*) {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> known[kMaxDevices];  // 0: not yet; else the wave width + 128 * processors
  int device;
  if (const Error e = hipGetDevice(&device)) return e;
  int state = device < kMaxDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (state == 0) {
    int width, processors;
    if (const Error e = hipDeviceGetAttribute(&width, hipDeviceAttributeWarpSize, device)) return e;
    if (const Error e = hipDeviceGetAttribute(&processors, hipDeviceAttributeMultiprocessorCount, device)) return e;
    state = width + 128 * processors;
    if (device < kMaxDevices) known[device].store(state, std::memory_order_relaxed);
  }
  *result = {state % 128, (int64_t{1} << 32) - 1, false, 1, state / 128};
  return kSuccess;
}

template <class... Args>
Error launch(void (*kernel)(Args...), const Grid& grid, Stream stream, const DeviceFacts&, Args... args) {
  void* pointers[] = {&args...};
  return hipLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(grid.groups)),
                         dim3(static_cast<unsigned>(grid.block_threads)), pointers, 0, stream);
}

}  // namespace gemma_norm::device

#include "no_clusters.h"
#include "pairs.h"
#include "quantize_by_hand.h"
#include "reciprocal_root.h"
#include "scalar.h"

namespace gemma_norm::device {

// The arithmetic of two floats, which CDNA computes at once. Compilers do not find these pairs themselves: the clamp
// and the approximation are instructions on one float, and the operations between them are then on one float as well.
struct Pair {
  static constexpr int kCount = 2;
  static GEMMA_NORM_DEVICE Float2 load(const float* f) { return {f[0], f[1]}; }
  static GEMMA_NORM_DEVICE void store(Float2 v, float* f) { f[0] = v.x, f[1] = v.y; }

  static GEMMA_NORM_DEVICE Float2 all(float f) { return {f, f}; }
  static GEMMA_NORM_DEVICE Float2 fma(Float2 a, Float2 b, Float2 c) {
    return {device::fma(a.x, b.x, c.x), device::fma(a.y, b.y, c.y)};
  }
  static GEMMA_NORM_DEVICE Float2 clamp(Float2 g, float low, float high) {
    return {device::clamp(g.x, low, high), device::clamp(g.y, low, high)};
  }
  static GEMMA_NORM_DEVICE Float2 one_unless_nan(Float2 g) {
    return {Scalar::one_unless_nan(g.x), Scalar::one_unless_nan(g.y)};
  }
  static GEMMA_NORM_DEVICE Float2 power_of_two(Float2 n) {
    return {Scalar::power_of_two(n.x), Scalar::power_of_two(n.y)};
  }
  static GEMMA_NORM_DEVICE Float2 reciprocal(Float2 d) {
    return refine_reciprocal<Pair>(d, Float2{approximate_reciprocal(d.x), approximate_reciprocal(d.y)});
  }
};
using Arithmetic = Pair;

GEMMA_NORM_DEVICE void max_in_block(uint32_t* p, uint32_t v) { atomicMax(p, v); }
GEMMA_NORM_DEVICE float max_magnitude(float a, float b) { return max_magnitude_by_bits(a, b); }

// Four bytes. The conversion makes 0 of a NaN and limits numbers to those of 32 bits. It is assembly, because in C++
// both are undefined, so that a compiler may do anything.
GEMMA_NORM_DEVICE uint32_t quantize_to_int8(const float (&f)[4]) {
  uint32_t q[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int number;
    asm("v_cvt_i32_f32 %0, %1" : "=v"(number) : "v"(__builtin_rintf(f[i])));
    number = number > -128 ? number : -128;
    q[i] = static_cast<uint32_t>(number < 127 ? number : 127);
  }
  // The lowest byte of each; 0x0c stands for a byte of zeros.
  return __builtin_amdgcn_perm(q[1], q[0], 0x0c0c0400u) | __builtin_amdgcn_perm(q[3], q[2], 0x04000c0cu);
}

// gfx942's instructions round to the formats without a negative zero, later ones to the others.
GEMMA_NORM_DEVICE uint32_t quantize(const float (&f)[4], const QuantizedFormat& format) {
  if (format.dtype == DType::kInt8) return quantize_to_int8(f);
#if defined(__gfx940__) || defined(__gfx941__) || defined(__gfx942__)
  constexpr DType kE4M3 = DType::kFloat8E4M3FNUZ, kE5M2 = DType::kOther;
#elif defined(__gfx950__) || defined(__gfx1200__) || defined(__gfx1201__)
  constexpr DType kE4M3 = DType::kFloat8E4M3FN, kE5M2 = DType::kFloat8E5M2;
#endif
#if defined(__gfx940__) || defined(__gfx941__) || defined(__gfx942__) || defined(__gfx950__) || \
    defined(__gfx1200__) || defined(__gfx1201__)
  if (format.dtype == kE4M3 || format.dtype == kE5M2) {
    float g[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) g[i] = f[i] == f[i] ? clamp(f[i], -format.largest, format.largest) : f[i];
    if (format.dtype == kE4M3) {
      const int low = __builtin_amdgcn_cvt_pk_fp8_f32(g[0], g[1], 0, false);
      return __builtin_amdgcn_cvt_pk_fp8_f32(g[2], g[3], low, true);
    }
    const int low = __builtin_amdgcn_cvt_pk_bf8_f32(g[0], g[1], 0, false);
    return __builtin_amdgcn_cvt_pk_bf8_f32(g[2], g[3], low, true);
  }
#endif
  return quantize_by_hand(f, format);
}

template <bool kQuick>
GEMMA_NORM_DEVICE float reciprocal_root(float v) {
  return newton_reciprocal_root(v);
}

}  // namespace gemma_norm::device
