// Stands in for cuda_target.cpp in a build without nvcc.
#include "target.h"

namespace gemma_norm {
namespace {

class NoCudaTarget : public HostTarget {
 public:
  std::string name() const override { return "cuda"; }
  std::string missing() const override {
    return "needs nvcc: install the CUDA toolkit and build with cmake -DGEMMA_NORM_CUDA=ON";
  }
  Status run(const Call&, const Variation&, Message*) override { return Status::kDeviceError; }
};

}  // namespace

std::unique_ptr<Target> make_cuda_target() { return std::make_unique<NoCudaTarget>(); }

}  // namespace gemma_norm
