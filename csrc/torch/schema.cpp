// Defines the operators' schemas. This is in the CPU library, because that is always loaded, and before the others.
//
// An operator that records derivatives has a twin, "_rms_norm" beside "rms_norm", with the same kernels and without
// derivatives. Python's functions call it in inference, and the derivative's forward pass does
// (python/gemma_norm/_registry.py).
//
// rms_norm.out has no torch.Tag.out, by which torch.compile could let it write into memory that Inductor has planned.
// With the tag, AOTInductor of PyTorch 2.13 generates a call of a C function that does not exist, and its program does
// not compile.
#include <torch/csrc/stable/library.h>

#include <string>

#include "../ops/ops.h"
#include "arguments.h"

STABLE_TORCH_LIBRARY(gemma_norm, m) {
  gemma_norm::Ops::each_info([&](const gemma_norm::OpInfo& op) {
    const std::string signature = std::string(op.torch_name) + op.schema;
    m.def(signature.c_str());
    if (gemma_norm::binding::has_twin(op)) m.def(("_" + signature).c_str());
  });
}
