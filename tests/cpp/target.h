// A device to run the cases on: its memory, and its entry of the C interface.
#pragma once

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "gemma_norm.h"

namespace gemma_norm {

enum class Guard { kBefore, kAfter };

class Target {
 public:
  virtual ~Target() = default;
  virtual std::string name() const = 0;
  virtual std::string missing() const { return ""; }  // why the target cannot run here, if it cannot

  // Memory aligned to 64 bytes at its guarded side, where, if the device can, any access beyond ends the program.
  virtual void* allocate(size_t bytes, Guard guard) = 0;
  virtual void free_all() = 0;
  virtual void write(void* to, const void* from, size_t bytes) = 0;
  virtual void read(void* to, const void* from, size_t bytes) = 0;

  // Runs to the end. `seed` chooses among what must not change the result: the order of blocks, the number of threads, ...
  virtual Status run(const Call& call, uint32_t seed, Message* message) = 0;
};

// Every device that this program knows, available or not.
const std::vector<std::unique_ptr<Target>>& targets();
Target& find_target(const std::string& name);

std::unique_ptr<Target> make_cuda_target();

// Memory of the host between pages that nobody may touch.
class HostTarget : public Target {
 public:
  ~HostTarget() override { HostTarget::free_all(); }
  void* allocate(size_t bytes, Guard guard) override;
  void free_all() override;
  void write(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  void read(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }

 private:
  struct Mapping {
    void* start;
    size_t bytes;
  };
  std::vector<Mapping> mappings_;
};

}  // namespace gemma_norm
