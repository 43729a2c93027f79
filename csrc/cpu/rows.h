// Where the rows of a call are, and of what. Part of row_kernel.h: the anonymous namespace is the same.
#pragma once

#include <cstdint>
#include <cstring>

#include "../core/row_params.h"

namespace gemma_norm {
namespace {

constexpr int kLanes = 32;
constexpr int64_t kCacheLine = 64;

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T>
void copy(T* to, const T* from, int64_t count) {
  std::memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
}

template <class T>
struct Row {
  const T* x;
  const T* residual;
  const T* post;
  T* out;
  T* residual_out;
  T* sum;  // where statistics leaves s for normalize: residual_out or a buffer
};

// Walks the rows in order; after the last one comes the first.
template <class T>
class RowCursor {
 public:
  RowCursor(const RowParams& p, int64_t row) : p_(p) {
    const auto pointer = [&](Operand o) { return static_cast<T*>(p.data[o]); };
    row_ = {pointer(kX), pointer(kResidual), pointer(kPost), pointer(kOut), pointer(kResidualOut), pointer(kResidualOut)};
    for (int d = p.row_dims - 1; d >= 0; --d) {
      at_[d] = row % p.sizes[d];
      row /= p.sizes[d];
      move(d, at_[d]);
    }
  }

  Row<T> next() {
    const Row<T> row = row_;
    for (int d = p_.row_dims - 1; d >= 0; --d) {
      move(d, 1);
      if (++at_[d] < p_.sizes[d]) break;
      move(d, -at_[d]);
      at_[d] = 0;
    }
    return row;
  }

 private:
  void move(int d, int64_t steps) {
    row_.x += steps * p_.strides[kX][d];
    row_.residual += steps * p_.strides[kResidual][d];
    row_.post += steps * p_.strides[kPost][d];
    row_.out += steps * p_.strides[kOut][d];
    row_.residual_out += steps * p_.strides[kResidualOut][d];
    row_.sum = row_.residual_out;
  }

  const RowParams& p_;
  Row<T> row_;
  int64_t at_[kMaxRowDims];
};

}  // namespace
}  // namespace gemma_norm
