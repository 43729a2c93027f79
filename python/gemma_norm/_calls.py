"""What the public functions share: the paths of calls that are not plain inference on plain tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from ._checks import has_tangent
from ._registry import Operator

functorch_is_active = torch._C._are_functorch_transforms_active
_is_grad_enabled = torch.is_grad_enabled


def overridden(function: Callable[..., Any], op: Operator, tensors: tuple[Any, ...], *args: Any, **kwargs: Any) -> Any:
    """Make a call in which a tensor or an active mode has a ``__torch_function__``, for example a proxy of torch.fx.

    PyTorch exports to ONNX in such a mode. ONNX has no operator like this one, so the definition is exported.
    """
    if not op.written and _is_in_onnx_export():
        return op.definition(*args)
    if any(isinstance(t, Tensor) and t.is_nested for t in tensors):
        return op.overload(*args)  # raises; their __torch_function__ would take "rms_norm" for PyTorch's own
    return handle_torch_function(function, tensors, *args, **kwargs)


def differentiable(
    native: Callable[..., Any], op: Operator, function: type[torch.autograd.Function], *args: Any
) -> Any:
    """Make a call that may need a derivative, because grad mode is on or forward-mode differentiation is active.

    ``native`` is the operator. It computes derivatives itself inside a torch.func transform, but nowhere else.
    """
    tensors = [argument for argument in args if isinstance(argument, Tensor)]
    if not functorch_is_active():
        if has_tangent(*tensors):
            return op.transformed(*args)
        if _is_grad_enabled() and any(t.requires_grad for t in tensors):
            return function.apply(*args)  # type: ignore[no-untyped-call]
    return native(*args)


def explain(error: RuntimeError, op: Operator, **arguments: Any) -> None:
    """Raise an error that says more than ``error``, which the operator raised, if an argument has a wrong type.

    Also raise ``torch.OutOfMemoryError`` if that is what happened.
    """
    if type(error) is RuntimeError and " out of memory" in str(error):  # C++ can raise only RuntimeError
        raise torch.OutOfMemoryError(str(error)) from None
    for name, rule in op.rules.items():
        value = arguments[name]
        if not (isinstance(value, Tensor) or (rule.optional and value is None)):
            raise RuntimeError(f"{op.label}: {name} must be a tensor, got {value!r}") from None
    for name, value in arguments.items():
        kind, what = _KINDS.get(name, ((object,), ""))
        if not isinstance(value, kind):
            raise RuntimeError(f"{op.label}: {name} must be {what}, got {value!r}") from None


_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "eps": ((Real, Tensor, torch.SymFloat), "a number"),
    "group_size": ((Integral, torch.SymInt, type(None)), "an integer or None"),
    **{name: ((bool, torch.SymBool), "a bool") for name in ("gemma", "round_each_step", "sigmoid", "norm_before_gate")},
}


def _is_in_onnx_export() -> bool:
    """Whether an export to ONNX is running. It has then imported torch.onnx, which is slow, so this does not."""
    onnx = sys.modules.get("torch.onnx")
    return onnx is not None and bool(onnx.is_in_onnx_export())
