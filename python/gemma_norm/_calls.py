"""What the public functions share: the exceptional ways that a call can take, off the path of an ordinary one."""

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
    """A call with tensors, or in a mode, that have a ``__torch_function__``: torch.fx's proxies, for one.

    PyTorch traces for ONNX in such a mode. ONNX has no operator like ours, and takes the definition.
    """
    if not op.written and _is_in_onnx_export():
        return op.definition(*args)
    if any(isinstance(t, Tensor) and t.is_nested for t in tensors):
        return op.overload(*args)  # which refuses them; their __torch_function__ takes "rms_norm" for PyTorch's own
    return handle_torch_function(function, tensors, *args, **kwargs)


def differentiable(
    native: Callable[..., Any], op: Operator, function: type[torch.autograd.Function], *args: Any
) -> Any:
    """A call while grad mode is on or dual tensors are about: with its derivative, where one is asked for.

    ``native`` is the operator, which sees to derivatives by itself inside a torch.func transform, and nowhere else.
    """
    tensors = [argument for argument in args if isinstance(argument, Tensor)]
    if not functorch_is_active():
        if has_tangent(*tensors):
            return op.transformed(*args)
        if _is_grad_enabled() and any(t.requires_grad for t in tensors):
            return function.apply(*args)  # type: ignore[no-untyped-call]
    return native(*args)


def explain(error: RuntimeError, op: Operator, **arguments: Any) -> None:
    """Raise what says more than ``error``, which the operator raised, where there is such a thing."""
    if type(error) is RuntimeError and " out of memory" in str(error):  # the operator can only raise a RuntimeError
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
    """Importing torch.onnx is slow, and there is no export before it has been imported."""
    onnx = sys.modules.get("torch.onnx")
    return onnx is not None and bool(onnx.is_in_onnx_export())
