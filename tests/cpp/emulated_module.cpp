// For tests/python/test_emulated.py: the emulated kernels on memory that Python owns.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cases.h"
#include "emulated.h"
#include "plan.h"

namespace py = pybind11;

namespace gemma_norm {
namespace {

DType dtype_of(const std::string& name) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
    if (name == dtype_name(dtype)) return dtype;
  return DType::kOther;
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

void norm(const Memory& x, const Memory& weight, const Memory& out, const std::optional<Memory>& residual,
          const std::optional<Memory>& post, const std::optional<Memory>& residual_out, double eps, bool gemma,
          const EmulatedGpu& gpu) {
  const auto tensor = [](const std::optional<Memory>& memory) { return memory ? std::optional(memory->tensor()) : std::nullopt; };
  const auto pointer = [](const std::optional<Tensor>& t) { return t ? &*t : nullptr; };
  const auto r = tensor(residual), p = tensor(post), s = tensor(residual_out);
  const NormArgs args{"norm", x.tensor(), weight.tensor(), out.tensor(), pointer(r), pointer(p), pointer(s), eps, gemma};
  Message message{};
  switch (gemma_norm_emulated(&args, &gpu, &message)) {
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
      .def(py::init<uintptr_t, std::vector<int64_t>, std::vector<int64_t>, std::string>(), py::arg("address"), py::arg("sizes"),
           py::arg("strides"), py::arg("dtype"));
  py::class_<EmulatedGpu>(m, "Gpu").def(py::init<int32_t, int64_t, int32_t, uint32_t, int32_t>(), py::arg("wave_width"),
                                        py::arg("max_threads") = int64_t{1} << 32, py::arg("max_cluster") = 1, py::arg("order") = 0,
                                        py::arg("processors") = 0);
  m.def("norm", &norm, py::arg("x"), py::arg("weight"), py::arg("out"), py::arg("residual"), py::arg("post_residual_addition"),
        py::arg("residual_out"), py::arg("eps"), py::arg("gemma"), py::arg("gpu"));
  m.def("plan", &plan, py::arg("hidden"), py::arg("dtype"), py::arg("gpu"), py::arg("rows") = 1,
        "How a row of a plain norm of so many is laid over threads, in words.");
}

}  // namespace gemma_norm
