// The operator schemas. They live in the CPU library, which is always loaded, and first.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(gemma_norm, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps=1e-6, bool gemma=False) -> Tensor");
  m.def("rms_norm.out(Tensor x, Tensor weight, float eps=1e-6, bool gemma=False, *, Tensor(a!) out) -> Tensor(a!)");
  m.def(
      "fused_add_rms_norm(Tensor(a!) x, Tensor(b!) residual, Tensor weight, float eps=1e-6, bool gemma=False, "
      "Tensor? post_residual_addition=None) -> ()");
  m.def(
      "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps=1e-6, bool gemma=False, "
      "Tensor? post_residual_addition=None) -> (Tensor, Tensor)");
}
