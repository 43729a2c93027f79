// The last part of kernels that quantise y: the scale of each group of elements, which needs the largest |y| of the
// group, and the rounding to 8 bits.
//
// The largest |y| of a vector is device::max_magnitude's. From there on it is found on the bits: those of positive
// floats are in the order of the numbers, and those of a NaN are greater than all others, so that a NaN reaches the
// scale. A maximum does not depend on the order in which it is found, so neither do the bits of the result.
#pragma once

#include "policies.cuh"
#include "reduce.cuh"

namespace gemma_norm::gpu {

struct GroupMaxima {
  uint32_t of_groups[kMaxGroups + 1];
};
struct WaveMaxima {
  uint32_t of_waves[kMaxWaves];
};

GEMMA_NORM_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// The maximum over the threads of a row. With kCluster, the exchange between the blocks is number `use`.
template <Scope kScope, int kUses>
GEMMA_NORM_DEVICE uint32_t max_over_row(uint32_t v, const Launch& launch, int row_lanes, int use) {
  if constexpr (kScope == Scope::kWave) return device::max_over_lanes(v, row_lanes);
  const int width = device::wave_width(), waves = launch.block_threads / width;
  const int lane = device::thread_index() % width;
  v = device::max_over_lanes(v, width);
  if (waves > 1) {
    auto& of_waves = device::shared_memory<WaveMaxima>().of_waves;
    if (lane == 0) of_waves[device::thread_index() / width] = v;
    device::block_barrier();
    const int i = lane % kMaxWaves;
    v = device::max_over_lanes(i < waves ? of_waves[i] : 0, kMaxWaves);
  }
  if constexpr (kScope == Scope::kCluster) {
    float of_row[1] = {device::as_float(v)};
    const auto& of_blocks = exchange_in_cluster<kUses>(of_row, use)[0];
    for (int i = 0; i < device::cluster_blocks(); ++i) v = larger(v, device::as_bits(of_blocks[i]));
  }
  return v;
}

template <int kCount>
GEMMA_NORM_DEVICE uint32_t largest_of(const float (&y)[kCount]) {
  static_assert(kCount >= 2, "of one element, max_magnitude would not be called");
  float largest = y[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) largest = device::max_magnitude(largest, y[i]);
  return device::as_bits(largest);
}

// The maxima of kCount numbers over an aligned group of lanes, at least kCount of them: each lane gets one, that of the
// number lane % kCount. In the first steps, two lanes share what they have: one goes on with the numbers of even index,
// the other with the others. By swaps between lanes, one maximum after the other takes up to kCount times as many.
// `lane` counts the lanes of the wave, or of the row, which is the same modulo `lanes`.
template <int kCount>
GEMMA_NORM_DEVICE uint32_t max_of_one(uint32_t (&v)[kCount], int lane, int lanes) {
  const auto with_other = [](uint32_t own, uint32_t other, int distance) {
    return larger(own, device::as_bits(device::value_of_lane(distance, device::as_float(other))));
  };
#pragma unroll
  for (int step = 1; step < kCount; step *= 2) {
    const bool odd = lane & step;
#pragma unroll
    for (int i = 0; i < kCount / (2 * step); ++i)
      v[i] = with_other(odd ? v[2 * i + 1] : v[2 * i], odd ? v[2 * i] : v[2 * i + 1], step);
  }
#pragma unroll
  for (int step = kCount; step < 32; step *= 2)
    if (step < lanes) v[0] = with_other(v[0], v[0], step);
  return v[0];
}

// The scales of a row, and its elements in 8 or 4 bits.
template <class V>
struct Quantizer {
  static constexpr int kCount = FinishOf<V>::kCount;
  const RowParams& p;
  const RowIndex& row;
  uint8_t* out;  // the row's element `start`, or in float4 what would be that if a byte had one
  float number;  // the scale that is given, or the bound; loaded together with the row

  // Not before wait_for_previous_kernel().
  GEMMA_NORM_DEVICE Quantizer(const RowParams& p, const RowIndex& row, uint8_t* out)
      : p(p), row(row), out(out), number(p.data[kScale] ? *static_cast<const float*>(p.data[kScale]) : 0.0f) {}

  // The scale is given.
  GEMMA_NORM_DEVICE bool is_static() const { return p.scale_group == 0; }
  GEMMA_NORM_DEVICE bool is_of_row() const { return p.scale_group == p.hidden; }

  // Stores the scale of a group, if this thread is to, and returns what its elements are multiplied by. kFloat32 says
  // that scales are float32. The others take several times as many instructions.
  template <bool kFloat32>
  GEMMA_NORM_DEVICE float inverse(uint32_t largest, int64_t group, bool stores) const {
    const DType dtype = kFloat32 ? DType::kFloat32 : p.scale_dtype;
    if (p.data[kScale]) largest = quantized::bounded(largest, number);
    // A division takes many instructions more. From the product with the rounded reciprocal, one step gives the rounded
    // quotient (Markstein 1990), unless the product is infinite.
    const auto divide = [](float v, const QuantizedFormat& f) {
      const float near = v * f.inverse_largest;
      const float quotient = device::fma(device::fma(-near, f.largest, v), f.inverse_largest, near);
      return device::as_bits(v) < 0x7f800000u ? quotient : near;
    };
    const float* const global = static_cast<const float*>(p.data[kGlobalScale]);
    const quantized::Scale scale =
        quantized::stored_scale(quantized::scale_of(largest, p.format, p.scale_ue8m0, divide), dtype, global);
    if (stores) {
      uint8_t* const scales =
          static_cast<uint8_t*>(p.data[kScaleOut]) + row.offset(p, kScaleOut) * quantized::scale_bytes(dtype);
      quantized::store_scale(scales, scale, dtype, group, p.scale_groups, p.scale_stride);
    }
    return scale.inverse;
  }
  GEMMA_NORM_DEVICE float inverse(uint32_t largest, int64_t group, bool stores) const {
    return __builtin_expect(p.scale_dtype == DType::kFloat32, 1) ? inverse<true>(largest, group, stores)
                                                                 : inverse<false>(largest, group, stores);
  }

  // Stores a vector whose first element has the index `first`, a multiple of kCount, in memory that is aligned to that.
  GEMMA_NORM_DEVICE void store(int first, const float (&y)[kCount], float inverse,
                               const QuantizedFormat& format) const {
    uint32_t words[kCount / 4];
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float q[4] = {y[i] * inverse, y[i + 1] * inverse, y[i + 2] * inverse, y[i + 3] * inverse};
      words[i / 4] = device::quantize(q, format);
    }
    if constexpr (kCount == 8)
      device::store_once(reinterpret_cast<Vector8*>(out + first), Vector8{words[0], words[1]});
    else
      *reinterpret_cast<uint32_t*>(out + first) = words[0];
  }
  // The same in float4; `start` is what `out` and `first` count from.
  GEMMA_NORM_DEVICE void store_float4(int start, int first, const float (&y)[kCount], float inverse) const {
    constexpr QuantizedFormat kFloat4 = format_of(DType::kFloat4E2M1FNx2);
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) word |= quantized::float_bits(y[i] * inverse, kFloat4) << 4 * i;
    if constexpr (kCount == 8)
      *reinterpret_cast<uint32_t*>(out - start / 2 + first / 2) = word;
    else
      *reinterpret_cast<uint16_t*>(out - start / 2 + first / 2) = static_cast<uint16_t>(word);
  }
};

// Of a kernel that does not quantise.
struct NoQuantizer {
  template <class Out>
  GEMMA_NORM_DEVICE NoQuantizer(const RowParams&, const RowIndex&, Out*) {}
};
template <class V>
using QuantizerOf = std::conditional_t<V::Form::kQuantizes, Quantizer<V>, NoQuantizer>;

// The groups of a row that a thread's vectors belong to. The vectors of a row are numbered: this thread's are `vector`,
// `vector` + slots, ... A group is a power of two of vectors. If the slots are a multiple of that, neighbouring lanes
// have a whole group. Otherwise, only launch.group_lanes of them surely have parts of one group, and the groups meet in
// shared memory.
template <Scope kScope>
struct Groups {
  const Launch& launch;
  const int vector;

  GEMMA_NORM_DEVICE int number(int k) const { return vector + k * launch.slots; }
  GEMMA_NORM_DEVICE int of(int k) const { return number(k) >> launch.log2_group_vectors; }
  // The place of vector k in its group.
  GEMMA_NORM_DEVICE int index(int k) const { return number(k) & ((1 << launch.log2_group_vectors) - 1); }
  GEMMA_NORM_DEVICE bool meet() const {
    return kScope == Scope::kBlock && launch.group_lanes < 1 << launch.log2_group_vectors;
  }

  // Before the row's sum is exchanged. That exchange has a barrier, unless the block is one wave.
  GEMMA_NORM_DEVICE void open() const {
    if (!meet()) return;
    auto& maxima = device::shared_memory<GroupMaxima>().of_groups;
    const int count = (launch.vectors * launch.slots >> launch.log2_group_vectors) + 1;
    for (int i = device::thread_index(); i < count; i += launch.block_threads) maxima[i] = 0;
    if (launch.block_threads == device::wave_width()) device::block_barrier();
  }

  // Replaces the largest bits of each vector by those of its group. `first(k) < end` says whether there is a vector.
  template <int kVectors, class First>
  GEMMA_NORM_DEVICE void exchange(uint32_t (&largest)[kVectors], const First& first, int end) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) largest[k] = device::max_over_lanes(largest[k], launch.group_lanes);
    if (!meet()) return;
    auto& maxima = device::shared_memory<GroupMaxima>().of_groups;
#pragma unroll
    for (int k = 0; k < kVectors; ++k)
      if (!(index(k) & (launch.group_lanes - 1)) && first(k) < end) device::max_in_block(&maxima[of(k)], largest[k]);
    device::block_barrier();
#pragma unroll
    for (int k = 0; k < kVectors; ++k)
      if (first(k) < end) largest[k] = maxima[of(k)];
  }

  // The largest bits of the group of vector `own`, which is this lane's index modulo kVectors. At least that many lanes
  // have parts of one group. A thread that has a part of the row has kVectors vectors then, so has_own says that.
  template <int kVectors>
  GEMMA_NORM_DEVICE uint32_t largest_of_one(uint32_t (&largest)[kVectors], int own, bool has_own) const {
    uint32_t v = max_of_one(largest, vector, launch.group_lanes);
    if (!meet()) return v;
    auto& maxima = device::shared_memory<GroupMaxima>().of_groups;
    if (has_own && (index(own) & (launch.group_lanes - 1)) < kVectors) device::max_in_block(&maxima[of(own)], v);
    device::block_barrier();
    return has_own ? maxima[of(own)] : 0;
  }
};

// Quantises rows of which a thread holds kVectors vectors of y. They are not y any more afterwards.
template <Scope kScope, int kUses, int kVectors, class V, class First>
GEMMA_NORM_DEVICE void quantize_held(const Quantizer<V>& quantizer, const Groups<kScope>& groups, int row_lanes,
                                     float (&y)[kVectors][FinishOf<V>::kCount], int start, const First& first,
                                     int end) {
  // What vectors are multiplied by: in each aligned group of `sharing` lanes, lane k has that of their vectors number
  // k. An array of all those numbers would take registers until the last vector is stored.
  float inverse = 1.0f;
  int sharing = 1;
  if (quantizer.is_static()) {
    inverse = 1.0f / quantizer.number;
  } else {
    uint32_t largest[kVectors], of_thread = 0;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const uint32_t of_vector = largest_of(y[k]);
      largest[k] = first(k) < end ? of_vector : 0;
      of_thread = larger(of_thread, largest[k]);
    }
    if (quantizer.is_of_row()) {
      const uint32_t of_row = max_over_row<kScope, kUses>(of_thread, groups.launch, row_lanes, kUses - 1);
      inverse = quantizer.inverse(of_row, 0, groups.vector == 0 && first(0) < end);
    } else if (device::kSwapsInRegisters && groups.launch.group_lanes >= kVectors) {
      // A scale takes many instructions, more than these swaps, so each lane finds that of one of its vectors.
      sharing = kVectors;
      const int own = groups.vector % kVectors;
      const bool has_own = first(own) < end;
      const uint32_t of_group = groups.largest_of_one(largest, own, has_own);
      inverse = quantizer.inverse(of_group, groups.of(own), has_own && groups.index(own) < kVectors);
    } else {
      groups.exchange(largest, first, end);
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        const float of_group = quantizer.inverse(largest[k], groups.of(k), groups.index(k) == 0 && first(k) < end);
#pragma unroll
        for (float& f : y[k]) f *= of_group;  // and by 1 below, which changes nothing
      }
    }
  }
  const auto each = [&](const auto& store) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const float of_vector = device::value_in_group(k, inverse, sharing);
      if (first(k) < end) store(k, of_vector);
    }
  };
  // A loop for each format, a constant in it: where a loop served several, compilers for AMD tested the format once for
  // every element (T156).
  const auto store_as = [&](auto dtype) {
    constexpr QuantizedFormat kFormat = format_of(decltype(dtype)::value);
    each([&](int k, float inverse) { quantizer.store(first(k), y[k], inverse, kFormat); });
  };
  const DType dtype = quantizer.p.format.dtype;
  if (__builtin_expect(dtype == DType::kFloat8E4M3FN, 1))
    store_as(std::integral_constant<DType, DType::kFloat8E4M3FN>());
  else if (dtype == DType::kInt8)
    store_as(std::integral_constant<DType, DType::kInt8>());
  else if (dtype == DType::kFloat8E4M3FNUZ)
    store_as(std::integral_constant<DType, DType::kFloat8E4M3FNUZ>());
  else if (dtype == DType::kFloat8E5M2)
    store_as(std::integral_constant<DType, DType::kFloat8E5M2>());
  else
    each([&](int k, float inverse) { quantizer.store_float4(start, first(k), y[k], inverse); });
}

// Quantises a row of a block, of any alignment and with groups of any size. y_of(k, y) computes a thread's vector k
// anew each time; first(k) is the index of its first element, and the others follow in steps.
template <class V, class YOf, class First>
GEMMA_NORM_DEVICE void quantize_in_passes(const Quantizer<V>& quantizer, const RowIndex& row, const Launch& launch,
                                          const YOf& y_of, const First& first, int step, int64_t end) {
  constexpr int kCount = FinishOf<V>::kCount;
  const RowParams& p = quantizer.p;
  const int thread = device::thread_index();
  // Calls visit(index of an element, y) for the thread's elements.
  const auto each = [&](const auto& visit) {
    for (int k = 0; k < launch.vectors; ++k) {
      float y[kCount];
      y_of(k, y);
      for (int i = 0; i < kCount; ++i) {
        const int64_t at = first(k) + static_cast<int64_t>(i) * step;
        if (at < end) visit(at, y[i]);
      }
    }
  };
  // Two elements of float4 are a byte. Its rows are whole vectors, so a thread has both, one after the other.
  uint32_t low_bits = 0;
  const auto store = [&](int64_t at, float y, float inverse) {
    const uint32_t bits = quantized::bits_of(y * inverse, p.format);
    if (!p.format.log2_items())
      quantizer.out[at] = static_cast<uint8_t>(bits);
    else if (at % 2 == 0)
      low_bits = bits;
    else
      quantizer.out[at / 2] = static_cast<uint8_t>(low_bits | bits << 4);
  };
  if (quantizer.is_static() || quantizer.is_of_row()) {
    float inverse;
    if (quantizer.is_static()) {
      inverse = 1.0f / quantizer.number;
    } else {
      uint32_t largest = 0;
      each([&](int64_t, float y) { largest = larger(largest, device::as_bits(y) & 0x7fffffffu); });
      inverse = quantizer.inverse(max_over_row<Scope::kTwoPasses, 1>(largest, launch, 0, 0), 0, thread == 0);
    }
    each([&](int64_t at, float y) { store(at, y, inverse); });
  }
  auto& maxima = device::shared_memory<GroupMaxima>().of_groups;
  const int64_t groups = quantizer.is_of_row() ? 0 : p.scale_groups;  // which is 0 where the scale is given
  for (int64_t base = 0; base < groups; base += kMaxGroups) {
    const int count = groups - base < kMaxGroups ? static_cast<int>(groups - base) : kMaxGroups;
    const auto index = [&](int64_t at) { return static_cast<int>(at / p.scale_group - base); };
    for (int i = thread; i < count; i += launch.block_threads) maxima[i] = 0;
    device::block_barrier();
    each([&](int64_t at, float y) {
      const int i = index(at);
      if (i >= 0 && i < count) device::max_in_block(&maxima[i], device::as_bits(y) & 0x7fffffffu);
    });
    device::block_barrier();
    for (int i = thread; i < count; i += launch.block_threads)
      maxima[i] = device::as_bits(quantizer.inverse(maxima[i], base + i, true));
    device::block_barrier();
    each([&](int64_t at, float y) {
      const int i = index(at);
      if (i >= 0 && i < count) store(at, y, device::as_float(maxima[i]));
    });
    device::block_barrier();
  }
  if (p.data[kYOut]) {  // last, because y may take the place of x
    typename V::X* const y_out = row.pointer<typename V::X>(p, kYOut, 0);
    each([&](int64_t at, float y) { store_item(y_out + at, y); });
  }
}

}  // namespace gemma_norm::gpu
