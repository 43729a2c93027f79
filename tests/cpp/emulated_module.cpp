// For tests/python/test_emulated.py: the emulated kernels on memory that Python owns.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cases.h"
#include "emulated.h"
#include "gpu/plan.h"

namespace py = pybind11;

namespace gemma_norm {
namespace {

DType dtype_of(const std::string& name) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
    if (name == dtype_name(dtype)) return dtype;
  static const std::map<std::string, DType> kQuantized = {{"int8", DType::kInt8},
                                                          {"float8_e4m3fn", DType::kFloat8E4M3FN},
                                                          {"float8_e4m3fnuz", DType::kFloat8E4M3FNUZ},
                                                          {"float8_e5m2", DType::kFloat8E5M2},
                                                          {"float4_e2m1fn_x2", DType::kFloat4E2M1FNx2},
                                                          {"float8_e8m0fnu", DType::kFloat8E8M0FNU},
                                                          {"int32", DType::kInt32}};
  const auto found = kQuantized.find(name);
  return found == kQuantized.end() ? DType::kOther : found->second;
}

// A tensor as Python describes it; strides count elements.
struct Memory {
  uintptr_t address;
  std::vector<int64_t> sizes, strides;
  std::string dtype;

  Tensor tensor() const {
    return {reinterpret_cast<void*>(address),   sizes.data(),    strides.data(),
            static_cast<int32_t>(sizes.size()), dtype_of(dtype), dtype.c_str()};
  }
};

void run(const std::string& op, const std::map<std::string, Memory>& tensors, double eps, bool gemma,
         const EmulatedGpu& gpu, bool round_each_step, bool sigmoid, bool norm_before_gate,
         std::optional<int64_t> group_size, const std::string& dtype, std::optional<int64_t> scale_group_size,
         bool round_first, bool scale_ue8m0, const std::string& scale_dtype) {
  Options options;
  options.eps = eps;
  options.gemma = gemma;
  options.round_each_step = round_each_step;
  options.sigmoid = sigmoid;
  options.norm_before_gate = norm_before_gate;
  options.group_size = group_size.value_or(kWholeRow);
  options.dtype = dtype_of(dtype);
  options.dtype_name = dtype.c_str();
  options.scale_group_size = scale_group_size.value_or(kWholeRow);
  options.round_first = round_first;
  options.scale_ue8m0 = scale_ue8m0;
  options.scale_dtype = dtype_of(scale_dtype);
  options.scale_dtype_name = scale_dtype.c_str();
  Call call{gemma_norm_op(op.c_str()), {}, options};
  Tensor views[kOperands];
  for (int o = 0; o < kOperands; ++o)
    if (const auto found = tensors.find(call.op->name_of(static_cast<Operand>(o))); found != tensors.end())
      call.tensors[o] = &(views[o] = found->second.tensor());
  Message message{};
  switch (gemma_norm_emulated(&call, &gpu, &message)) {
    case Status::kOk: return;
    case Status::kInvalidArgument: throw py::value_error(message.text);
    case Status::kDeviceError: throw std::runtime_error(message.text);
  }
}

std::string plan(int64_t hidden, const std::string& dtype, const EmulatedGpu& gpu, int64_t rows) {
  const DType type = dtype_of(dtype);
  const DeviceFacts facts{gpu.wave_width, gpu.max_threads, false, gpu.max_cluster, gpu.processors};
  return describe(spread(make_plan(hidden, type, facts), rows, 3 * hidden * size_of(type), facts), type);
}

}  // namespace

PYBIND11_MODULE(gemma_norm_emulated_module, m) {
  py::class_<Memory>(m, "Memory")
      .def(py::init<uintptr_t, std::vector<int64_t>, std::vector<int64_t>, std::string>(), py::arg("address"),
           py::arg("sizes"), py::arg("strides"), py::arg("dtype"));
  py::class_<EmulatedGpu>(m, "Gpu").def(py::init<int32_t, int64_t, int32_t, uint32_t, int32_t>(), py::arg("wave_width"),
                                        py::arg("max_threads") = int64_t{1} << 32, py::arg("max_cluster") = 1,
                                        py::arg("order") = 0, py::arg("processors") = 0);
  m.def("run", &run, py::arg("op"), py::arg("tensors"), py::arg("eps"), py::arg("gemma"), py::arg("gpu"),
        py::arg("round_each_step") = false, py::arg("sigmoid") = false, py::arg("norm_before_gate") = true,
        py::arg("group_size") = py::none(), py::arg("dtype") = "float8_e4m3fn",
        py::arg("scale_group_size") = py::none(), py::arg("round_first") = false, py::arg("scale_ue8m0") = false,
        py::arg("scale_dtype") = "float32",
        "Runs an operator by its torch name on tensors by the names of its operands.");
  m.def("plan", &plan, py::arg("hidden"), py::arg("dtype"), py::arg("gpu"), py::arg("rows") = 1,
        "How a row of a plain norm of so many is laid over threads, in words.");
}

}  // namespace gemma_norm
