#include "overlap.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace gemma_norm {
namespace {

// [first byte, one past the last byte) of a tensor.
struct Extent {
  int64_t begin, end;

  explicit Extent(const Tensor& t) {
    const int64_t item = size_of(t.dtype);
    begin = reinterpret_cast<int64_t>(t.data);
    end = begin + item * t.sizes[t.dims - 1];
    for (int d = 0; d < t.dims - 1; ++d) end += (t.sizes[d] - 1) * t.strides[d] * item;
  }
};

// A tensor as equal runs of bytes: run i of `starts` begins at the sum of its coordinates times `strides`. Dimensions of size 1
// are gone, and inner ones that continue the run are part of it.
struct Runs {
  int64_t begin;  // the first byte
  int64_t bytes;  // of one run
  int dims = 0;
  int64_t sizes[64], strides[64];  // in bytes, smallest stride first

  explicit Runs(const Tensor& t) {
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

  // The first byte of every run, sorted; dimensions of stride 0 name the same bytes again and count once.
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
  const Extent p(a), q(b);
  if (p.end <= q.begin || q.end <= p.begin) return false;
  const Runs x(a), y(b);
  const int64_t g = y.stride_gcd(x.stride_gcd(0));
  if (g == 0) return true;  // two single runs whose extents meet
  // Interleaved slices of one buffer (the q and k of a fused qkv): every run starts at the same residue modulo g.
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
  const Runs x(a);
  int64_t extent = x.bytes;
  bool nested = true;  // each dimension steps over all that lies inside it: the usual case, and proof enough
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
