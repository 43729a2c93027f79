#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>

#include "target.h"

namespace gemma_norm {

void* HostTarget::allocate(size_t bytes, Guard guard) {
  const size_t page = sysconf(_SC_PAGESIZE), inside = (bytes + page - 1) / page * page;
  void* memory = mmap(nullptr, inside + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  mappings_.push_back({memory, inside + 2 * page});
  char* const start = static_cast<char*>(memory) + page;
  if (inside && mprotect(start, inside, PROT_READ | PROT_WRITE) != 0) std::abort();
  return guard == Guard::kBefore ? start : start + inside - bytes;
}

void HostTarget::free_all() {
  for (const Mapping& m : mappings_) munmap(m.start, m.bytes);
  mappings_.clear();
}

}  // namespace gemma_norm
