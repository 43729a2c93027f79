"""Derivatives of the functional operators.

Reverse mode is an autograd.Function: the native forward, and the backward formula in plain PyTorch. With ``n = s * rstd``
and ``g = dy * w`` (w is ``1 + weight`` with gemma), all in float32::

    ds      = rstd * (g - n * mean(g * n)) + dsum
    dweight = sum over rows of dy * n

x, residual and post_residual_addition are summed, so each gets ds. A gradient is rounded once, to its input's dtype.
The backward formula is differentiable itself, so second and higher derivatives are right.

Forward mode (dual tensors) and the transforms of torch.func (grad, vmap, jvp and all that is made of them) take the
operator's definition in plain PyTorch, :mod:`gemma_norm.reference`, which PyTorch can differentiate and batch in any
order. ``install`` registers it at the dispatch key that is active inside a transform and nowhere else, so that
``torch.ops.gemma_norm.*`` are right there too, and calls outside pay nothing. What writes into its arguments is refused
there, but for torch.func.functionalize: a transform would see neither the write nor its derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from ._checks import DIFFERENTIABLE, check_arguments

_rms_norm = torch.ops.gemma_norm.rms_norm.default
_add_rms_norm = torch.ops.gemma_norm.add_rms_norm.default


class RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float, gemma: bool) -> Tensor:
        y: Tensor = _rms_norm(x, weight, eps, gemma)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.eps, ctx.gemma = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx, dweight = _backward(ctx, dy, x, weight, ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        return _cast(dx, x), dweight, None, None


class AddRMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, residual: Tensor, weight: Tensor, eps: float, gemma: bool, post_residual_addition: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y_and_sum: tuple[Tensor, Tensor] = _add_rms_norm(x, residual, weight, eps, gemma, post_residual_addition)
        return y_and_sum

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, _, weight, ctx.eps, ctx.gemma, _ = inputs
        ctx.save_for_backward(output[1], weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dsum: Tensor) -> tuple[Tensor | None, ...]:
        s, weight = ctx.saved_tensors
        needs_x, needs_residual, needs_weight, _, _, needs_post = ctx.needs_input_grad
        ds, dweight = _backward(ctx, dy, s, weight, needs_x or needs_residual or needs_post, needs_weight)
        ds = _cast(None if ds is None else ds + dsum, s)
        return ds if needs_x else None, ds if needs_residual else None, dweight, None, None, ds if needs_post else None


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, gemma: bool = False) -> Tensor:
    """The operator in plain PyTorch, with its checks: differentiable in every mode, batched by vmap."""
    check_arguments("rms_norm", x, weight, eps, transformed=True)
    return reference.rms_norm(x, weight, eps, gemma)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    gemma: bool = False,
    post_residual_addition: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator in plain PyTorch, with its checks: differentiable in every mode, batched by vmap."""
    check_arguments(
        "add_rms_norm",
        x,
        weight,
        eps,
        residual=residual,
        post_residual_addition=post_residual_addition,
        transformed=True,
    )
    return reference.add_rms_norm(x, residual, weight, eps, gemma, post_residual_addition)


def _rms_norm_out(x: Tensor, weight: Tensor, eps: float = 1e-6, gemma: bool = False, *, out: Tensor) -> Tensor:
    _refuse_unless_functionalising("rms_norm", f"{DIFFERENTIABLE['rms_norm']} without out")
    return out.copy_(rms_norm(x, weight, eps, gemma))


def _fused_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    gemma: bool = False,
    post_residual_addition: Tensor | None = None,
) -> None:
    _refuse_unless_functionalising("fused_add_rms_norm", DIFFERENTIABLE["fused_add_rms_norm"])
    y, s = add_rms_norm(x, residual, weight, eps, gemma, post_residual_addition)
    x.copy_(y)
    residual.copy_(s)


def _refuse_unless_functionalising(op: str, call: str) -> None:
    """torch.func.functionalize is there for programs that write; other transforms may fail at any of the writes."""
    functorch = torch._C._functorch
    if all(level.key() == functorch.TransformType.Functionalize for level in functorch.get_interpreter_stack() or ()):
        return
    rule = "is not available inside a torch.func transform, which would see neither what it writes nor the derivative"
    raise RuntimeError(f"{op}: writing into an argument {rule}: call {call}")


def install(library: Any) -> None:
    """Register what runs inside the transforms of torch.func."""
    kernels = {
        "rms_norm": rms_norm,
        "rms_norm.out": _rms_norm_out,
        "fused_add_rms_norm": _fused_add_rms_norm,
        "add_rms_norm": add_rms_norm,
    }
    for name, kernel in kernels.items():
        library.impl(name, kernel, "FuncTorchDynamicLayerFrontMode")


def _backward(
    ctx: Any, dy: Tensor, s: Tensor, weight: Tensor, needs_s: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    s, dy = s.float(), dy.float()
    rstd = torch.rsqrt(s.square().mean(-1, keepdim=True) + ctx.eps)
    n = s * rstd
    ds = dweight = None
    if needs_s:
        g = dy * (1 + weight.float() if ctx.gemma else weight.float())
        ds = rstd * (g - n * (g * n).mean(-1, keepdim=True))
    if needs_weight:
        dweight = (dy * n).sum(list(range(s.dim() - 1))) if s.dim() > 1 else dy * n
    return ds, _cast(dweight, weight)


def _cast(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(like.dtype)
