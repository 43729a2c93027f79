"""What the public functions share: the exceptional ways that a call can take, off the path of an ordinary one."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ._checks import has_tangent

_functorch_is_active = torch._C._are_functorch_transforms_active


def any_nested(*tensors: Tensor | None) -> bool:
    """The operators refuse nested tensors, whose own __torch_function__ takes ``rms_norm`` for PyTorch's, by its name."""
    return any(isinstance(t, Tensor) and t.is_nested for t in tensors)


def is_in_onnx_export() -> bool:
    """Whether the call is traced for ONNX, which has no such operator and takes its definition. Importing torch.onnx is
    slow, and there is no export before it has been imported."""
    onnx = sys.modules.get("torch.onnx")
    return onnx is not None and bool(onnx.is_in_onnx_export())


def are_dual(*tensors: Tensor | None) -> bool:
    """Whether a forward derivative is to be computed here. Inside a torch.func transform the operator sees to it."""
    return not _functorch_is_active() and has_tangent(*tensors)


def require_grad(*tensors: Tensor | None) -> bool:
    """Whether a gradient is to be recorded here. Inside a torch.func transform the operator sees to it."""
    return any(getattr(t, "requires_grad", False) for t in tensors) and not _functorch_is_active()


def raise_out_of_memory(error: RuntimeError) -> None:
    """The operators can only raise a RuntimeError; memory that is short has a type of its own in PyTorch."""
    if " out of memory" in str(error) and type(error) is RuntimeError:
        raise torch.OutOfMemoryError(str(error)) from None
