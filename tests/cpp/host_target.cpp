#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>

#include "target.h"

namespace gemma_norm {

constexpr size_t kMostSpare = 64, kMostSpareBytes = size_t{64} << 20;

HostTarget::~HostTarget() {
  HostTarget::free_all();
  for (const Mapping& m : spare_) munmap(m.start, m.bytes);
}

void* HostTarget::allocate(size_t bytes, Guard guard) {
  const size_t page = sysconf(_SC_PAGESIZE), inside = (bytes + page - 1) / page * page;
  char* const start = map(inside);
  return guard == Guard::kBefore ? start : start + inside - bytes;
}

// Memory between two pages that nobody may touch.
char* HostTarget::map(size_t inside) {
  const size_t page = sysconf(_SC_PAGESIZE), all = inside + 2 * page;
  const auto spare = std::find_if(spare_.begin(), spare_.end(), [&](const Mapping& m) { return m.bytes == all; });
  if (spare != spare_.end()) {
    mappings_.push_back(*spare);
    spare_.erase(spare);
    spare_bytes_ -= all;
    return static_cast<char*>(mappings_.back().start) + page;
  }
  void* memory = mmap(nullptr, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  mappings_.push_back({memory, all});
  char* const start = static_cast<char*>(memory) + page;
  if (inside && mprotect(start, inside, PROT_READ | PROT_WRITE) != 0) std::abort();
  return start;
}

void HostTarget::free_all() {
  for (const Mapping& m : mappings_) {
    spare_.push_back(m);
    spare_bytes_ += m.bytes;
  }
  mappings_.clear();
  while (spare_.size() > kMostSpare || spare_bytes_ > kMostSpareBytes) {  // the oldest first
    munmap(spare_[0].start, spare_[0].bytes);
    spare_bytes_ -= spare_[0].bytes;
    spare_.erase(spare_.begin());
  }
}

}  // namespace gemma_norm
