// NVIDIA. See platform.h for what each name promises.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "facts.h"
#include "types.h"

#define GEMMA_NORM_DEVICE __device__ __forceinline__
#if __CUDA_ARCH__ == 750  // its multiprocessors hold at most 1024 threads
#define GEMMA_NORM_KERNEL(max_threads, min_blocks) \
  __global__ void __launch_bounds__(max_threads,   \
                                    (min_blocks) * (max_threads) > 1024 ? 1024 / (max_threads) : (min_blocks))
#else
#define GEMMA_NORM_KERNEL(max_threads, min_blocks) __global__ void __launch_bounds__(max_threads, min_blocks)
#endif

namespace gemma_norm::device {

GEMMA_NORM_DEVICE int thread_index() { return threadIdx.x; }
GEMMA_NORM_DEVICE uint32_t block_index() { return blockIdx.x; }
GEMMA_NORM_DEVICE constexpr int wave_width() { return 32; }
GEMMA_NORM_DEVICE void block_barrier() { __syncthreads(); }

template <class T>
GEMMA_NORM_DEVICE T& shared_memory() {
  __shared__ T memory;
  return memory;
}

GEMMA_NORM_DEVICE float value_of_lane(int distance, float v) { return __shfl_xor_sync(0xffffffffu, v, distance); }

constexpr bool kSwapsInRegisters = true;
GEMMA_NORM_DEVICE float value_in_group(int k, float v, int lanes) { return __shfl_sync(0xffffffffu, v, k, lanes); }

GEMMA_NORM_DEVICE void wave_barrier() { __syncwarp(); }

GEMMA_NORM_DEVICE float sum_over_lanes(float v, int lanes) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2)
    if (step < lanes) v += value_of_lane(step, v);
  return v;
}

GEMMA_NORM_DEVICE Vector16 vector16(uint4 v) { return {v.x, v.y, v.z, v.w}; }
// Not a read-only load (ld.global.nc): if launches overlap, the previous kernel may still write this memory.
GEMMA_NORM_DEVICE Vector16 load(const Vector16* p) { return vector16(*reinterpret_cast<const uint4*>(p)); }
// Evict-first loads and stores were slower, above all in place (docs/tuning-log.md, T10 to T13 and T41).
GEMMA_NORM_DEVICE Vector16 load_once(const Vector16* p) { return load(p); }
GEMMA_NORM_DEVICE void store_once(Vector16* p, Vector16 v) {
  *reinterpret_cast<uint4*>(p) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}
GEMMA_NORM_DEVICE Vector8 load(const Vector8* p) {
  const uint2 v = *reinterpret_cast<const uint2*>(p);
  return {v.x, v.y};
}
GEMMA_NORM_DEVICE Vector8 load_once(const Vector8* p) { return load(p); }
GEMMA_NORM_DEVICE void store_once(Vector8* p, Vector8 v) {
  *reinterpret_cast<uint2*>(p) = make_uint2(v.word[0], v.word[1]);
}
// From L2: this multiprocessor's own cache may still hold what was there before the kernel that wrote it.
GEMMA_NORM_DEVICE Vector16 load_early(const Vector16* p) { return vector16(__ldcg(reinterpret_cast<const uint4*>(p))); }
GEMMA_NORM_DEVICE Vector8 load_early(const Vector8* p) {
  const uint2 v = __ldcg(reinterpret_cast<const uint2*>(p));
  return {v.x, v.y};
}
constexpr bool kPrefetches = true;
GEMMA_NORM_DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
constexpr bool kLoadsBeforeStores = false;
GEMMA_NORM_DEVICE void wait_for_load(const Vector16&) {}
GEMMA_NORM_DEVICE void keep_packed(Vector16*) {}
GEMMA_NORM_DEVICE void leave_unset(Vector16*) {}

GEMMA_NORM_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
GEMMA_NORM_DEVICE uint32_t as_bits(float f) { return __float_as_uint(f); }
GEMMA_NORM_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
GEMMA_NORM_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
GEMMA_NORM_DEVICE float clamp(float v, float low, float high) { return fminf(fmaxf(v, low), high); }
GEMMA_NORM_DEVICE float approximate_reciprocal(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
GEMMA_NORM_DEVICE float approximate_rsqrt(float v) {
  float r;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
GEMMA_NORM_DEVICE bool in_all_lanes(bool condition) { return condition; }
GEMMA_NORM_DEVICE bool any_lane(bool condition) { return __any_sync(0xffffffffu, condition) != 0; }

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
  const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word));
  f[0] = pair.x;
  f[1] = pair.y;
}

GEMMA_NORM_DEVICE float keep_nan(float v) { return v; }
template <class T>
GEMMA_NORM_DEVICE uint32_t pack(const float* f);
template <>
GEMMA_NORM_DEVICE uint32_t pack<float>(const float* f) {
  return as_bits(f[0]);
}
template <>
GEMMA_NORM_DEVICE uint32_t pack<bfloat16>(const float* f) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(f[0], f[1]);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
GEMMA_NORM_DEVICE uint32_t pack<float16>(const float* f) {
  const __half2 pair = __floats2half2_rn(f[0], f[1]);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <class T>
GEMMA_NORM_DEVICE uint32_t multiply_pairs(uint32_t a, uint32_t b);
template <>
GEMMA_NORM_DEVICE uint32_t multiply_pairs<bfloat16>(uint32_t a, uint32_t b) {
  const __nv_bfloat162 v =
      __hmul2_rn(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
  return reinterpret_cast<const uint32_t&>(v);
}
template <>
GEMMA_NORM_DEVICE uint32_t multiply_pairs<float16>(uint32_t a, uint32_t b) {
  const __half2 v = __hmul2_rn(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
  return reinterpret_cast<const uint32_t&>(v);
}
template <class T>
GEMMA_NORM_DEVICE uint32_t add_pairs(uint32_t a, uint32_t b);
template <>
GEMMA_NORM_DEVICE uint32_t add_pairs<bfloat16>(uint32_t a, uint32_t b) {
  const __nv_bfloat162 v =
      __hadd2_rn(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
  return reinterpret_cast<const uint32_t&>(v);
}
template <>
GEMMA_NORM_DEVICE uint32_t add_pairs<float16>(uint32_t a, uint32_t b) {
  const __half2 v = __hadd2_rn(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
  return reinterpret_cast<const uint32_t&>(v);
}

template <class... Values>
GEMMA_NORM_DEVICE void need_together(Values...) {}

// A kernel waits before it reads anything, even the weight: the previous kernel may be an optimiser that updates it.
template <class... Pointers>
GEMMA_NORM_DEVICE void wait_for_previous_kernel(Pointers... needed) {
#if __CUDA_ARCH__ >= 900
  // The branch is never taken. It makes the compiler compute the addresses before the wait instead of after it.
  asm volatile("{\n .reg .pred p;\n setp.eq.u64 p, %0, 0;\n @p trap;\n griddepcontrol.wait;\n}" ::"l"(
                   (reinterpret_cast<uint64_t>(needed) | ...))
               : "memory");
#endif
}
GEMMA_NORM_DEVICE void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Blocks send their numbers with st.async, and the receiving inbox's mbarrier counts them. The cluster's own barrier is
// used only in its relaxed form, because its release form also makes writes to global memory visible to the whole GPU,
// which takes a microsecond.
constexpr bool kHasClusters = true;
// For any other target, facts() reports no clusters.
#if !defined(__CUDA_ARCH__) || (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1100)
constexpr bool kTargetHasClusters = true;
#else
constexpr bool kTargetHasClusters = false;
#endif
GEMMA_NORM_DEVICE uint32_t cluster_index() {
  uint32_t index;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
  return index;
}
GEMMA_NORM_DEVICE int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
GEMMA_NORM_DEVICE int cluster_blocks() {
  int blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
}
GEMMA_NORM_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
struct Inbox {
  uint64_t barrier;
};
GEMMA_NORM_DEVICE int number_bytes(int numbers) { return cluster_blocks() * numbers * static_cast<int>(sizeof(float)); }
GEMMA_NORM_DEVICE void open_inbox(Inbox* inbox, int numbers) {
  if (threadIdx.x == 0)
    asm volatile(
        "mbarrier.init.shared::cta.b64 [%0], 1;\n fence.mbarrier_init.release.cluster;\n"
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(inbox)),
        "r"(number_bytes(numbers))
        : "memory");
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
GEMMA_NORM_DEVICE void wait_for_inboxes() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
GEMMA_NORM_DEVICE void send(float* number, Inbox* inbox, int rank, float v) {
  asm volatile(
      "{\n .reg .u32 to, counter;\n mapa.shared::cluster.u32 to, %0, %2;\n mapa.shared::cluster.u32 counter, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [to], %3, [counter];\n}" ::"r"(shared_address(number)),
      "r"(shared_address(inbox)), "r"(rank), "r"(__float_as_uint(v))
      : "memory");
}
// Each exchange is a phase of the mbarrier. Numbers of the next exchange may arrive before expect_numbers() announces
// them; they are counted as well.
GEMMA_NORM_DEVICE void wait_for_numbers(Inbox* inbox, int exchange) {
  asm volatile(
      "{\n .reg .pred done;\n again:\n mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(shared_address(inbox)),
      "r"(exchange % 2)
      : "memory");
}
GEMMA_NORM_DEVICE void expect_numbers(Inbox* inbox, int numbers) {
  if (threadIdx.x == 0)
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(inbox)),
                 "r"(number_bytes(numbers))
                 : "memory");
}

using Stream = cudaStream_t;
using Error = cudaError_t;
constexpr Error kSuccess = cudaSuccess;
inline const char* error_text(Error e) {
  if (e != cudaErrorNoKernelImageForDevice) return cudaGetErrorString(e);
  return "this library has no code for this GPU: gemma_norm.libraries() names both, TORCH_CUDA_ARCH_LIST is what to "
         "build for";
}

// The facts of the current device, queried once for each device. `kernel` may be any kernel of this library.
static Error facts(DeviceFacts* result, const void* kernel) {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> known[kMaxDevices];  // 0: not yet; else 1 + overlap_launch + 2 * clusters + 4 * processors
  int device;
  if (const Error e = cudaGetDevice(&device)) return e;
  int state = device < kMaxDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (state == 0) {
    int major, processors;
    cudaFuncAttributes attributes;
    if (const Error e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return e;
    if (const Error e = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return e;
    if (const Error e = cudaFuncGetAttributes(&attributes, kernel)) return e;
    // Code compiled for a target below sm_90 contains no wait, even if the driver translated its PTX for a newer GPU.
    const bool has_sm90_code = major >= 9 && attributes.ptxVersion >= 90;
    int cluster = 1;
    if (has_sm90_code && major <= 10) {  // a slice of a GPU (MIG) may have too few neighbouring multiprocessors
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(kMaxCluster);
      config.blockDim = dim3(32);
      if (const Error e = cudaOccupancyMaxPotentialClusterSize(&cluster, kernel, &config)) return e;
    }
    state = 1 + has_sm90_code + 2 * (cluster >= kMaxCluster) + 4 * processors;
    if (device < kMaxDevices) known[device].store(state, std::memory_order_relaxed);
  }
  *result = {32, int64_t{1} << 42, (state - 1 & 1) != 0, (state - 1 & 2) != 0 ? kMaxCluster : 1, state - 1 >> 2};
  return kSuccess;
}

template <class... Args>
Error launch(void (*kernel)(Args...), const Grid& grid, Stream stream, const DeviceFacts& device, Args... args) {
  cudaLaunchAttribute attributes[2];
  int count = 0;
  if (device.overlap_launch) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (grid.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.groups * grid.cluster));
  config.blockDim = dim3(static_cast<unsigned>(grid.block_threads));
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace gemma_norm::device

#include "quantize_by_hand.h"
#include "reciprocal_root.h"
#include "scalar.h"

namespace gemma_norm::device {

using Arithmetic = Scalar;

GEMMA_NORM_DEVICE uint32_t max_over_lanes(uint32_t v, int lanes) {
#if __CUDA_ARCH__ >= 800
  if (lanes == 32) return __reduce_max_sync(0xffffffffu, v);
#endif
  return max_by_swaps(v, lanes);
}
GEMMA_NORM_DEVICE void max_in_block(uint32_t* p, uint32_t v) { atomicMax(p, v); }
GEMMA_NORM_DEVICE float max_magnitude(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float largest;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(largest) : "f"(fabsf(a)), "f"(fabsf(b)));
  return largest;
#else
  return max_magnitude_by_bits(a, b);
#endif
}

GEMMA_NORM_DEVICE uint32_t quantize(const float (&f)[4], const QuantizedFormat& format) {
#if __CUDA_ARCH__ >= 890
  const auto pack = [](uint16_t low, uint16_t high) { return low | static_cast<uint32_t>(high) << 16; };
  const auto e4m3 = [](float low, float high) {
    uint16_t two;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(two) : "f"(high), "f"(low));
    return two;
  };
  if (format.dtype == DType::kFloat8E4M3FN) return pack(e4m3(f[0], f[1]), e4m3(f[2], f[3]));
  if (format.dtype == DType::kFloat8E5M2) {
    uint16_t low, high;
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(low) : "f"(f[1]), "f"(f[0]));
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(high) : "f"(f[3]), "f"(f[2]));
    return pack(low, high);
  }
  if (format.dtype == DType::kFloat8E4M3FNUZ) {
    // The bits of a number in this format are those of its double in e4m3fn, but for what is beyond e4m3fn's largest,
    // for NaN and for -0.
    uint32_t word = pack(e4m3(2 * f[0], 2 * f[1]), e4m3(2 * f[2], 2 * f[3]));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t byte = word >> 8 * i & 0xffu;
      if (fabsf(f[i]) > 232.0f) word |= 1u << 8 * i;
      if (f[i] != f[i])
        word = (word & ~(0xffu << 8 * i)) | 0x80u << 8 * i;
      else if (byte == 0x80u)
        word &= ~(0xffu << 8 * i);
    }
    return word;
  }
  // The first instruction makes 0 of a NaN and limits what is too large, the second limits again.
  const auto int32 = [](float v) {
    int32_t number;
    asm("cvt.rni.s32.f32 %0, %1;" : "=r"(number) : "f"(v));
    return number;
  };
  const auto int8 = [&](float low, float high, uint32_t above) {
    uint32_t word;
    asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(int32(high)), "r"(int32(low)), "r"(above));
    return word;
  };
  return int8(f[0], f[1], int8(f[2], f[3], 0));
#else
  return quantize_by_hand(f, format);
#endif
}

template <bool kQuick>
GEMMA_NORM_DEVICE float reciprocal_root(float v) {
  if constexpr (kQuick) return newton_reciprocal_root(v);
  return 1.0f / __fsqrt_rn(v);  // contains calls for rare values, so the compiler moves nothing across it
}

}  // namespace gemma_norm::device
