// Element types and row pointers. Part of row_kernel.h, with the same anonymous namespace.
#pragma once

#include <cstdint>
#include <cstring>

#include "../core/op_info.h"
#include "../core/row_params.h"
#include "../ops/variants.h"
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

// The compile-time parameters of the row kernel. V is the vector of floats.
template <class V_, class Op_, class Variant>
struct Choice {
  using V = V_;
  using Op = Op_;
  using Form = typename Variant::Form;
  using X = typename Variant::X;
  using S = typename Variant::S;
  using W = typename Variant::W;
  using Out = std::conditional_t<Form::kQuantizes, uint8_t, X>;
  static constexpr bool kRoundEachStep = Variant::kRoundEachStep, kHasWeight = Variant::kHasWeight;
  using Source = typename Form::Source;
  static constexpr bool kIsX = std::is_same_v<Source, InputSource>;  // s is x itself, so nothing need store it
  static constexpr bool kNormsX = Form::kNormsX;                     // before the residual is added
  static constexpr bool kHasResidual = std::is_same_v<Source, ResidualSource> || kNormsX;
  static constexpr bool kGatesX = std::is_same_v<Source, GatedSource>;
};

// Points to one row of each operand. Null for an operand that the call does not have.
template <class C>
struct RowPointers {
  using X = typename C::X;
  using S = typename C::S;
  X *x = nullptr, *gate = nullptr;
  typename C::Out* out = nullptr;
  S *residual = nullptr, *post = nullptr, *residual_out = nullptr;
  typename C::W* post_weight = nullptr;
  uint8_t* scales = nullptr;  // of any dtype
  X* y_out = nullptr;
  S* sum = nullptr;    // the first pass stores s here for the second: residual_out or a buffer; null: it does not
  float x_rstd = 0;    // the rstd of x, if x is normalised before the residual is added
  int64_t weight = 0;  // the index of the row's first weight: 0, but for a group that of the group's first element

  // Calls visit(operand, pointer) for the operator's operands with rows, and visit(kWeight, weight) if it has groups.
  template <class Visit>
  void each(const Visit& visit) {
    visit_if<kX>(visit, x);
    visit_if<kGate>(visit, gate);
    visit_if<kOut>(visit, out);
    visit_if<kResidual>(visit, residual);
    visit_if<kPost>(visit, post);
    visit_if<kResidualOut>(visit, residual_out);
    visit_if<kPostWeight>(visit, post_weight);
    visit_if<kScaleOut>(visit, scales);
    visit_if<kYOut>(visit, y_out);
    if constexpr (C::Form::kGroups) visit(kWeight, weight);
  }

 private:
  template <Operand kOperand, class Visit, class Place>
  static void visit_if(const Visit& visit, Place& place) {
    if constexpr (some_call_has(kOperand)) visit(kOperand, place);
  }
  static constexpr bool some_call_has(Operand operand) {
    for (const OpInfo& info : C::Op::kInfos)
      if (info.has(operand)) return true;
    return false;
  }
};

// Gives the rows in order, starting with `row`. After the last row comes the first. Row has the pointers to a row, and
// a function each(visit) that visits them.
template <class Row>
class RowCursor {
 public:
  RowCursor(const RowParams& p, int64_t row) : p_(p) {
    row_.each([&](Operand operand, auto& place) {
      if (operand != kWeight) place = reinterpret_cast<decltype(place + 0)>(p.data[operand]);
    });
    for (int d = kMaxRowDims - 1; d >= 0; --d) {
      at_[d] = row % p.sizes[d];
      row /= p.sizes[d];
      move(d, at_[d]);
    }
  }

  Row next() {
    const Row row = row_;
    for (int d = kMaxRowDims - 1; d >= 0; --d) {
      move(d, 1);
      if (++at_[d] < p_.sizes[d]) break;
      move(d, -at_[d]);
      at_[d] = 0;
    }
    return row;
  }

 private:
  void move(int d, int64_t steps) {
    row_.each([&](Operand operand, auto& place) {
      place += steps * p_.strides[operand][d] * (operand == kScaleOut ? quantized::scale_bytes(p_.scale_dtype) : 1);
    });
  }

  const RowParams& p_;
  Row row_;
  int64_t at_[kMaxRowDims];
};

}  // namespace
}  // namespace gemma_norm
