// The second pass over a row whose y is quantised. It computes y twice, for the largest element of each group and for
// the result, which costs less than to store it. Part of row_kernel.h, with the same anonymous namespace.
#pragma once

#include <cstdint>

#include "../core/quantized.h"
#include "rows.h"

namespace gemma_norm {
namespace {

// `Values` has y of a row: values(i, count, y) computes `count` elements from i on, at most kLanes, and
// values.store(i, count, y) stores them where the call wants y too.
template <class Values>
class RowQuantizer {
 public:
  RowQuantizer(const RowParams& p, const Values& values, uint8_t* out, uint8_t* scales)
      : p_(p), format_(p.format), values_(values), out_(out), scales_(scales) {}

  void run() const {
    if (p_.scale_group == 0) return store(0, p_.hidden, 1.0f / *static_cast<const float*>(p_.data[kScale]));
    for (int64_t begin = 0, g = 0; begin < p_.hidden; begin += p_.scale_group, ++g) {
      const float* const global = static_cast<const float*>(p_.data[kGlobalScale]);
      const auto divide = [](float v, const QuantizedFormat& f) { return v / f.largest; };
      const float exact = quantized::scale_of(largest(begin, begin + p_.scale_group), format_, p_.scale_ue8m0, divide);
      const quantized::Scale scale = quantized::stored_scale(exact, p_.scale_dtype, global);
      quantized::store_scale(scales_, scale, p_.scale_dtype, g, p_.scale_groups, p_.scale_stride);
      store(begin, begin + p_.scale_group, scale.inverse);
    }
  }

 private:
  // Calls visit(i, count, y) for all elements of [begin, end).
  template <class Visit>
  [[gnu::always_inline]] void each(int64_t begin, int64_t end, const Visit& visit) const {
    for (int64_t i = begin; i < end; i += kLanes) {
      alignas(kCacheLine) float y[kLanes];
      const int64_t count = end - i < kLanes ? end - i : kLanes;
      values_(i, count, y);
      visit(i, count, y);
    }
  }

  // The bits of the largest absolute value, at most those of scale_ub.
  [[gnu::always_inline]] uint32_t largest(int64_t begin, int64_t end) const {
    uint32_t of_lanes[kLanes] = {};
    each(begin, end, [&](int64_t, int64_t count, const float(&y)[kLanes]) {
      for (int j = 0; j < kLanes; ++j) {
        const uint32_t bits = quantized::same_bits<uint32_t>(y[j]) & 0x7fffffffu, counted = j < count ? bits : 0;
        of_lanes[j] = of_lanes[j] > counted ? of_lanes[j] : counted;
      }
    });
    uint32_t largest = 0;
    for (const uint32_t one : of_lanes) largest = largest > one ? largest : one;
    return p_.data[kScale] ? quantized::bounded(largest, *static_cast<const float*>(p_.data[kScale])) : largest;
  }

  [[gnu::always_inline]] void store(int64_t begin, int64_t end, float inverse) const {
    format_.dtype == DType::kInt8
        ? store_as([](float v) { return quantized::int8_bits(v); }, begin, end, inverse)
        : store_as([&](float v) { return quantized::float_bits(v, format_); }, begin, end, inverse);
  }
  template <class Bits>
  [[gnu::always_inline]] void store_as(const Bits& bits, int64_t begin, int64_t end, float inverse) const {
    each(begin, end, [&](int64_t i, int64_t count, const float(&y)[kLanes]) {
      uint8_t q[kLanes];
      values_.store(i, count, y);
      for (int j = 0; j < kLanes; ++j) q[j] = static_cast<uint8_t>(bits(y[j] * inverse));
      if (format_.log2_items()) {  // groups are multiples of 16, so `i` and `count` are even
        for (int j = 0; j < kLanes; j += 2) q[j / 2] = static_cast<uint8_t>(q[j] | q[j + 1] << 4);
        copy(out_ + i / 2, q, count / 2);
      } else if (count == kLanes)
        copy(out_ + i, q, kLanes);
      else
        copy(out_ + i, q, count);
    });
  }

  const RowParams& p_;
  const QuantizedFormat format_;
  const Values& values_;
  uint8_t* const out_;
  uint8_t* const scales_;
};

}  // namespace
}  // namespace gemma_norm
