#include "operand.h"

#include <algorithm>

namespace gemma_norm {
namespace {

constexpr size_t kLine = 64;
constexpr uint8_t kCanary = 0xff;  // NaN in every dtype

}  // namespace

TestTensor::TestTensor(const Case& c, Operand operand, bool written) {
  dtype_ = c.dtype_of(operand);
  const int64_t item = size_of(dtype_), line = kLine / item;
  std::vector<int> order;
  if (operand != kWeight && operand != kPostWeight && operand != kDWeight) {
    sizes_ = c.rows.sizes;
    if (operand != kDOut || !c.expanded_dout) order = c.rows.order;
    for (int d = 0; written && d < static_cast<int>(sizes_.size()); ++d)
      if (std::find(order.begin(), order.end(), d) == order.end()) order.insert(order.begin(), d);
  }

  // The gaps differ from operand to operand, so that two dimensions may collapse into one in some operands and not in
  // others. They also grow from dimension to dimension: if two gaps were equal, one stride would lead through both
  // dimensions, and they would collapse.
  int64_t gap = (operand + 1) * line + (c.alignment == Alignment::kOffStride ? 1 : 0);
  if (c.alignment == Alignment::kWhole && c.hidden % line) gap += line - c.hidden % line;
  int64_t extent = c.hidden;
  int gaps = 0;
  strides_.assign(sizes_.size(), 0);
  for (auto d = order.rbegin(); d != order.rend(); ++d) {
    strides_[*d] = extent + (gaps++ < c.rows.padding ? gaps * gap : 0);
    extent += strides_[*d] * (sizes_[*d] - 1);
  }
  sizes_.push_back(c.hidden);
  strides_.push_back(1);

  // Target::allocate aligns memory at its guarded side. The margin on that side puts the first element `off` bytes
  // beyond a line; on the other side, a whole line of canaries is room enough.
  const Placement& placement = c.placements[operand];
  const bool flush = c.alignment == Alignment::kAtEnd;
  const size_t bytes = extent * item, off = c.alignment == Alignment::kOffBase ? placement.odd_elements * item : 0;
  guard_ = flush || placement.guarded_after ? Guard::kAfter : Guard::kBefore;
  const size_t after = guard_ == Guard::kBefore ? kLine : flush ? 0 : (kLine - (bytes + off) % kLine) % kLine;
  first_ = guard_ == Guard::kBefore ? off : kLine;
  image_.assign(first_ + bytes + after, kCanary);
}

template <class Visit>
void TestTensor::each_row(const Visit& visit) const {
  int64_t rows = 1;
  for (size_t d = 0; d + 1 < sizes_.size(); ++d) rows *= sizes_[d];
  const size_t item = size_of(dtype_), row_bytes = sizes_.back() * item;
  for (int64_t row = 0; row < rows; ++row) {
    int64_t rest = row, at = 0;
    for (size_t d = sizes_.size() - 1; d-- > 0; rest /= sizes_[d]) at += rest % sizes_[d] * strides_[d];
    visit(first_ + at * item, row * row_bytes, row_bytes);
  }
}

void TestTensor::set(const Packed& elements) {
  each_row([&](size_t at, size_t packed, size_t bytes) { std::memcpy(&image_[at], &elements[packed], bytes); });
}

Packed TestTensor::get() const {
  Packed elements;
  each_row([&](size_t at, size_t, size_t bytes) { elements.insert(elements.end(), &image_[at], &image_[at] + bytes); });
  return elements;
}

void TestTensor::send(Target& target) {
  memory_ = target.allocate(image_.size(), guard_);
  target.write(memory_, image_.data(), image_.size());
}

bool TestTensor::receive(Target& target, bool written) {
  std::vector<uint8_t> expected = image_;
  target.read(image_.data(), memory_, image_.size());
  if (written) each_row([&](size_t at, size_t, size_t bytes) { std::memcpy(&expected[at], &image_[at], bytes); });
  return expected == image_;
}

Tensor TestTensor::tensor() const {
  return {static_cast<uint8_t*>(memory_) + first_, sizes_.data(), strides_.data(),
          static_cast<int32_t>(sizes_.size()),     dtype_,        dtype_name(dtype_)};
}

}  // namespace gemma_norm
