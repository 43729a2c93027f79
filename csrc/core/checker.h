// What check() consists of: the checks of a call, in several files by subject, and its collapsed form.
#pragma once

#include <cstdio>

#include "check.h"
#include "overlap.h"

namespace gemma_norm {

// Each check returns true if the call passes it. Otherwise it writes the message and returns false.
class Checker {
 public:
  Checker(const Call& call, Message* message) : call_(call), message_(message) {}

  bool passes();
  // Whether every position is a row of the cache, of a call that passes and whose tensors can be read.
  bool check_position_values();  // check_heads.cpp

 private:
  bool invalid(const char* format, ...);

  struct ShapeText {
    char text[256];
    explicit ShapeText(const Tensor& t) {
      int n = std::snprintf(text, sizeof text, "[");
      for (int d = 0; d < t.dims && n < static_cast<int>(sizeof text) - 32; ++d)
        n += std::snprintf(text + n, sizeof text - n, "%s%lld", d ? ", " : "", static_cast<long long>(t.sizes[d]));
      std::snprintf(text + n, sizeof text - n, "]");
    }
  };

  const Tensor& x() const { return *call_.tensors[kX]; }
  const char* name_of(Operand operand) const { return call_.op->name_of(operand); }
  int leading() const { return x().dims - 2; }  // dimensions of the tokens, if rows are heads
  int64_t hidden() const { return x().sizes[x().dims - 1]; }
  bool empty() const {
    for (int d = 0; d < x().dims; ++d)
      if (x().sizes[d] == 0) return true;
    return false;
  }

  // check.cpp
  bool check_operand(const OperandRule& rule, const Tensor& t);
  bool check_dtype(const OperandRule& rule, const Tensor& t);
  bool check_dtype_of(const OperandRule& rule, const Tensor& t, Operand operand);
  bool check_rows(const OperandRule& rule, const Tensor& t);
  bool check_shape_of_x(const OperandRule& rule, const Tensor& t);
  bool check_hidden(const OperandRule& rule, const Tensor& t);
  bool check_shape(const OperandRule& rule, const Tensor& t, const int64_t* sizes, int dims);
  bool check_last_dimension(const OperandRule& rule, const Tensor& t);
  bool check_contiguous(const OperandRule& rule, const Tensor& t);
  static bool is_contiguous(const Tensor& t) { return t.strides[t.dims - 1] == 1 || t.sizes[t.dims - 1] == 1; }
  bool check_no_others();
  bool check_options();
  bool check_group(const char* name, int64_t size);

  // check_heads.cpp: of an operator whose rows are heads, which are rotated
  bool check_rows_of_heads(const OperandRule& rule, const Tensor& t);
  bool has_head(const OperandRule& rule, const Tensor& t);
  bool check_heads(const OperandRule& rule, const Tensor& t);
  bool check_shape_of_angles(const OperandRule& rule, const Tensor& t);
  bool check_table(const OperandRule& rule, const Tensor& t);
  bool check_rotary(const OperandRule& rule, const Tensor& t);
  bool check_shape_of_positions(const OperandRule& rule, const Tensor& t);
  bool check_angles();

  // check_quantized.cpp: of an operator that quantises
  bool check_one(const OperandRule& rule, const Tensor& t);
  bool check_scales(const OperandRule& rule, const Tensor& t);
  bool check_codes(const OperandRule& rule, const Tensor& t);
  bool check_last_size(const OperandRule& rule, const Tensor& t, int64_t size);
  bool check_quantization();

  // check.cpp: overlapping memory
  bool check_memory();
  bool writes(const OperandRule& rule) const { return rule.written() && call_.tensors[rule.operand]; }
  bool check_apart(const OperandRule& out, const OperandRule& in);
  static bool same_rows(const OperandRule& a, const OperandRule& b) {
    return a.has_rows() && b.has_rows() && (a.extent == Extent::kHeads) == (b.extent == Extent::kHeads);
  }
  static Tensor one_dimension(const Tensor& t);

  // Of the scales, which any stride may separate: the same elements as rows of one.
  struct RowsOfOne : Tensor {
    int64_t all_sizes[kMaxDims + 1], all_strides[kMaxDims + 1];
    void set(const Tensor& t) {
      Tensor::operator=(t);
      for (int d = 0; d < t.dims; ++d) all_sizes[d] = t.sizes[d], all_strides[d] = t.strides[d];
      all_sizes[dims] = all_strides[dims] = 1;
      sizes = all_sizes;
      strides = all_strides;
      ++dims;
    }
  };

  const Tensor& tensor(const OperandRule& rule) const {
    return rule.extent == Extent::kScales ? scales_ : *call_.tensors[rule.operand];
  }

  const char* name_of(const OperandRule& rule) const;

  const Call& call_;
  Message* message_;
  RowsOfOne scales_;
};

// Of a call that passes (collapse.cpp).
void collapse(const Call& call, RowParams* params, RowSlices* slices);

}  // namespace gemma_norm
