// What the CUDA and the HIP library share: they run on the current stream of x's device. PyTorch calls both kinds of
// device "cuda".
#pragma once

#include "bind.h"

// Only PyTorch's CUDA and ROCm builds have this function. It is weak so that the library loads with a CPU build too,
// and its calls explain what is wrong.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace gemma_norm::binding {

template <Status (*launch)(const Call*, void* stream, Message*)>
struct GpuEntry {
  static Status call(const Call& call, int32_t device_index, Message* message) {
    if (!aoti_torch_get_current_cuda_stream)
      throw std::runtime_error(std::string(call.op->name) + ": this PyTorch has no CUDA or ROCm support");
    const Guard guard(device_index);
    void* stream;
    require_success(aoti_torch_get_current_cuda_stream(device_index, &stream), "get_current_cuda_stream");
    return launch(&call, stream, message);
  }

 private:
  // Makes `device_index` the current device, and the previous one at the end. If it is current already, this takes one
  // query.
  struct Guard {
    DeviceGuardHandle guard = nullptr;
    explicit Guard(int32_t device_index) {
      int32_t current;
      require_success(aoti_torch_get_current_device_index(&current), "get_current_device_index");
      if (current != device_index)
        require_success(aoti_torch_create_device_guard(device_index, &guard), "create_device_guard");
    }
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;
    ~Guard() {
      if (guard) aoti_torch_delete_device_guard(guard);
    }
  };
};

}  // namespace gemma_norm::binding
