"""RMSNorm, plain or fused with the residual addition: the operators, the public functions and their derivatives.

The functions are thin on purpose: in a decoding step, a microsecond of host time is the kernel's own time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function, has_torch_function_variadic

from .. import reference
from .._calls import differentiable, explain, overridden
from .._checks import LIKE_X, OPTIONAL_LIKE_X, WEIGHT, X
from .._registry import Operator, register

_NORM = {"x": X, "weight": WEIGHT}
_ADD = {**_NORM, "residual": LIKE_X, "post_residual_addition": OPTIONAL_LIKE_X}
RMS_NORM = Operator("rms_norm", reference.rms_norm, _NORM, "rms_norm")
ADD_RMS_NORM = Operator("add_rms_norm", reference.add_rms_norm, _ADD, "add_rms_norm")
RMS_NORM_OUT = Operator("rms_norm.out", reference.rms_norm, {**_NORM, "out": LIKE_X}, "rms_norm")
FUSED_ADD_RMS_NORM = Operator("fused_add_rms_norm", reference.add_rms_norm, _ADD, "add_rms_norm")
register(RMS_NORM, RMS_NORM_OUT, ADD_RMS_NORM, FUSED_ADD_RMS_NORM)

_is_grad_enabled = torch.is_grad_enabled
_rms_norm = torch.ops.gemma_norm.rms_norm.default
_rms_norm_out = torch.ops.gemma_norm.rms_norm.out
_fused_add_rms_norm = torch.ops.gemma_norm.fused_add_rms_norm.default
_add_rms_norm = torch.ops.gemma_norm.add_rms_norm.default


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, gemma: bool = False, *, out: Tensor | None = None) -> Tensor:
    """Root-mean-square normalisation of the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467)::

        y = round(x * rstd * w),   rstd = 1 / sqrt(mean(x^2) + eps),   w = 1 + weight if gemma else weight

    in float32 throughout, with one rounding, to nearest even, at the end.

    Args:
        x: ``[..., hidden]``, float32, float16 or bfloat16; last dimension contiguous, any other strides (never copied).
        weight: ``[hidden]``, contiguous, x's dtype or float32.
        eps: finite and not negative; used as a float32.
        gemma: the weight is stored zero-centred, as in Gemma and Qwen3-Next (transformers' ``GemmaRMSNorm``).
        out: where to write instead of a new tensor: x's shape, dtype and device, last dimension contiguous; x itself or
            memory apart from it. Records no derivative, and refuses tensors of which one is expected.

    Returns:
        ``out``, or a new row-major tensor of x's shape and dtype. Derivatives of any order and mode with respect to x
        and weight are supported, and so are the transforms of ``torch.func``.

    Raises:
        RuntimeError: for an argument that breaks a rule above; nothing has been written then.
        torch.OutOfMemoryError: a GPU has no memory for the result. On the CPU that is a RuntimeError, as PyTorch's is.
    """
    if has_torch_function_variadic(x, weight, out):
        op = RMS_NORM if out is None else RMS_NORM_OUT
        extra = {} if out is None else {"out": out}
        result: Tensor = overridden(rms_norm, op, (x, weight, out), x, weight, eps, gemma, **extra)
        return result
    try:
        if out is not None:
            result = _rms_norm_out(x, weight, eps, gemma, out=out)
        elif _is_grad_enabled() or forward_ad._current_level >= 0:
            result = differentiable(_rms_norm, RMS_NORM, RMSNormFunction, x, weight, eps, gemma)
        else:
            result = _rms_norm(x, weight, eps, gemma)
    except RuntimeError as error:
        explain(error, RMS_NORM if out is None else RMS_NORM_OUT, x=x, weight=weight, eps=eps, gemma=gemma, out=out)
        raise
    return result


def fused_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    gemma: bool = False,
    post_residual_addition: Tensor | None = None,
) -> None:
    """In place, ``residual <- s`` and ``x <- rms_norm(s)`` with ``s = round(x + residual)``, as in SGLang and vLLM.

    With ``post_residual_addition``, ``s = round(x + round(residual + post_residual_addition))``.

    Args:
        x: ``[..., hidden]``, read and written; see :func:`rms_norm` for dtypes and strides. No two of its elements may
            share memory.
        residual: x's shape, dtype and device, strides of its own; read and written; memory apart from x's.
        weight, eps, gemma: as for :func:`rms_norm`.
        post_residual_addition: like residual, read alone.

    Records no derivative. Tensors that require a gradient while grad mode is on, dual tensors, and calls inside a
    ``torch.func`` transform other than ``functionalize`` are refused: :func:`add_rms_norm` is for them.

    Raises:
        RuntimeError: for an argument that breaks a rule above; nothing has been written then.
    """
    post = post_residual_addition
    if has_torch_function((x, residual, weight, post)):
        tensors = (x, residual, weight, post)
        overridden(fused_add_rms_norm, FUSED_ADD_RMS_NORM, tensors, x, residual, weight, eps, gemma, post)
        return
    try:
        _fused_add_rms_norm(x, residual, weight, eps, gemma, post)
    except RuntimeError as error:
        named = {"x": x, "residual": residual, "weight": weight, "post_residual_addition": post}
        explain(error, FUSED_ADD_RMS_NORM, **named, eps=eps, gemma=gemma)
        raise


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    gemma: bool = False,
    post_residual_addition: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(rms_norm(s), s)`` with ``s = round(x + residual)``: :func:`fused_add_rms_norm` into two new tensors.

    The arguments are the same, none is written, and they may overlap. The results are row-major, of x's shape and
    dtype, and bit for bit those of :func:`fused_add_rms_norm`. Derivatives of any order and mode with respect to x,
    residual, weight and post_residual_addition are supported, and so are the transforms of ``torch.func``.

    Raises:
        RuntimeError: for an argument that breaks a rule.
        torch.OutOfMemoryError: a GPU has no memory for the results. On the CPU that is a RuntimeError, as PyTorch's is.
    """
    post = post_residual_addition
    if has_torch_function((x, residual, weight, post)):
        tensors = (x, residual, weight, post)
        y, s = overridden(add_rms_norm, ADD_RMS_NORM, tensors, x, residual, weight, eps, gemma, post)
        return y, s
    try:
        if _is_grad_enabled() or forward_ad._current_level >= 0:
            # Dynamo takes no tensor twice; a view of it has the same memory and a gradient of its own.
            residual = x.view_as(x) if residual is x else residual
            post = post.view_as(post) if post is not None and (post is x or post is residual) else post
            arguments = (x, residual, weight, eps, gemma, post)
            y, s = differentiable(_add_rms_norm, ADD_RMS_NORM, AddRMSNormFunction, *arguments)
        else:
            y, s = _add_rms_norm(x, residual, weight, eps, gemma, post)
    except RuntimeError as error:
        named = {"x": x, "residual": residual, "weight": weight, "post_residual_addition": post}
        explain(error, ADD_RMS_NORM, **named, eps=eps, gemma=gemma)
        raise
    return y, s


# torch.fx removes a call whose result is not used, unless it is said to do more than return it.
for _function in (rms_norm, fused_add_rms_norm):
    torch.fx.node.has_side_effect(_function)


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


def _backward(
    ctx: Any, dy: Tensor, s: Tensor, weight: Tensor, needs_s: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """With ``n = s * rstd`` and ``g = dy * w`` (w is ``1 + weight`` with gemma), all in float32::

        ds      = rstd * (g - n * mean(g * n)) + dsum
        dweight = sum over rows of dy * n

    x, residual and post_residual_addition are summed, so each gets ds. A gradient is rounded once, to its input's dtype.
    The formula is differentiable itself, so second and higher derivatives are right.
    """
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
