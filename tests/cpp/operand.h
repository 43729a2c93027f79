// One tensor of a case in a target's memory. Every byte that belongs to no element of it holds a canary.
#pragma once

#include <vector>

#include "cases.h"
#include "target.h"

namespace gemma_norm {

// Elements as they are stored, row after row without gaps.
using Packed = std::vector<uint8_t>;

class TestTensor {
 public:
  // A tensor that is written gets no stride of 0.
  TestTensor(const Case& c, Operand operand, bool written);

  void set(const Packed& elements);
  Packed get() const;

  void send(Target& target);
  // Reads the tensor back. Returns false if a byte has changed: any byte, or, with `written`, one beside the elements.
  bool receive(Target& target, bool written);

  // Valid after send() and as long as this object.
  Tensor tensor() const;

 private:
  template <class Visit>
  void each_row(const Visit& visit) const;

  DType dtype_;
  std::vector<int64_t> sizes_, strides_;
  Guard guard_;
  std::vector<uint8_t> image_;  // of the tensor's memory, on the host
  size_t first_;                // byte of the image at which the first element is
  void* memory_ = nullptr;
};

}  // namespace gemma_norm
