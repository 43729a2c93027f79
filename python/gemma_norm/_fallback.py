"""The operators where no native library serves: plain PyTorch, as strict about its arguments, said once a device type.

It is registered for every backend at once; a native kernel takes precedence. Sparse, quantised and other such tensors,
of any device, arrive here as well, to be refused. Gradients are the business of :mod:`gemma_norm.ops`, so the
dispatcher skips autograd.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nested._internal.nested_tensor import NestedTensor

from . import _autograd, reference
from ._checks import check_arguments, check_memory, layout_name
from ._library import operator_implementations, why_not_native

_told: set[str] = set()


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, gemma: bool = False) -> Tensor:
    check_arguments("rms_norm", x, weight, eps)
    _tell(x)
    return reference.rms_norm(x, weight, eps, gemma).contiguous()


def rms_norm_out(x: Tensor, weight: Tensor, eps: float = 1e-6, gemma: bool = False, *, out: Tensor) -> Tensor:
    check_arguments("rms_norm", x, weight, eps, out=out)
    check_memory("rms_norm", {"x" if out is x else "out": out}, {"x": x}, weight)
    _tell(x)
    return out.copy_(reference.rms_norm(x, weight, eps, gemma))


def fused_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    gemma: bool = False,
    post_residual_addition: Tensor | None = None,
) -> None:
    check_arguments(
        "fused_add_rms_norm", x, weight, eps, residual=residual, post_residual_addition=post_residual_addition
    )
    written = {"x": x, "residual": residual}
    check_memory("fused_add_rms_norm", written, {**written, "post_residual_addition": post_residual_addition}, weight)
    _tell(x)
    y, s = reference.add_rms_norm(x, residual, weight, eps, gemma, post_residual_addition)
    x.copy_(y)
    residual.copy_(s)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    gemma: bool = False,
    post_residual_addition: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_arguments("add_rms_norm", x, weight, eps, residual=residual, post_residual_addition=post_residual_addition)
    _tell(x)
    y, s = reference.add_rms_norm(x, residual, weight, eps, gemma, post_residual_addition)
    return y.contiguous(), s.contiguous()


def _tell(x: Tensor) -> None:
    device = x.device.type
    if device not in _told:
        _told.add(device)
        reason = why_not_native(device)
        warnings.warn(f"gemma_norm: plain PyTorch instead of a native kernel on {device}: {reason}", stacklevel=3)


def _refuse_nested(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
    names = [argument.name for argument in op._schema.arguments]
    for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
        if isinstance(value, Tensor) and value.is_nested:
            op_name = op._schema.name.split("::")[1]
            raise RuntimeError(f"{op_name}: {name} must be a dense tensor, got {layout_name(value)}")
    raise AssertionError("no argument is nested")


def _resolve_negative(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    gemma: bool = False,
    post_residual_addition: Tensor | None = None,
) -> None:
    """Tensors that PyTorch negates when they are read. It can do so for our other operators, but not for this one."""
    for name, t in {"x": x, "residual": residual}.items():
        if t.is_neg():
            rule = "is written and must not be negated lazily, got a tensor with its negative bit set"
            raise RuntimeError(f"fused_add_rms_norm: {name} {rule}; call resolve_neg() on it")
    post = None if post_residual_addition is None else post_residual_addition.resolve_neg()
    torch.ops.gemma_norm.fused_add_rms_norm.default(x, residual, weight.resolve_neg(), eps, gemma, post)


def _register() -> Any:
    library = operator_implementations(__name__)
    kernels: dict[str, Callable[..., Any]] = {
        "rms_norm": rms_norm,
        "rms_norm.out": rms_norm_out,
        "fused_add_rms_norm": fused_add_rms_norm,
        "add_rms_norm": add_rms_norm,
    }
    for name, kernel in kernels.items():
        packet, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.gemma_norm, packet), overload or "default")

        def strided_nested(*args: Any, _op: torch._ops.OpOverload = op, **kwargs: Any) -> NoReturn:
            _refuse_nested(_op, args, kwargs)

        def jagged_nested(cls: type, func: torch._ops.OpOverload, types: Any, args: Any, kwargs: Any) -> NoReturn:
            _refuse_nested(func, args, kwargs or {})

        library.impl(name, kernel, "CompositeExplicitAutograd")
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        for key in ("NestedTensorCPU", "NestedTensorCUDA"):
            library.impl(name, strided_nested, key)
        torch.library.register_torch_dispatch(f"gemma_norm::{name}", NestedTensor, jagged_nested, lib=library)
    library.impl("fused_add_rms_norm", _resolve_negative, "Negative")
    _autograd.install(library)
    return library


_library = _register()
