"""What the public functions share: the paths of calls that are not plain inference on plain tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from ._checks import has_tangent, layout_name
from ._registry import Operator
from ._sharding import explain_missing

functorch_is_active = torch._C._are_functorch_transforms_active
# Dynamo alone: torch.compiler.is_compiling() also asks for scripting, and export is asked for separately.
is_compiled = torch.compiler.is_dynamo_compiling
is_exported = torch.compiler.is_exporting
_is_tracing = torch._C._is_tracing


def overridden(function: Callable[..., Any], op: Operator, tensors: tuple[Any, ...], *args: Any, **kwargs: Any) -> Any:
    """Make a call in which a tensor or an active mode has a ``__torch_function__``, for example a proxy of torch.fx.

    PyTorch exports to ONNX in such a mode. ONNX has no operator like this one, so the definition is exported.
    """
    if not op.written and _is_in_onnx_export():
        return op.definition(*args, **kwargs)
    if any(isinstance(t, Tensor) and t.is_nested for t in tensors):
        given = {a.name for a in op.overload._schema.arguments}
        return op.overload(
            *args, **{k: v for k, v in kwargs.items() if k in given}
        )  # raises; their __torch_function__ would take "rms_norm" for PyTorch's own
    return handle_torch_function(function, tensors, *args, **kwargs)


def differentiable(twin: Callable[..., Any], op: Operator, *args: Any) -> Any:
    """Make a call that may need a derivative, or that is being compiled or exported.

    A compiled or exported program holds the operator, which records derivatives when the program runs. Under
    torch.jit.trace, and inside a torch.func transform, the twin acts as the operator does.
    """
    if is_compiled() or is_exported():
        return op.overload(*args)
    return twin(*args) if _is_tracing() or functorch_is_active() else op.recorded(twin, args)


def check_eps(op: Operator, eps: Any) -> None:
    """Raise RuntimeError for an eps that is no float, and of which a derivative may be expected.

    Tensors of one element are numbers for PyTorch's dispatcher, which drops their derivative in silence.
    """
    if not isinstance(eps, Tensor):
        return
    got = None
    if is_compiled():
        got = "a tensor in a compiled program"
    elif torch._C._functorch.is_functorch_wrapped_tensor(eps):
        got = "a tensor inside a torch.func transform"
    elif has_tangent(eps):
        got = "a dual tensor"
    elif torch.is_grad_enabled() and eps.requires_grad:
        got = "a tensor that requires grad"
    if got:
        raise RuntimeError(f"{op.label}: eps must be a plain number, since it has no derivative, got {got}")


def check_size(op: Operator, name: str, value: Any) -> None:
    """Raise RuntimeError for a size that is no integer, though PyTorch's dispatcher would take it for one."""
    if isinstance(value, Tensor) and _is_tracing():  # torch.jit.trace makes tensors of the sizes of tensors
        return
    if value is not None and (isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt))):
        raise RuntimeError(f"{op.label}: {name} must be {_KINDS[name][1]}, got {value!r}")
    if isinstance(value, int) and value == 2**63 - 1:  # which stands for None in C++
        raise RuntimeError(f"{op.label}: {name} must divide {op.first}'s last dimension, got {value}")


def explain(error: RuntimeError, op: Operator, **arguments: Any) -> None:
    """Raise an error that says more than ``error``, which the operator raised, if an argument has a wrong type.

    Also raise ``torch.OutOfMemoryError`` if that is what happened.
    """
    if type(error) is RuntimeError and " out of memory" in str(error):  # C++ can raise only RuntimeError
        raise torch.OutOfMemoryError(str(error)) from None
    explain_missing(op, error, arguments)
    for name, rule in op.rules.items():
        value = arguments[name]
        if not (isinstance(value, Tensor) or (rule.optional and value is None)):
            raise RuntimeError(f"{op.label}: {name} must be a tensor, got {value!r}") from None
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_nested:
            raise RuntimeError(f"{op.label}: {name} must be a dense tensor, got {layout_name(value)}") from None
        kind, what = _KINDS.get(name, ((object,), ""))
        if not isinstance(value, kind):
            raise RuntimeError(f"{op.label}: {name} must be {what}, got {value!r}") from None
        if what and (needed := _what_cannot_be_passed_on(name, value)):
            raise RuntimeError(f"{op.label}: {name} must be {needed}, got {value!r}") from None


_FLAGS = (
    "gemma",
    "round_each_step",
    "sigmoid",
    "norm_before_gate",
    "round_rotation",
    "interleaved",
    "mrope_interleaved",
    "round_first",
    "scale_ue8m0",
    "column_major_scale",
)
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "eps": ((Real, Tensor, torch.SymFloat), "a number"),
    "group_size": ((Integral, torch.SymInt, type(None)), "an integer or None"),
    "scale_group_size": ((Integral, torch.SymInt, type(None)), "an integer or None"),
    "dtype": ((torch.dtype, type(None)), "a torch.dtype or None"),
    "scale_dtype": ((torch.dtype, type(None)), "a torch.dtype or None"),
    "mrope_section": ((list, tuple, type(None)), "a list of three integers or None"),
    **{name: ((bool, torch.SymBool), "a bool") for name in _FLAGS},
}


def _what_cannot_be_passed_on(name: str, value: Any) -> str:
    """What a value of the right type must be, if PyTorch's dispatcher cannot take it, else ""."""
    if name == "eps":
        if isinstance(value, Tensor):
            return "" if value.numel() == 1 and not (value.is_complex() or value.is_meta) else "a number"
        try:
            float(value)
        except OverflowError:
            return "finite in float32 and at least 0"
        return ""
    if isinstance(value, (list, tuple)):
        if not all(isinstance(size, (Integral, torch.SymInt, Tensor)) for size in value):
            return _KINDS[name][1]
        return next(filter(None, (_what_cannot_be_passed_on("", size) for size in value)), "")
    fits = not isinstance(value, Integral) or -(2**63) <= int(value) < 2**63
    return "" if fits else "an integer of at most 64 bits"


def _is_in_onnx_export() -> bool:
    """Whether an export to ONNX is running. It has then imported torch.onnx, which is slow, so this does not."""
    onnx = sys.modules.get("torch.onnx")
    return onnx is not None and bool(onnx.is_in_onnx_export())
