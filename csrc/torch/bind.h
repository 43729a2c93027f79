// From the dispatcher's boxed calls to the C interface: tensors become views, and statuses become exceptions. This is
// the same for all devices, except that an Entry makes the call of the device's own C function (see bind_cpu.cpp). Only
// PyTorch's stable ABI is used, except for the symbols declared here.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "../core/check.h"
#include "../ops/ops.h"
#include "arguments.h"

// What the stable ABI lacks. Without it, derivatives would be wrong in silence. All symbols are weak: if a later
// PyTorch drops one, the libraries still load, and a test fails.
extern "C" {
// c10::TensorImpl::requires_grad() const
__attribute__((weak)) bool _ZNK3c1010TensorImpl13requires_gradEv(const void* tensor_impl);
// c10::TensorImpl::_fw_grad(uint64_t level, const at::TensorBase& self) const, which returns the tangent of
// forward-mode differentiation; and c10::UndefinedTensorImpl::_singleton, to which an undefined tensor points.
__attribute__((weak)) const void* const& _ZNK3c1010TensorImpl8_fw_gradEmRKN2at10TensorBaseE(const void* tensor_impl,
                                                                                            uint64_t level,
                                                                                            const void* tensor);
extern __attribute__((weak)) const char _ZN3c1019UndefinedTensorImpl10_singletonE[];
// at::native::is_inference(const at::Tensor&) and c10::InferenceMode::is_enabled()
__attribute__((weak)) bool _ZN2at6native12is_inferenceERKNS_6TensorE(const void* tensor);
__attribute__((weak)) bool _ZN3c1013InferenceMode10is_enabledEv();
// torch::autograd::impl::bump_version(const at::Tensor&), from which graphs that saved a tensor learn that its values
// have changed.
__attribute__((weak)) void _ZN5torch8autograd4impl12bump_versionERKN2at6TensorE(const void* tensor);
// The text of the exception behind a failed call. Part of the stable ABI since PyTorch 2.13.
__attribute__((weak)) const char* torch_exception_get_what_without_backtrace();
}

namespace gemma_norm::binding {

inline void require_success(AOTITorchError error, const char* call) {
  if (error == AOTI_TORCH_SUCCESS) return;
  std::string message = std::string("gemma_norm: ") + call + " failed";
  if (torch_exception_get_what_without_backtrace)
    message += std::string(": ") + torch_exception_get_what_without_backtrace();
  throw std::runtime_error(message);
}

// Owns a reference to a tensor: one that the dispatcher has handed over, or that of a new tensor.
class Handle {
 public:
  explicit Handle(AtenTensorHandle handle = nullptr) : handle_(handle) {}
  Handle(Handle&& other) noexcept : handle_(other.release()) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
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

// The device of an argument of `op`. Only an undefined tensor has none; PyTorch passes None as one.
inline Device device_of(const OpInfo& op, Operand argument, const Handle& tensor) {
  Device device;
  if (aoti_torch_get_device_type(tensor.get(), &device.type) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error(std::string(op.name) + ": " + op.name_of(argument) + " must be a tensor, got None");
  require_success(aoti_torch_get_device_index(tensor.get(), &device.index), "get_device_index");
  return device;
}

inline std::string to_string(Device device) {
  std::string name = device.type == aoti_torch_device_type_cpu()    ? "cpu"
                     : device.type == aoti_torch_device_type_cuda() ? "cuda"
                     : device.type == aoti_torch_device_type_meta() ? "meta"
                                                                    : "device type " + std::to_string(device.type);
  return device.index < 0 || name == "cpu" ? name : name + ":" + std::to_string(device.index);
}

inline Tensor view(const Handle& t) {
  Tensor v;
  int64_t dims, *sizes, *strides;
  int32_t dtype;
  require_success(aoti_torch_get_data_ptr(t.get(), &v.data), "get_data_ptr");
  require_success(aoti_torch_get_dim(t.get(), &dims), "get_dim");
  require_success(aoti_torch_get_sizes(t.get(), &sizes), "get_sizes");
  require_success(aoti_torch_get_strides(t.get(), &strides), "get_strides");
  require_success(aoti_torch_get_dtype(t.get(), &dtype), "get_dtype");
  v.sizes = sizes;
  v.strides = strides;
  v.dims = static_cast<int32_t>(dims);
  v.dtype = to_dtype(dtype);
  v.dtype_name = dtype_name(dtype);
  return v;
}

// The error for a failed allocation. It has PyTorch's own words, by which programs recognise that a smaller batch may
// help. Before PyTorch 2.13 the stable ABI does not give them, so the words of the likely reason, too little memory,
// are repeated here.
inline std::runtime_error allocation_error(Device device, int64_t size) {
  if (torch_exception_get_what_without_backtrace)
    return std::runtime_error(torch_exception_get_what_without_backtrace());
  const std::string bytes = std::to_string(size) + " bytes";
  return std::runtime_error(device.type == aoti_torch_device_type_cpu()
                                ? "DefaultCPUAllocator: can't allocate memory: you tried to allocate " + bytes
                                : "CUDA out of memory. Tried to allocate " + bytes);
}

inline Handle empty(Device device, int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                    int64_t bytes) {
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(dims, sizes, strides, dtype, device.type, device.index, &handle) != AOTI_TORCH_SUCCESS)
    throw allocation_error(device, bytes);
  return Handle(handle);
}

// The shape of a tensor that is yet to be made.
struct Shape {
  int64_t dims, sizes[kMaxDims];

  Shape(const OpInfo& op, const Handle& t) {
    int64_t* of;
    require_success(aoti_torch_get_dim(t.get(), &dims), "get_dim");
    require_success(aoti_torch_get_sizes(t.get(), &of), "get_sizes");
    if (dims > kMaxDims)
      throw std::runtime_error(std::string(op.name) + ": " + op.name_of(kX) + " must have at most " +
                               std::to_string(kMaxDims) + " dimensions, got " + std::to_string(dims));
    for (int64_t d = 0; d < dims; ++d) sizes[d] = of[d];
  }

  Shape& without_heads() {
    if (dims > 1) sizes[dims - 2] = 0;
    return *this;
  }

  // A row-major tensor; or one whose last dimension is the outermost in memory, with a stride that is a multiple of
  // `alignment`, and whose others are row-major.
  Handle make(Device device, int32_t dtype, bool column_major = false, int64_t alignment = 1) const {
    int64_t step = 1, strides[kMaxDims];
    for (int64_t i = 0; i < dims; ++i) {
      const int64_t d = column_major ? (2 * dims - 2 - i) % dims : dims - 1 - i;
      if (column_major && i == dims - 1) step = (step + alignment - 1) / alignment * alignment;
      strides[d] = step;
      step *= sizes[d] > 1 ? sizes[d] : 1;
    }
    return empty(device, dims, sizes, strides, dtype, step * size_of(to_dtype(dtype)));
  }
};

// The tensor whose shape and dtype a new output has, or most of them.
constexpr Operand like_of(const OperandRule& rule) {
  return rule.dtypes == DTypes::kLikeResidual ? kResidual
         : rule.dtypes == DTypes::kLikeWeight ? kWeight
         : rule.extent == Extent::kHeads      ? rule.in_place_of
                                              : kX;
}

inline int32_t dtype_of(const Handle& t) {
  int32_t dtype;
  require_success(aoti_torch_get_dtype(t.get(), &dtype), "get_dtype");
  return dtype;
}

// A new tensor for the output of `rule`. Options are not checked yet.
inline Handle new_output(const OpInfo& op, const OperandRule& rule, const Options& options, const Handle& alike,
                         Device device) {
  Shape shape(op, alike);
  if (rule.extent != Extent::kScales && rule.extent != Extent::kCodes) return shape.make(device, dtype_of(alike));
  int64_t none = 0, &last = shape.dims > 0 ? shape.sizes[shape.dims - 1] : none;
  if (rule.extent == Extent::kCodes) {
    if (is_packed(options.dtype)) last /= 2;
    return shape.make(device, to_scalar_type(options.dtype));
  }
  const int64_t size = options.scale_group_size;
  last = size > 0 && size <= last ? last / size : 1;
  const bool packed = options.scale_dtype == DType::kInt32;
  if (packed) last = (last + 3) / 4;
  return shape.make(device, to_scalar_type(options.scale_dtype), packed || options.column_major_scale, packed ? 4 : 1);
}

// An AtenTensorHandle points to an at::Tensor, which is one pointer to its TensorImpl.
inline const void* implementation(const Handle& t) { return *reinterpret_cast<const void* const*>(t.get()); }

inline bool requires_grad(const Handle& t) {
  return _ZNK3c1010TensorImpl13requires_gradEv && _ZNK3c1010TensorImpl13requires_gradEv(implementation(t));
}

// PyTorch has only one level of forward-mode differentiation, level 0.
inline bool has_tangent(const Handle& t) {
  return _ZNK3c1010TensorImpl8_fw_gradEmRKN2at10TensorBaseE &&
         _ZNK3c1010TensorImpl8_fw_gradEmRKN2at10TensorBaseE(implementation(t), 0, t.get()) !=
             static_cast<const void*>(_ZN3c1019UndefinedTensorImpl10_singletonE);
}

// The checks that need PyTorch's tensors: that all are on x's device, and that no derivative is expected.
inline void check_tensors(const OpInfo& op, Device device, const Handle (&tensors)[kOperands]) {
  const std::string_view name = op.name;
  const auto refuse = [&](const OperandRule& rule, const std::string& text) {
    throw std::runtime_error(std::string(name) + ": " + rule.name_of() + text);
  };
  for (const OperandRule& rule : op) {
    if (!tensors[rule.operand]) continue;
    const Device got = device_of(op, rule.operand, tensors[rule.operand]);
    if (got.type != device.type || got.index != device.index)
      refuse(rule, std::string(" must be on ") + op.name_of(kX) + "'s device " + to_string(device) + ", got " +
                       to_string(got));
  }
  const bool recording = aoti_torch_grad_mode_is_enabled();
  for (const OperandRule& rule : op) {
    const Handle& tensor = tensors[rule.operand];
    if (!tensor) continue;
    if (recording && requires_grad(tensor))
      refuse(rule, std::string(" must not require grad while grad mode is enabled, got requires_grad=True;"
                               " this operator records no gradient: call gemma_norm.") +
                       op.differentiable + ", which is differentiable, or use torch.no_grad()");
    if (has_tangent(tensor))
      refuse(rule, std::string(" must not have a tangent, got a dual tensor;"
                               " this operator records no derivative: call gemma_norm.") +
                       op.differentiable + ", which is differentiable");
  }
}

// What the C interface asks for while it runs a call (see Call).
//
// The outputs that are arguments are listed here: autograd must be told that they are written, after the last check and
// before the first write.
struct Services {
  const OpInfo& op;
  const Device device;
  const Handle* tensors[kOperands];
  Operand operands[kOperands];
  int count = 0;
  Handle memory;

  void add(Operand operand, const Handle& tensor) {
    operands[count] = operand;
    tensors[count++] = &tensor;
  }

  // All of them are checked before autograd is told of any, because a bumped version cannot be taken back.
  static void before_write(void* services) {
    const Services& w = *static_cast<const Services*>(services);
    if (_ZN3c1013InferenceMode10is_enabledEv && _ZN2at6native12is_inferenceERKNS_6TensorE &&
        !_ZN3c1013InferenceMode10is_enabledEv())
      for (int i = 0; i < w.count; ++i)
        if (_ZN2at6native12is_inferenceERKNS_6TensorE(w.tensors[i]->get()))
          throw std::runtime_error(
              std::string(w.op.name) + ": " + w.op.name_of(w.operands[i]) +
              " is written and must not be an inference tensor outside of torch.inference_mode()," +
              " got one; clone it there");
    if (!_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE) return;
    for (int i = 0; i < w.count; ++i) _ZN5torch8autograd4impl12bump_versionERKN2at6TensorE(w.tensors[i]->get());
  }

  // Memory of PyTorch's allocator. It is given back when the call returns; work of the same stream that gets it next
  // runs after this call's.
  static void* scratch(void* services, int64_t bytes) {
    Services& s = *static_cast<Services*>(services);
    const int64_t size = bytes, stride = 1;
    s.memory = empty(s.device, 1, &size, &stride, aoti_torch_dtype_uint8(), bytes);
    void* data;
    require_success(aoti_torch_get_data_ptr(s.memory.get(), &data), "get_data_ptr");
    return data;
  }
};

// A boxed kernel. `stack` holds the arguments in the order of the schema, and receives the results.
template <class Entry, class Op, int kInfo>
void boxed(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const OpInfo& op = Op::kInfos[kInfo];
  static constexpr Arguments arguments(op);
  Handle tensors[kOperands];
  Call call{&op, {}, {}};
  for (int i = 0; i < arguments.count; ++i) {
    const auto [operand, is_optional, option] = arguments.list[i];
    if (option)
      set_option(&call.options, *option, stack[i]);
    else if (is_optional)
      tensors[operand] = Handle(argument<std::optional<AtenTensorHandle>>(stack[i]).value_or(nullptr));
    else
      tensors[operand] = Handle(argument<AtenTensorHandle>(stack[i]));
  }
  const Device device = device_of(op, kX, tensors[kX]);
  check_tensors(op, device, tensors);

  Tensor views[kOperands];
  Services services{op, device, {}, {}, 0, Handle()};
  for (const OperandRule& rule : op) {
    const Operand place = rule.use == Use::kInPlace ? rule.in_place_of : rule.operand;
    if (rule.use == Use::kNew) {
      const Operand alike = like_of(rule);
      if (!tensors[alike]) {
        tensors[place] = Shape(op, tensors[kX]).without_heads().make(device, dtype_of(tensors[kX]));
        continue;
      }
      tensors[place] = new_output(op, rule, call.options, tensors[alike], device);
    }
    if (rule.use == Use::kInPlace || rule.use == Use::kWritten) services.add(place, tensors[place]);
    if (!tensors[place]) continue;
    if (place == rule.operand) views[place] = view(tensors[place]);
    call.tensors[rule.operand] = &views[place];
  }
  if (services.count > 0) call.before_write = &Services::before_write;
  call.scratch = &Services::scratch;
  call.context = &services;
  Message message;
  if (Entry::call(call, device.index, &message) != Status::kOk) throw std::runtime_error(message.text);

  int results = 0;
  for (const OperandRule& rule : op)
    if (rule.use == Use::kNew || rule.use == Use::kWritten)
      stack[results++] = torch::stable::detail::from(tensors[rule.operand].release());
}

template <class Entry, class Op, int kInfo = 0>
void register_op(torch::stable::detail::StableLibrary& library) {
  constexpr const OpInfo& op = Op::kInfos[kInfo];
  library.impl(op.torch_name, &boxed<Entry, Op, kInfo>);
  if constexpr (has_twin(op)) library.impl((std::string("_") + op.torch_name).c_str(), &boxed<Entry, Op, kInfo>);
  if constexpr (kInfo + 1 < sizeof Op::kInfos / sizeof Op::kInfos[0]) register_op<Entry, Op, kInfo + 1>(library);
}

template <class Entry>
void register_ops(torch::stable::detail::StableLibrary& library) {
  Ops::each([&](auto op) { register_op<Entry, decltype(op)>(library); });
}

}  // namespace gemma_norm::binding
