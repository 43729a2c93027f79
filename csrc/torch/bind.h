// From the dispatcher's boxed calls to the C interface: tensors become views, statuses become exceptions. Written once for all
// devices; a Backend supplies the call (see bind_cpu.cpp). Only PyTorch's stable ABI is used, with the exceptions named next.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cctype>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

#include "../ops/ops.h"

// What the stable ABI lacks, and without which derivatives would be wrong in silence. All of it is weak: should a later PyTorch
// drop a symbol, the libraries still load, and a test fails.
extern "C" {
// c10::TensorImpl::requires_grad() const
__attribute__((weak)) bool _ZNK3c1010TensorImpl13requires_gradEv(const void* tensor_impl);
// c10::TensorImpl::_fw_grad(uint64_t level, const at::TensorBase& self) const, the tangent of forward-mode differentiation; and
// c10::UndefinedTensorImpl::_singleton, to which a tensor points that is none.
__attribute__((weak)) const void* const& _ZNK3c1010TensorImpl8_fw_gradEmRKN2at10TensorBaseE(const void* tensor_impl, uint64_t level,
                                                                                            const void* tensor);
extern __attribute__((weak)) const char _ZN3c1019UndefinedTensorImpl10_singletonE[];
// torch::autograd::impl::bump_version(const at::Tensor&): tells the graphs that saved a tensor that its values change.
__attribute__((weak)) void _ZN5torch8autograd4impl12bump_versionERKN2at6TensorE(const void* tensor);
// Part of the stable ABI from PyTorch 2.13 on: the text of the exception behind a failed call.
__attribute__((weak)) const char* torch_exception_get_what_without_backtrace();
}

namespace gemma_norm::binding {

inline void succeed(AOTITorchError error, const char* call) {
  if (error == AOTI_TORCH_SUCCESS) return;
  std::string message = std::string("gemma_norm: ") + call + " failed";
  if (torch_exception_get_what_without_backtrace) message += std::string(": ") + torch_exception_get_what_without_backtrace();
  throw std::runtime_error(message);
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

struct NamedTensor {
  const char* name;
  const Handle& tensor;
};

// The device of an argument of `op`. Only an undefined tensor has none, which is what PyTorch makes of None.
inline Device device_of(const char* op, const NamedTensor& argument) {
  Device device;
  if (aoti_torch_get_device_type(argument.tensor.get(), &device.type) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error(std::string(op) + ": " + argument.name + " must be a tensor, got None");
  succeed(aoti_torch_get_device_index(argument.tensor.get(), &device.index), "get_device_index");
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
    default: break;
  }
  // Python's name of every other dtype is C++'s in lower case: float8_e4m3fn, uint16.
  static const auto names = [] {
    std::array<std::string, static_cast<size_t>(ScalarType::NumOptions) + 1> all;
    for (size_t i = 0; i < all.size(); ++i)
      for (const char* c = torch::headeronly::toString(static_cast<ScalarType>(i)); *c; ++c)
        all[i] += static_cast<char>(std::tolower(static_cast<unsigned char>(*c)));
    return all;
  }();
  return dtype >= 0 && dtype < static_cast<int32_t>(names.size()) ? names[dtype].c_str() : "an unknown dtype";
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

// What a failed allocation is reported as: in PyTorch's own words, by which programs know that a smaller batch may help.
// Before 2.13 its reason cannot be had, and it is memory that is short.
inline std::runtime_error allocation_error(Device device, int64_t elements, int32_t dtype) {
  if (torch_exception_get_what_without_backtrace) return std::runtime_error(torch_exception_get_what_without_backtrace());
  const std::string bytes = std::to_string(elements * size_of(to_dtype(dtype))) + " bytes";
  return std::runtime_error(device.type == aoti_torch_device_type_cpu()
                                ? "DefaultCPUAllocator: can't allocate memory: you tried to allocate " + bytes
                                : "CUDA out of memory. Tried to allocate " + bytes);
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
  if (aoti_torch_empty_strided(dims, sizes, strides, dtype, device.type, device.index, &handle) != AOTI_TORCH_SUCCESS)
    throw allocation_error(device, step, dtype);
  return Handle(handle);
}

// An AtenTensorHandle points to an at::Tensor, which is one pointer to its TensorImpl.
inline const void* implementation(const Handle& t) { return *reinterpret_cast<const void* const*>(t.get()); }

inline bool requires_grad(const Handle& t) {
  return _ZNK3c1010TensorImpl13requires_gradEv && _ZNK3c1010TensorImpl13requires_gradEv(implementation(t));
}

// PyTorch has one level of forward-mode differentiation, 0.
inline bool has_tangent(const Handle& t) {
  return _ZNK3c1010TensorImpl8_fw_gradEmRKN2at10TensorBaseE &&
         _ZNK3c1010TensorImpl8_fw_gradEmRKN2at10TensorBaseE(implementation(t), 0, t.get()) !=
             static_cast<const void*>(_ZN3c1019UndefinedTensorImpl10_singletonE);
}

// What only tensors know: their devices, and whether a derivative is expected. `differentiable` names what to call instead.
inline void check_tensors(const char* op, const char* differentiable, Device device, std::initializer_list<NamedTensor> tensors) {
  for (const NamedTensor& argument : tensors) {
    if (!argument.tensor) continue;
    const Device got = device_of(op, argument);
    if (got.type != device.type || got.index != device.index)
      throw std::runtime_error(std::string(op) + ": " + argument.name + " must be on x's device " + to_string(device) + ", got " +
                               to_string(got));
  }
  const bool recording = aoti_torch_grad_mode_is_enabled();
  for (const auto& [name, tensor] : tensors) {
    if (!tensor) continue;
    if (recording && requires_grad(tensor))
      throw std::runtime_error(std::string(op) + ": " + name +
                               " must not require grad while grad mode is enabled, got requires_grad=True;" +
                               " torch.ops.gemma_norm records no gradient: call " + differentiable +
                               ", which is differentiable, or use torch.no_grad()");
    if (has_tangent(tensor))
      throw std::runtime_error(std::string(op) + ": " + name + " must not have a tangent, got a dual tensor;" +
                               " torch.ops.gemma_norm records no derivative: call " + differentiable + ", which is differentiable");
  }
}

// The outputs that existed before the call, which autograd is told of once the checks have passed. PyTorch refuses an inference
// tensor outside of inference mode here, before it is written.
struct Written {
  const Handle& out;
  const Handle& residual_out;

  static void announce(const void* written) {
    const auto& [out, residual_out] = *static_cast<const Written*>(written);
    if (!_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE) return;
    _ZN5torch8autograd4impl12bump_versionERKN2at6TensorE(out.get());
    if (residual_out) _ZN5torch8autograd4impl12bump_versionERKN2at6TensorE(residual_out.get());
  }
};

template <class T>
T argument(StableIValue value) {
  return torch::stable::detail::to<T>(value);
}

inline Handle tensor_argument(StableIValue value) { return Handle(argument<AtenTensorHandle>(value)); }

inline Handle optional_tensor_argument(StableIValue value) {
  return Handle(argument<std::optional<AtenTensorHandle>>(value).value_or(nullptr));
}

inline StableIValue result(Handle&& t) { return torch::stable::detail::from(t.release()); }

// Checks and runs one call; `out` and `residual_out` may be x and residual themselves. `written`: those of them that are arguments.
template <class Backend>
void run(const OpInfo& op, Device device, const Handle& x, const Handle& weight, const Handle& out, const Handle& residual,
         const Handle& post, const Handle& residual_out, StableIValue eps, StableIValue gemma, const Written* written = nullptr) {
  Call call{&op, {}, argument<double>(eps), argument<bool>(gemma)};
  if (written) {
    call.before_write = &Written::announce;
    call.context = written;
  }
  const Handle* const handles[kOperands] = {&x, &weight, &residual, &post, &out, &residual_out};
  Tensor views[kOperands];
  for (int o = 0; o < kOperands; ++o)
    if (*handles[o]) call.tensors[o] = &(views[o] = view(*handles[o]));
  Message message;
  const Status status = Backend::run(call, device.index, &message);
  if (status != Status::kOk) throw std::runtime_error(message.text);
}

// The boxed kernels: `stack` holds the arguments in schema order and takes the results. See schema.cpp.
template <class Backend>
void rms_norm(StableIValue* stack, uint64_t, uint64_t) {
  const Handle x = tensor_argument(stack[0]), weight = tensor_argument(stack[1]), none;
  const Device device = device_of("rms_norm", {"x", x});
  check_tensors("rms_norm", "gemma_norm.rms_norm", device, {{"x", x}, {"weight", weight}});
  Handle out = empty_contiguous_like(x, device);
  run<Backend>(RmsNorm::kInfos[0], device, x, weight, out, none, none, none, stack[2], stack[3]);
  stack[0] = result(std::move(out));
}

template <class Backend>
void rms_norm_out(StableIValue* stack, uint64_t, uint64_t) {
  const Handle x = tensor_argument(stack[0]), weight = tensor_argument(stack[1]), none;
  Handle out = tensor_argument(stack[4]);
  const Device device = device_of("rms_norm", {"x", x});
  check_tensors("rms_norm", "gemma_norm.rms_norm without out", device, {{"x", x}, {"weight", weight}, {"out", out}});
  const Written written{out, none};
  run<Backend>(RmsNorm::kInfos[1], device, x, weight, out, none, none, none, stack[2], stack[3], &written);
  stack[0] = result(std::move(out));
}

template <class Backend>
void fused_add_rms_norm(StableIValue* stack, uint64_t, uint64_t) {
  const Handle x = tensor_argument(stack[0]), residual = tensor_argument(stack[1]), weight = tensor_argument(stack[2]);
  const Handle post = optional_tensor_argument(stack[5]);
  const Device device = device_of("fused_add_rms_norm", {"x", x});
  check_tensors("fused_add_rms_norm", "gemma_norm.add_rms_norm", device,
                {{"x", x}, {"residual", residual}, {"weight", weight}, {"post_residual_addition", post}});
  const Written written{x, residual};
  run<Backend>(AddRmsNorm::kInfos[1], device, x, weight, x, residual, post, residual, stack[3], stack[4], &written);
}

template <class Backend>
void add_rms_norm(StableIValue* stack, uint64_t, uint64_t) {
  const Handle x = tensor_argument(stack[0]), residual = tensor_argument(stack[1]), weight = tensor_argument(stack[2]);
  const Handle post = optional_tensor_argument(stack[5]);
  const Device device = device_of("add_rms_norm", {"x", x});
  check_tensors("add_rms_norm", "gemma_norm.add_rms_norm", device,
                {{"x", x}, {"residual", residual}, {"weight", weight}, {"post_residual_addition", post}});
  Handle out = empty_contiguous_like(x, device), residual_out = empty_contiguous_like(x, device);
  run<Backend>(AddRmsNorm::kInfos[0], device, x, weight, out, residual, post, residual_out, stack[3], stack[4]);
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
