// From the dispatcher's boxed calls to the C interface: tensors become views, statuses become exceptions. Written once for all
// devices; a Backend supplies the call (see bind_cpu.cpp). Only PyTorch's stable ABI is used, with two exceptions, named next.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

#include "../gemma_norm.h"

// c10::TensorImpl::requires_grad() const and torch::autograd::impl::bump_version(const at::Tensor&). The stable ABI has neither,
// and without them gradients would be wrong in silence: those through the op, and those of other ops that saved what it writes.
// Weak: should a later PyTorch drop a symbol, libraries still load (and a test fails).
extern "C" __attribute__((weak)) bool _ZNK3c1010TensorImpl13requires_gradEv(const void* tensor_impl);
extern "C" __attribute__((weak)) void _ZN5torch8autograd4impl12bump_versionERKN2at6TensorE(const void* tensor);

namespace gemma_norm::binding {

inline void succeed(AOTITorchError error, const char* call) {
  if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error(std::string("gemma_norm: ") + call + " failed");
}

// Owns the reference that the dispatcher hands over, or that a new tensor comes with.
class Handle {
 public:
  explicit Handle(AtenTensorHandle handle = nullptr) : handle_(handle) {}
  Handle(Handle&& other) noexcept : handle_(other.release()) {}
  Handle& operator=(Handle&&) = delete;
  ~Handle() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }
  AtenTensorHandle get() const { return handle_; }
  AtenTensorHandle release() {
    AtenTensorHandle handle = handle_;
    handle_ = nullptr;
    return handle;
  }
  explicit operator bool() const { return handle_ != nullptr; }

 private:
  AtenTensorHandle handle_;
};

struct Device {
  int32_t type, index;
};

inline Device device_of(const Handle& t) {
  Device device;
  succeed(aoti_torch_get_device_type(t.get(), &device.type), "get_device_type");
  succeed(aoti_torch_get_device_index(t.get(), &device.index), "get_device_index");
  return device;
}

inline std::string to_string(Device device) {
  std::string name = device.type == aoti_torch_device_type_cpu()    ? "cpu"
                     : device.type == aoti_torch_device_type_cuda() ? "cuda"
                     : device.type == aoti_torch_device_type_meta() ? "meta"
                                                                    : "device type " + std::to_string(device.type);
  return device.index < 0 || name == "cpu" ? name : name + ":" + std::to_string(device.index);
}

inline const char* dtype_name(int32_t dtype) {
  using torch::headeronly::ScalarType;
  switch (static_cast<ScalarType>(dtype)) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return torch::headeronly::toString(static_cast<ScalarType>(dtype));
  }
}

inline DType to_dtype(int32_t dtype) {
  using torch::headeronly::ScalarType;
  switch (static_cast<ScalarType>(dtype)) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: return DType::kOther;
  }
}

inline Tensor view(const Handle& t) {
  Tensor v;
  int64_t dims, *sizes, *strides;
  int32_t dtype;
  succeed(aoti_torch_get_data_ptr(t.get(), &v.data), "get_data_ptr");
  succeed(aoti_torch_get_dim(t.get(), &dims), "get_dim");
  succeed(aoti_torch_get_sizes(t.get(), &sizes), "get_sizes");
  succeed(aoti_torch_get_strides(t.get(), &strides), "get_strides");
  succeed(aoti_torch_get_dtype(t.get(), &dtype), "get_dtype");
  v.sizes = sizes;
  v.strides = strides;
  v.dims = static_cast<int32_t>(dims);
  v.dtype = to_dtype(dtype);
  v.dtype_name = dtype_name(dtype);
  return v;
}

// A new row-major tensor of t's shape, dtype and device.
inline Handle empty_contiguous_like(const Handle& t, Device device) {
  int64_t dims, *sizes, strides[64];
  int32_t dtype;
  succeed(aoti_torch_get_dim(t.get(), &dims), "get_dim");
  succeed(aoti_torch_get_sizes(t.get(), &sizes), "get_sizes");
  succeed(aoti_torch_get_dtype(t.get(), &dtype), "get_dtype");
  if (dims > 64) throw std::runtime_error("gemma_norm: x must have at most 64 dimensions, got " + std::to_string(dims));
  int64_t step = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[d] = step;
    step *= sizes[d] > 1 ? sizes[d] : 1;
  }
  AtenTensorHandle handle;
  succeed(aoti_torch_empty_strided(dims, sizes, strides, dtype, device.type, device.index, &handle), "empty_strided");
  return Handle(handle);
}

inline bool needs_grad(const Handle& t) {
  // An AtenTensorHandle points to an at::Tensor, which is one pointer to its TensorImpl.
  return _ZNK3c1010TensorImpl13requires_gradEv && _ZNK3c1010TensorImpl13requires_gradEv(*reinterpret_cast<void* const*>(t.get()));
}

// For autograd: t's values change. Refused by PyTorch for an inference tensor outside inference mode, hence before the call.
inline void announce_write(const Handle& t) {
  if (_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE) _ZN5torch8autograd4impl12bump_versionERKN2at6TensorE(t.get());
}

struct NamedTensor {
  const char* name;
  const Handle& tensor;
};

// What only tensors know: their devices, and whether a gradient is expected. `differentiable` names what to call instead.
inline void check_tensors(const char* op, const char* differentiable, Device device, std::initializer_list<NamedTensor> others) {
  for (const auto& [name, tensor] : others) {
    if (!tensor) continue;
    const Device got = device_of(tensor);
    if (got.type != device.type || got.index != device.index)
      throw std::runtime_error(std::string(op) + ": " + name + " must be on x's device " + to_string(device) + ", got " +
                               to_string(got));
  }
  if (!aoti_torch_grad_mode_is_enabled()) return;
  for (const auto& [name, tensor] : others)
    if (tensor && needs_grad(tensor))
      throw std::runtime_error(std::string(op) + ": " + name +
                               " must not require grad while grad mode is enabled, got requires_grad=True;" +
                               " torch.ops.gemma_norm records no gradient: call " + differentiable +
                               ", which is differentiable, or use torch.no_grad()");
}

template <class T>
T argument(StableIValue value) {
  return torch::stable::detail::to<T>(value);
}

inline Handle tensor_argument(StableIValue value) { return Handle(argument<AtenTensorHandle>(value)); }

inline Handle optional_tensor_argument(StableIValue value) {
  return Handle(argument<std::optional<AtenTensorHandle>>(value).value_or(nullptr));
}

inline StableIValue result(Handle&& t) { return torch::stable::detail::from(t.release()); }

// Checks and runs one call; `out` and `residual_out` may be x and residual themselves.
template <class Backend>
void run(const char* op, Device device, const Handle& x, const Handle& weight, const Handle& out, const Handle& residual,
         const Handle& post, const Handle& residual_out, StableIValue eps, StableIValue gemma) {
  NormArgs args{op, view(x), view(weight), view(out), nullptr, nullptr, nullptr, argument<double>(eps), argument<bool>(gemma)};
  Tensor residual_view, post_view, residual_out_view;
  if (residual) args.residual = &(residual_view = view(residual));
  if (post) args.post_residual_addition = &(post_view = view(post));
  if (residual_out) args.residual_out = &(residual_out_view = view(residual_out));
  Message message;
  const Status status = Backend::run(args, device.index, &message);
  if (status != Status::kOk) throw std::runtime_error(message.text);
}

// The boxed kernels: `stack` holds the arguments in schema order and takes the results. See schema.cpp.
template <class Backend>
void rms_norm(StableIValue* stack, uint64_t, uint64_t) {
  const Handle x = tensor_argument(stack[0]), weight = tensor_argument(stack[1]), none;
  const Device device = device_of(x);
  check_tensors("rms_norm", "gemma_norm.rms_norm", device, {{"x", x}, {"weight", weight}});
  Handle out = empty_contiguous_like(x, device);
  run<Backend>("rms_norm", device, x, weight, out, none, none, none, stack[2], stack[3]);
  stack[0] = result(std::move(out));
}

template <class Backend>
void rms_norm_out(StableIValue* stack, uint64_t, uint64_t) {
  const Handle x = tensor_argument(stack[0]), weight = tensor_argument(stack[1]), none;
  Handle out = tensor_argument(stack[4]);
  const Device device = device_of(x);
  check_tensors("rms_norm", "gemma_norm.rms_norm without out", device, {{"x", x}, {"weight", weight}, {"out", out}});
  announce_write(out);
  run<Backend>("rms_norm", device, x, weight, out, none, none, none, stack[2], stack[3]);
  stack[0] = result(std::move(out));
}

template <class Backend>
void fused_add_rms_norm(StableIValue* stack, uint64_t, uint64_t) {
  const Handle x = tensor_argument(stack[0]), residual = tensor_argument(stack[1]), weight = tensor_argument(stack[2]);
  const Handle post = optional_tensor_argument(stack[5]);
  const Device device = device_of(x);
  check_tensors("fused_add_rms_norm", "gemma_norm.add_rms_norm", device,
                {{"x", x}, {"residual", residual}, {"weight", weight}, {"post_residual_addition", post}});
  announce_write(x);
  announce_write(residual);
  run<Backend>("fused_add_rms_norm", device, x, weight, x, residual, post, residual, stack[3], stack[4]);
}

template <class Backend>
void add_rms_norm(StableIValue* stack, uint64_t, uint64_t) {
  const Handle x = tensor_argument(stack[0]), residual = tensor_argument(stack[1]), weight = tensor_argument(stack[2]);
  const Handle post = optional_tensor_argument(stack[5]);
  const Device device = device_of(x);
  check_tensors("add_rms_norm", "gemma_norm.add_rms_norm", device,
                {{"x", x}, {"residual", residual}, {"weight", weight}, {"post_residual_addition", post}});
  Handle out = empty_contiguous_like(x, device), residual_out = empty_contiguous_like(x, device);
  run<Backend>("add_rms_norm", device, x, weight, out, residual, post, residual_out, stack[3], stack[4]);
  stack[0] = result(std::move(out));
  stack[1] = result(std::move(residual_out));
}

template <class Backend>
void register_ops(torch::stable::detail::StableLibrary& library) {
  library.impl("rms_norm", &rms_norm<Backend>);
  library.impl("rms_norm.out", &rms_norm_out<Backend>);
  library.impl("fused_add_rms_norm", &fused_add_rms_norm<Backend>);
  library.impl("add_rms_norm", &add_rms_norm<Backend>);
}

}  // namespace gemma_norm::binding
