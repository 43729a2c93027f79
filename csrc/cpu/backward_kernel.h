// The kernels of the backward pass, written once over the vector type V as row_kernel.h is, with its promise: all
// instruction sets give the same bits, except for the payloads of NaNs. The sum of x^2 is that of the forward pass, so
// rstd has its bits.
//
// There are two passes over each row. The second finds the row in the cache.
//
//   gradient_statistics  computes rstd and mean(g * n)
//   differentiate        computes dx, and adds dout * n to the partial sums
//
// The second pass has a group of kGroupRows rows at a time, so it loads and stores the partial sums once for all of
// them.
#pragma once

#include <cstdint>

#include "exact.h"  // before any formula

#include "backward.h"
#include "memory.h"
#include "rows.h"
#include "squares.h"
#include "weights.h"

namespace gemma_norm {
namespace {

static_assert(kColumnStep % kStep == 0, "the factors and partial sums of the last step of a row must exist");

// Points to one row of each operand. `dsum` is null if the call has none.
template <class X_, class Y_>
struct GradientRow {
  using X = X_;  // the element type of x, dsum and dx
  using Y = Y_;  // of dout
  X *x = nullptr, *dsum = nullptr, *dx = nullptr;
  Y* dout = nullptr;

  template <class Visit>
  void each(const Visit& visit) {
    visit(kX, x);
    visit(kDOut, dout);
    visit(kDX, dx);
    visit(kDSum, dsum);
  }
};

// The sum of g * x over a row, in the same order as that of squares: chunk by chunk, each lane adds the same two
// elements of every step. kScaled: of g * (x * scale).
template <class V, class Row, bool kScaled>
class Products {
 public:
  Products(const float* factors, const Row& row, float scale)
      : factors_(factors), row_(row), scale_(V::broadcast(scale)) {
    for (int k = 0; k < kSums; ++k) sums_[k] = part_[k] = V::broadcast(0);
  }

  [[gnu::always_inline]] void add_step(int64_t i) { add(row_.x + i, row_.dout + i, factors_ + i); }
  [[gnu::always_inline]] void end_chunk() {
    for (int k = 0; k < kSums; ++k) {
      sums_[k] = sums_[k] + part_[k];
      part_[k] = V::broadcast(0);
    }
  }
  [[gnu::always_inline]] void add_rest(int64_t i, int64_t rest) {
    typename Row::X x[kStep] = {};
    typename Row::Y dout[kStep] = {};
    copy(x, row_.x + i, rest);
    copy(dout, row_.dout + i, rest);
    add(x, dout, factors_ + i);
    end_chunk();
  }
  [[gnu::always_inline]] float sum() const { return (sums_[0] + sums_[1]).sum(); }

 private:
  static constexpr int kSums = kStep / kLanes;

  [[gnu::always_inline]] void add(const typename Row::X* x, const typename Row::Y* dout, const float* factors) {
    for (int k = 0; k < kSums; ++k) {
      V v = V::load(x + k * kLanes);
      if constexpr (kScaled) v = v * scale_;
      part_[k] = part_[k] + V::load(dout + k * kLanes) * V::load(factors + k * kLanes) * v;
    }
  }

  const float* const factors_;
  const Row row_;
  const V scale_;
  V sums_[kSums], part_[kSums];
};

struct GradientStatistics {
  float rstd, mean;  // mean is that of g * n
};

// mean(g * n) without the sum of g * x, which can be beyond float32 though the mean is not.
template <class V, class Row>
[[gnu::noinline]] float mean_of_scaled(const RowParams& p, const float* factors, const Row& row, float rstd) {
  Products<V, Row, true> products(factors, row, rstd);
  const int64_t i = each_step(p.hidden, [&](int64_t i) { products.add_step(i); }, [&] { products.end_chunk(); });
  if (i < p.hidden) products.add_rest(i, p.hidden - i);
  return products.sum() * p.inv_hidden;
}

// The first pass over a row.
template <class V, class Row>
[[gnu::always_inline]] inline GradientStatistics gradient_statistics(const RowParams& p, const float* factors,
                                                                     const Row& row) {
  using C = Choice<V, RmsNorm, Variant<RmsNorm, typename Row::X, NoWeight, false>>;
  RowPointers<C> forward;
  forward.x = row.x;
  Squares<C> squares(p, forward, false);
  Products<V, Row, false> products(factors, row, 1);
  const auto step = [&](int64_t i) {
    squares.add_step(i);
    products.add_step(i);
  };
  const auto end_chunk = [&] {
    squares.end_chunk();
    products.end_chunk();
  };
  const int64_t i = each_step(p.hidden, step, end_chunk);
  if (i < p.hidden) {
    squares.add_rest(i, p.hidden - i);
    products.add_rest(i, p.hidden - i);
  }
  GradientStatistics result;
  result.rstd = squares.rstd();
  result.mean = products.sum() * p.inv_hidden * result.rstd;
  if (!(result.mean - result.mean == 0)) result.mean = mean_of_scaled<V>(p, factors, row, result.rstd);
  return result;
}

// The second pass over `kCount` rows.
template <class V, class Row, int kCount>
class Differentiator {
  using X = typename Row::X;
  using Y = typename Row::Y;

 public:
  Differentiator(const float* factors, float* partial, const Row (&rows)[kCount],
                 const GradientStatistics (&statistics)[kCount], bool nontemporal)
      : factors_(factors), partial_(partial), nontemporal_(nontemporal) {
    for (int r = 0; r < kCount; ++r) {
      rows_[r] = rows[r];
      rstd_[r] = V::broadcast(statistics[r].rstd);
      minus_mean_[r] = V::broadcast(-statistics[r].mean);
    }
  }

  [[gnu::always_inline]] void vector(int64_t i) const {
    const V factor = V::load(factors_ + i);
    V sum = partial_ ? V::load(partial_ + i) : factor;
    for (int r = 0; r < kCount; ++r) {
      const Row& row = rows_[r];
      const V dx =
          element(r, V::load(row.x + i), V::load(row.dout + i), factor, row.dsum ? row.dsum + i : nullptr, sum);
      if (V::kHasNontemporalStores && nontemporal_)
        dx.store_nontemporal(row.dx + i);
      else
        dx.store(row.dx + i);
    }
    if (partial_) sum.store(partial_ + i);
  }
  // The last, incomplete vector.
  [[gnu::noinline]] void rest(int64_t i, int64_t count) const {
    const V factor = V::load(factors_ + i);
    V sum = partial_ ? V::load(partial_ + i) : factor;
    for (int r = 0; r < kCount; ++r) {
      const Row& row = rows_[r];
      X x[kLanes] = {}, dsum[kLanes] = {}, dx[kLanes];
      Y dout[kLanes] = {};
      copy(x, row.x + i, count);
      copy(dout, row.dout + i, count);
      if (row.dsum) copy(dsum, row.dsum + i, count);
      element(r, V::load(x), V::load(dout), factor, row.dsum ? dsum : nullptr, sum).store(dx);
      copy(row.dx + i, dx, count);
    }
    if (partial_) sum.store(partial_ + i);
  }

 private:
  [[gnu::always_inline]] V element(int r, const V& x, const V& dout, const V& factor, const X* dsum, V& sum) const {
    const V n = x * rstd_[r];
    sum = sum + dout * n;
    const V dx = (dout * factor + n * minus_mean_[r]) * rstd_[r];
    return dsum ? dx + V::load(dsum) : dx;
  }

  const float* const factors_;
  float* const partial_;
  Row rows_[kCount];
  V rstd_[kCount], minus_mean_[kCount];
  const bool nontemporal_;
};

// Both passes over `kCount` rows.
template <class V, class Row, int kCount>
[[gnu::noinline]] void differentiate_rows(const BackwardWork& work, float* partial, RowCursor<Row>& cursor,
                                          bool nontemporal) {
  const RowParams& p = work.params;
  Row rows[kCount];
  GradientStatistics statistics[kCount];
  for (int r = 0; r < kCount; ++r) {
    rows[r] = cursor.next();
    statistics[r] = gradient_statistics<V>(p, work.factors, rows[r]);
  }
  const Differentiator<V, Row, kCount> differentiator(work.factors, partial, rows, statistics, nontemporal);
  int64_t i = 0;
  for (; i + kLanes <= p.hidden; i += kLanes) differentiator.vector(i);
  if (i < p.hidden) differentiator.rest(i, p.hidden - i);
}

// --- The entries: from dtypes at run time to compiled code

// Calls visit(X(), Y()) with the dtypes of x and dout.
template <class Visit>
void with_gradient_dtypes(const RowParams& p, const Visit& visit) {
  if (p.dtypes[kX] == DType::kFloat16) return visit(Float16(), Float16());
  if (p.dtypes[kX] == DType::kBFloat16) return visit(BFloat16(), BFloat16());
  if (p.dtypes[kDOut] == DType::kFloat16) return visit(float(), Float16());
  if (p.dtypes[kDOut] == DType::kBFloat16) return visit(float(), BFloat16());
  return visit(float(), float());
}

template <class V>
void run_chunks(const BackwardWork& work, int64_t begin, int64_t end) {
  const RowParams& p = work.params;
  const auto first = [&](int64_t chunk) { return first_row(p.rows, work.chunks, chunk); };
  with_gradient_dtypes(p, [&](auto x, auto dout) {
    using Row = GradientRow<decltype(x), decltype(dout)>;
    if (first(begin) >= first(end)) return;
    const bool nontemporal =
        V::kHasNontemporalStores && worth_nontemporal<decltype(x)>(p, first(end) - first(begin), kDX);
    RowCursor<Row> cursor(p, first(begin));
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float* const partial = work.partial(chunk);
      int64_t row = first(chunk);
      for (; row + kGroupRows <= first(chunk + 1); row += kGroupRows)
        differentiate_rows<V, Row, kGroupRows>(work, partial, cursor, nontemporal);
      for (; row < first(chunk + 1); ++row) differentiate_rows<V, Row, 1>(work, partial, cursor, nontemporal);
    }
  });
  V::fence();
}

template <class V>
void compute_factors(const BackwardWork& work, int64_t begin, int64_t end) {
  const RowParams& p = work.params;
  const auto compute = [&](auto w, int64_t section) {
    using W = decltype(w);
    // float16 stands for any type that is narrower than W, if W is float: a NaN then loses its payload.
    prepare<V>(StoredWeights<Float16, W>{static_cast<const W*>(p.data[kWeight]) + section * p.hidden, p.weight_offset},
               p.hidden, work.factors + section * work.columns);
  };
  for (int64_t section = begin; section < end; ++section) {
    float* const factors = work.factors + section * work.columns;
    for (int64_t i = p.hidden / kLanes * kLanes; i < work.columns; ++i) factors[i] = 0;
    switch (p.dtypes[kWeight]) {
      case DType::kFloat32: compute(float(), section); break;
      case DType::kFloat16: compute(Float16(), section); break;
      case DType::kBFloat16: compute(BFloat16(), section); break;
      default:
        for (int64_t i = 0; i < p.hidden; ++i) factors[i] = 1;
    }
  }
}

template <class V>
void sum_column_steps(const BackwardWork& work, int64_t begin, int64_t end) {
  const RowParams& p = work.params;
  const auto sum = [&](auto w) {
    using W = decltype(w);
    for (int64_t step = begin; step < end; ++step) {
      const int64_t first = step * kColumnStep, section = first / work.columns;
      const int64_t column = first - section * work.columns;
      W* const dweight = static_cast<W*>(p.data[kDWeight]) + section * p.hidden;
      for (int64_t i = column; i < column + kColumnStep && i < p.hidden; i += kLanes) {
        V sum = V::broadcast(0);
        for (int64_t chunk = 0; chunk < work.chunks; ++chunk)
          sum = sum + V::load(work.partial(chunk) + section * work.columns + i);
        if constexpr (sizeof(W) < sizeof(float)) sum = sum.without_payload();  // see StoredWeights::sum
        if (i + kLanes <= p.hidden) {
          sum.store(dweight + i);
        } else {
          W rest[kLanes];
          sum.store(rest);
          copy(dweight + i, rest, p.hidden - i);
        }
      }
    }
  };
  switch (p.dtypes[kDWeight]) {
    case DType::kFloat32: return sum(float());
    case DType::kFloat16: return sum(Float16());
    default: return sum(BFloat16());
  }
}

}  // namespace
}  // namespace gemma_norm
