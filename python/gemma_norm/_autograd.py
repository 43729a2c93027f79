"""Gradients for the functional operators: the native forward, and the backward formula in plain PyTorch.

With ``n = s * rstd`` and ``g = dy * w`` (w is ``1 + weight`` with gemma), all in float32::

    ds      = rstd * (g - n * mean(g * n)) + dsum
    dweight = sum over rows of dy * n

x, residual and post_residual_addition are summed, so each gets ds. A gradient is rounded once, to its input's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    @once_differentiable
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
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dsum: Tensor) -> tuple[Tensor | None, ...]:
        s, weight = ctx.saved_tensors
        needs_x, needs_residual, needs_weight, _, _, needs_post = ctx.needs_input_grad
        ds, dweight = _backward(ctx, dy, s, weight, needs_x or needs_residual or needs_post, needs_weight)
        ds = _cast(None if ds is None else ds + dsum, s)
        return ds if needs_x else None, ds if needs_residual else None, dweight, None, None, ds if needs_post else None


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
        dweight = (dy * n).flatten(0, -2).sum(0) if s.dim() > 1 else dy * n
    return ds, _cast(dweight, weight)


def _cast(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(like.dtype)
