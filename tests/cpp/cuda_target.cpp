// The CUDA library on the first NVIDIA GPU.
#include <cuda_runtime.h>

#include <cstdio>

#include "target.h"

namespace gemma_norm {
namespace {

class CudaTarget : public Target {
 public:
  ~CudaTarget() override { CudaTarget::free_all(); }
  std::string name() const override { return "cuda"; }
  std::string missing() const override {
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (error == cudaSuccess && devices > 0) return "";
    return std::string("needs an NVIDIA GPU and its driver, run it where nvidia-smi lists one: ") +
           cudaGetErrorString(error);
  }

  // Allocates exactly `bytes` after the alignment, so that compute-sanitizer notices an access beyond.
  void* allocate(size_t bytes, Guard guard) override {
    const size_t before = guard == Guard::kAfter ? (kLine - bytes % kLine) % kLine : 0;
    void* memory = nullptr;
    cudaMalloc(&memory, before + bytes);
    allocations_.push_back(memory);
    return static_cast<char*>(memory) + before;
  }
  void free_all() override {
    for (void* memory : allocations_) cudaFree(memory);
    allocations_.clear();
  }
  void write(void* to, const void* from, size_t bytes) override { cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice); }
  void read(void* to, const void* from, size_t bytes) override { cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost); }

  Status run(const Call& call, const Variation&, Message* message) override {
    const Status status = gemma_norm_cuda(&call, nullptr, message);
    if (status != Status::kOk) return status;
    const cudaError_t error = cudaDeviceSynchronize();
    if (error == cudaSuccess) return Status::kOk;
    std::snprintf(message->text, sizeof message->text, "%s", cudaGetErrorString(error));
    return Status::kDeviceError;
  }

 private:
  static constexpr size_t kLine = 64;
  std::vector<void*> allocations_;
};

}  // namespace

std::unique_ptr<Target> make_cuda_target() { return std::make_unique<CudaTarget>(); }

}  // namespace gemma_norm
