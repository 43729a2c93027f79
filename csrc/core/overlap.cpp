#include "overlap.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace gemma_norm {
namespace {

// The first byte of a tensor and the one after its last.
struct ByteRange {
  int64_t begin, end;

  explicit ByteRange(const Tensor& t) {
    const int64_t item = size_of(t.dtype);
    begin = reinterpret_cast<int64_t>(t.data);
    end = begin + item * t.sizes[t.dims - 1];
    for (int d = 0; d < t.dims - 1; ++d) end += (t.sizes[d] - 1) * t.strides[d] * item;
  }
};

// A tensor as pieces of contiguous bytes, all of one length. The last dimension is a piece, or part of one: dimensions
// that lie next to each other without a gap are merged into it, and those of size 1 are dropped.
struct Pieces {
  int64_t begin;  // the first byte
  int64_t bytes;  // of each piece
  int dims = 0;
  int64_t sizes[64], strides[64];  // in bytes, smallest stride first

  explicit Pieces(const Tensor& t) {
    const int64_t item = size_of(t.dtype);
    begin = reinterpret_cast<int64_t>(t.data);
    bytes = item * t.sizes[t.dims - 1];
    for (int d = t.dims - 2; d >= 0; --d) {
      if (t.sizes[d] == 1) continue;
      const int64_t stride = t.strides[d] * item;
      int at = dims++;
      for (; at > 0 && strides[at - 1] > stride; --at) {
        sizes[at] = sizes[at - 1];
        strides[at] = strides[at - 1];
      }
      sizes[at] = t.sizes[d];
      strides[at] = stride;
    }
    int continued = 0;
    while (continued < dims && strides[continued] == bytes) bytes *= sizes[continued++];
    dims -= continued;
    std::copy(sizes + continued, sizes + continued + dims, sizes);
    std::copy(strides + continued, strides + continued + dims, strides);
  }

  int64_t stride_gcd(int64_t g) const {
    for (int d = 0; d < dims; ++d) g = std::gcd(g, strides[d]);
    return g;
  }

  // The first byte of every piece, sorted. A dimension of stride 0 repeats the same pieces, which are listed once.
  std::vector<int64_t> starts() const {
    std::vector<int64_t> all{begin};
    for (int d = 0; d < dims; ++d) {
      if (strides[d] == 0) continue;
      const size_t inner = all.size();
      all.reserve(inner * sizes[d]);
      for (int64_t i = 1; i < sizes[d]; ++i)
        for (size_t j = 0; j < inner; ++j) all.push_back(all[j] + i * strides[d]);
    }
    std::sort(all.begin(), all.end());
    return all;
  }
};

}  // namespace

bool same_memory(const Tensor& a, const Tensor& b) {
  if (&a == &b) return true;
  if (a.data != b.data || a.dtype != b.dtype || a.dims != b.dims) return false;
  for (int d = 0; d < a.dims; ++d)
    if (a.sizes[d] != b.sizes[d] || (a.sizes[d] != 1 && a.strides[d] != b.strides[d])) return false;
  return true;
}

bool overlap(const Tensor& a, const Tensor& b) {
  const ByteRange p(a), q(b);
  if (p.end <= q.begin || q.end <= p.begin) return false;
  const Pieces x(a), y(b);
  const int64_t g = y.stride_gcd(x.stride_gcd(0));
  if (g == 0) return true;  // a single piece each, and the two address ranges meet
  // Interleaved slices of one buffer, such as q and k of a fused qkv: modulo g, all pieces of a tensor start at the
  // same place, so comparing two places is enough.
  const int64_t shift = ((y.begin - x.begin) % g + g) % g;
  if (x.bytes <= shift && shift + y.bytes <= g) return false;
  const std::vector<int64_t> xs = x.starts(), ys = y.starts();
  for (size_t i = 0, j = 0; i < xs.size() && j < ys.size();) {
    if (xs[i] + x.bytes <= ys[j])
      ++i;
    else if (ys[j] + y.bytes <= xs[i])
      ++j;
    else
      return true;
  }
  return false;
}

bool overlaps_itself(const Tensor& a) {
  const Pieces x(a);
  int64_t extent = x.bytes;
  bool nested = true;  // each stride is at least the extent of the dimensions inside it: then no two pieces can meet
  for (int d = 0; d < x.dims; ++d) {
    if (x.strides[d] == 0) return true;
    nested = nested && x.strides[d] >= extent;
    extent += (x.sizes[d] - 1) * x.strides[d];
  }
  if (nested) return false;
  const std::vector<int64_t> starts = x.starts();
  for (size_t i = 1; i < starts.size(); ++i)
    if (starts[i] - starts[i - 1] < x.bytes) return true;
  return false;
}

}  // namespace gemma_norm
