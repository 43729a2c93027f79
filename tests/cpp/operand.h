// One tensor of a case in a target's memory, with canaries in every byte that is not an element of it.
#pragma once

#include <vector>

#include "cases.h"
#include "target.h"

namespace gemma_norm {

// Elements as they are stored, row after row without gaps.
using Packed = std::vector<uint8_t>;

class TestTensor {
 public:
  // A tensor that is written has no stride of 0.
  TestTensor(const Case& c, Operand operand, bool written);

  void set(const Packed& elements);
  Packed get() const;

  void send(Target& target);
  // Reads the tensor back; false if anything has changed that may not: with `written`, its elements may.
  bool receive(Target& target, bool written);

  // Valid after send() and as long as this object.
  Tensor tensor() const;

 private:
  template <class Visit>
  void each_row(const Visit& visit) const;

  DType dtype_;
  std::vector<int64_t> sizes_, strides_;
  Guard guard_;
  size_t first_;                // byte of the first element in the image
  std::vector<uint8_t> image_;  // of the tensor's memory, on the host
  void* memory_ = nullptr;
};

}  // namespace gemma_norm
