// A device on which cases run: its memory, and its entry of the C interface.
#pragma once

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cases.h"

namespace gemma_norm {

enum class Guard { kBefore, kAfter };

class Target {
 public:
  virtual ~Target() = default;
  virtual std::string name() const = 0;
  virtual std::string missing() const { return ""; }  // why the target cannot run here, if it cannot

  // Memory that is aligned to 64 bytes at its guarded side. Where the device can, an access beyond that side ends the
  // program.
  virtual void* allocate(size_t bytes, Guard guard) = 0;
  virtual void free_all() = 0;
  virtual void write(void* to, const void* from, size_t bytes) = 0;
  virtual void read(void* to, const void* from, size_t bytes) = 0;

  // Runs the call to its end.
  virtual Status run(const Call& call, const Variation& variation, Message* message) = 0;
};

// Every device that this program knows, also those that this machine has not.
const std::vector<std::unique_ptr<Target>>& targets();
Target& find_target(const std::string& name);

std::unique_ptr<Target> make_cuda_target();

// Memory of the host, between pages that no program may touch.
class HostTarget : public Target {
 public:
  ~HostTarget() override;
  void* allocate(size_t bytes, Guard guard) override;
  void free_all() override;
  void write(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  void read(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }

 private:
  struct Mapping {
    void* start;
    size_t bytes;
  };
  char* map(size_t inside);

  std::vector<Mapping> mappings_;
  // Freed ones. The next operand of as many pages takes one, since Linux needs more time for a new one than many a
  // kernel for its rows. What is in it is what another case has left.
  std::vector<Mapping> spare_;
  size_t spare_bytes_ = 0;
};

}  // namespace gemma_norm
