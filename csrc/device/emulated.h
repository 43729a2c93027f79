// A GPU emulated on the host, for tests. Each thread of a block is a fiber. The blocks run one after another, except
// that those of a cluster take turns. See platform.h for what each name promises. tests/cpp/emulated_machine.cpp runs
// the fibers. No shipped library contains any of this.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#include "facts.h"
#include "types.h"

#define GEMMA_NORM_DEVICE inline
#define GEMMA_NORM_KERNEL(max_threads, min_blocks) void

namespace gemma_norm::device {

// The place of the running fiber in its grid.
struct Here {
  int thread, block_threads, wave_width;
  uint32_t block;
  int cluster_rank, cluster_blocks;
  bool waited_for_previous_kernel;
};
extern Here here;

// Each returns once all threads of the block, or all lanes of the wave, have called it. If that cannot happen, the
// launch fails.
void block_barrier();
float value_of_lane(int distance, float v);

// A barrier for all threads of a cluster: each arrives, then waits until all have arrived.
void cluster_arrive();
void cluster_wait();
void store_in_block(float* shared, int rank, float v);

constexpr bool kHasClusters = true, kTargetHasClusters = true;
inline uint32_t cluster_index() { return here.block / here.cluster_blocks; }
inline int cluster_rank() { return here.cluster_rank; }
inline int cluster_blocks() { return here.cluster_blocks; }
struct Inbox {};
inline void open_inbox(Inbox*, int) { cluster_arrive(); }
inline void wait_for_inboxes() { cluster_wait(); }
inline void send(float* number, Inbox*, int rank, float v) { store_in_block(number, rank, v); }
inline void wait_for_numbers(Inbox*, int) {
  cluster_arrive();
  cluster_wait();
}
inline void expect_numbers(Inbox*, int) {}

// One block runs at a time, so a variable in shared memory is a global variable here. Each is registered before any
// kernel runs. Before each block the machine fills those that an earlier one has used with garbage, and it keeps a copy
// for each block of a cluster. There are hundreds of variables, of which a kernel uses a few, hence `used`.
void add_shared_variable(void* data, size_t size, bool* used);
template <class T>
struct SharedMemory {
  bool used = true;
  T memory;  // last, so that AddressSanitizer sees what is written beyond it
  SharedMemory() { add_shared_variable(&memory, sizeof memory, &used); }
};
template <class T>
inline SharedMemory<T> shared;
template <class T>
T& shared_memory() {
  shared<T>.used = true;
  return shared<T>.memory;
}

// Ends the launch with an error and does not return. (It is not declared [[noreturn]], because AddressSanitizer
// mishandles calls of such functions on a fiber's stack.)
void fail(const char* what);

inline void wave_barrier() { value_of_lane(0, 0); }

inline int thread_index() { return here.thread; }
inline uint32_t block_index() { return here.block; }
inline int wave_width() { return here.wave_width; }

constexpr bool kSwapsInRegisters = true;
inline float value_in_group(int k, float v, int lanes) {
  for (int distance = 1; distance < lanes; distance *= 2) {
    const float other = value_of_lane(distance, v);
    if ((thread_index() ^ k) & distance) v = other;
  }
  return v;
}
inline float sum_over_lanes(float v, int lanes) {
  for (int distance = 1; distance < lanes; distance *= 2) v += value_of_lane(distance, v);
  return v;
}

template <class... Values>
void need_together(Values...) {}
template <class... Pointers>
void wait_for_previous_kernel(Pointers...) {
  here.waited_for_previous_kernel = true;
}
inline void allow_next_kernel() {}

template <class Vector>
void check_alignment(const Vector* p) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(Vector))
    fail("an access to a vector at an address that is no multiple of its size");
}
template <class Vector>
void check_access(const Vector* p) {
  check_alignment(p);
  if (!here.waited_for_previous_kernel) fail("an access to memory before wait_for_previous_kernel");
}
template <class Vector>
Vector load(const Vector* p) {
  check_access(p);
  return *p;
}
template <class Vector>
Vector load_early(const Vector* p) {
  check_alignment(p);
  return *p;
}
template <class Vector>
Vector load_once(const Vector* p) {
  return load(p);
}
template <class Vector>
void store_once(Vector* p, Vector v) {
  check_access(p);
  *p = v;
}
constexpr bool kPrefetches = true;
inline void prefetch(const void*) {}
constexpr bool kLoadsBeforeStores = false;
inline void wait_for_load(const Vector16&) {}
inline void keep_packed(Vector16*) {}
inline void leave_unset(Vector16* v) { *v = {}; }

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float as_float(uint32_t bits) { return bit_cast<float>(bits); }
inline uint32_t as_bits(float f) { return bit_cast<uint32_t>(f); }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float add(float a, float b) { return a + b; }  // built with -ffp-contract=off
inline float clamp(float v, float low, float high) { return std::fmin(std::fmax(v, low), high); }
// The approximations are as inexact as the device layer allows, so that the steps that refine them are tested.
inline float approximate_reciprocal(float v) { return as_float(as_bits(1 / v) + as_bits(v) % 3 - 1); }
inline float approximate_rsqrt(float v) {
  const float exact = static_cast<float>(1 / std::sqrt(static_cast<double>(v)));
  return v > 0 && exact > 0 ? as_float(as_bits(exact) + as_bits(v) % 7 - 3) : exact;
}
inline bool in_all_lanes(bool condition) { return condition; }
inline bool any_lane(bool condition) { return sum_over_lanes(condition ? 1.0f : 0.0f, wave_width()) > 0.0f; }

inline float float16_value(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Read as a float, these bits are 2^112 times too small. The product is exact, for subnormals too.
  return as_float(sign | as_bits(as_float(magnitude << 13) * 0x1p112f));
}

// Rounds to nearest even. A NaN stays a NaN and becomes quiet.
inline uint32_t float16_bits(float f) {
  const uint32_t bits = as_bits(f), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u | (magnitude >> 13 & 0x3ffu);
  if (magnitude >= 0x47800000u) return sign | 0x7c00u;  // 65536 and more become infinite
  // Below float16's normal range: the last bit of 0.5f is worth float16's smallest number, so adding 0.5f rounds to a
  // multiple of that.
  if (magnitude < 0x38800000u) return sign | (as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f));
  return sign | ((magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
}
inline uint32_t bfloat16_bits(float f) {
  const uint32_t bits = as_bits(f);
  return f != f ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

template <class T>
void unpack(uint32_t word, float* f) {
  if constexpr (sizeof(T) == 4) {
    f[0] = as_float(word);
  } else if constexpr (std::is_same_v<T, float16>) {
    f[0] = float16_value(word & 0xffffu);
    f[1] = float16_value(word >> 16);
  } else {
    f[0] = as_float(word << 16);
    f[1] = as_float(word & 0xffff0000u);
  }
}
inline float keep_nan(float v) { return v; }
template <class T>
uint32_t pack(const float* f) {
  if constexpr (sizeof(T) == 4)
    return as_bits(f[0]);
  else if constexpr (std::is_same_v<T, float16>)
    return float16_bits(f[0]) | float16_bits(f[1]) << 16;
  else
    return bfloat16_bits(f[0]) | bfloat16_bits(f[1]) << 16;
}

struct Stream {};
using Error = const char*;  // the message, or null
constexpr Error kSuccess = nullptr;
inline const char* error_text(Error e) { return e; }

Error facts(DeviceFacts* result, const void* kernel);
// `blocks` counts all blocks of the grid; `cluster` is how many form a cluster, 1 without clusters.
Error run_grid(const void* kernel, int64_t blocks, int threads, int cluster, const std::function<void()>& thread);

template <class... Args>
Error launch(void (*kernel)(Args...), const Grid& grid, Stream, const DeviceFacts&, Args... args) {
  return run_grid(reinterpret_cast<const void*>(kernel), grid.groups * grid.cluster, grid.block_threads, grid.cluster,
                  [&] { kernel(args...); });
}

}  // namespace gemma_norm::device

#include "pairs.h"
#include "quantize_by_hand.h"
#include "reciprocal_root.h"
#include "scalar.h"

namespace gemma_norm::device {

using Arithmetic = Scalar;

inline uint32_t max_over_lanes(uint32_t v, int lanes) { return max_by_swaps(v, lanes); }
inline void max_in_block(uint32_t* p, uint32_t v) { *p = *p < v ? v : *p; }
inline float max_magnitude(float a, float b) { return max_magnitude_by_bits(a, b); }
inline uint32_t quantize(const float (&f)[4], const QuantizedFormat& format) { return quantize_by_hand(f, format); }

template <bool kQuick>
float reciprocal_root(float v) {
  return newton_reciprocal_root(v);
}

}  // namespace gemma_norm::device
