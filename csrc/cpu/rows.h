// Where the rows of a call are, and of what. Part of row_kernel.h: the anonymous namespace is the same.
#pragma once

#include <cstdint>
#include <cstring>

#include "../core/op_info.h"
#include "../core/row_params.h"
#include "exact.h"

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

// Where one row of each operand is; null where the call has no such operand.
template <class T>
struct Row {
  T* of[kOperands] = {};
  T* sum;  // where the first pass leaves s for the second: residual_out or a buffer; null: s is x

  T* operator[](Operand operand) const { return of[operand]; }
};

// Walks the rows of Op's operands in order; after the last one comes the first. It compares extents itself: the linker keeps one
// copy of OperandRule::has_rows(), an inline function, and that could be one compiled for an instruction set that is missing here.
template <class Op, class T>
class RowCursor {
 public:
  RowCursor(const RowParams& p, int64_t row) : p_(p) {
    for (const OperandRule& rule : Op::kRules)
      if (rule.extent != Extent::kHidden) row_.of[rule.operand] = static_cast<T*>(p.data[rule.operand]);
    for (int d = p.row_dims - 1; d >= 0; --d) {
      at_[d] = row % p.sizes[d];
      row /= p.sizes[d];
      move(d, at_[d]);
    }
  }

  Row<T> next() {
    row_.sum = row_[kResidualOut];
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
    for (const OperandRule& rule : Op::kRules)
      if (rule.extent != Extent::kHidden) row_.of[rule.operand] += steps * p_.strides[rule.operand][d];
  }

  const RowParams& p_;
  Row<T> row_;
  int64_t at_[kMaxRowDims];
};

}  // namespace
}  // namespace gemma_norm
