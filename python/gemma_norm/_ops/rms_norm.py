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
from .._checks import LIKE_X, OPTIONAL_LIKE_RESIDUAL, OPTIONAL_WEIGHT, RESIDUAL, X
from .._registry import Operator, register

_NORM = {"x": X, "weight": OPTIONAL_WEIGHT}
_ADD = {**_NORM, "residual": RESIDUAL, "post_residual_addition": OPTIONAL_LIKE_RESIDUAL}
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


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    gemma: bool = False,
    round_each_step: bool = False,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Root-mean-square normalisation of the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467)::

        y = round(x * rstd * w),   rstd = 1 / sqrt(mean(x^2) + eps),   w = 1 + weight if gemma else weight

    in float32 throughout, with one rounding, to nearest even, at the end. Without a weight, w is 1.

    Args:
        x: ``[..., hidden]``, float32, float16 or bfloat16; last dimension contiguous, any other strides (never copied).
        weight: ``[hidden]``, contiguous, x's dtype or float32; where x is float32, float16 and bfloat16 as well. None
            for a norm without scale.
        eps: finite and not negative; used as a float32.
        gemma: the weight is stored zero-centred, as in Gemma and Qwen3-Next (transformers' ``GemmaRMSNorm``).
        round_each_step: ``y = round(round(x * rstd) * w)``, as the Llama-like classes of transformers and vLLM's kernels
            compute it. Liger calls it ``casting_mode="llama"``, SGLang ``cast_x_before_out_mul=True``, aiter
            ``use_model_sensitive_rmsnorm=1``. Not with gemma, and the weight has x's dtype. In float32 it changes
            nothing. Derivatives take no notice of the roundings.
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
        result: Tensor = overridden(rms_norm, op, (x, weight, out), x, weight, eps, gemma, round_each_step, **extra)
        return result
    try:
        if out is not None:
            result = _rms_norm_out(x, weight, eps, gemma, round_each_step, out=out)
        elif _is_grad_enabled() or forward_ad._current_level >= 0:
            arguments = (x, weight, eps, gemma, round_each_step)
            result = differentiable(_rms_norm, RMS_NORM, RMSNormFunction, *arguments)
        else:
            result = _rms_norm(x, weight, eps, gemma, round_each_step)
    except RuntimeError as error:
        op, options = RMS_NORM if out is None else RMS_NORM_OUT, {"gemma": gemma, "round_each_step": round_each_step}
        explain(error, op, x=x, weight=weight, out=out, eps=eps, **options)
        raise
    return result


def fused_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    gemma: bool = False,
    post_residual_addition: Tensor | None = None,
    round_each_step: bool = False,
) -> None:
    """In place, ``residual <- s`` and ``x <- rms_norm(s)`` with ``s = round(x + residual)``, as in SGLang and vLLM.

    With ``post_residual_addition``, ``s = round(x + round(residual + post_residual_addition))``.

    Args:
        x: ``[..., hidden]``, read and written; see :func:`rms_norm` for dtypes and strides. No two of its elements may
            share memory.
        residual: x's shape and device, x's dtype or float32, strides of its own; read and written; memory apart from
            x's. s has its dtype: a float32 residual stream with 16-bit x is ``residual_in_fp32`` in Mamba,
            ``fp32_residual_connection`` in Megatron.
        weight, eps, gemma, round_each_step: as for :func:`rms_norm`.
        post_residual_addition: like residual, read alone.

    Records no derivative. Tensors that require a gradient while grad mode is on, dual tensors, and calls inside a
    ``torch.func`` transform other than ``functionalize`` are refused: :func:`add_rms_norm` is for them.

    Raises:
        RuntimeError: for an argument that breaks a rule above; nothing has been written then.
    """
    post = post_residual_addition
    if has_torch_function((x, residual, weight, post)):
        tensors = (x, residual, weight, post)
        overridden(
            fused_add_rms_norm, FUSED_ADD_RMS_NORM, tensors, x, residual, weight, eps, gemma, post, round_each_step
        )
        return
    try:
        _fused_add_rms_norm(x, residual, weight, eps, gemma, post, round_each_step)
    except RuntimeError as error:
        named = {"x": x, "residual": residual, "weight": weight, "post_residual_addition": post}
        explain(error, FUSED_ADD_RMS_NORM, **named, eps=eps, gemma=gemma, round_each_step=round_each_step)
        raise


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    gemma: bool = False,
    post_residual_addition: Tensor | None = None,
    round_each_step: bool = False,
) -> tuple[Tensor, Tensor]:
    """``(rms_norm(s), s)`` with ``s = round(x + residual)``: :func:`fused_add_rms_norm` into two new tensors.

    The arguments are the same, none is written, and they may overlap. The results are row-major, of x's shape, y of
    x's dtype and s of the residual's, and bit for bit those of :func:`fused_add_rms_norm`. Derivatives of any order and
    mode with respect to x, residual, weight and post_residual_addition are supported, and so are the transforms of
    ``torch.func``.

    Raises:
        RuntimeError: for an argument that breaks a rule.
        torch.OutOfMemoryError: a GPU has no memory for the results. On the CPU that is a RuntimeError, as PyTorch's is.
    """
    post = post_residual_addition
    if has_torch_function((x, residual, weight, post)):
        tensors = (x, residual, weight, post)
        arguments = (x, residual, weight, eps, gemma, post, round_each_step)
        y, s = overridden(add_rms_norm, ADD_RMS_NORM, tensors, *arguments)
        return y, s
    try:
        if _is_grad_enabled() or forward_ad._current_level >= 0:
            # Dynamo takes no tensor twice; a view of it has the same memory and a gradient of its own.
            residual = x.view_as(x) if residual is x else residual
            post = post.view_as(post) if post is not None and (post is x or post is residual) else post
            arguments = (x, residual, weight, eps, gemma, post, round_each_step)
            y, s = differentiable(_add_rms_norm, ADD_RMS_NORM, AddRMSNormFunction, *arguments)
        else:
            y, s = _add_rms_norm(x, residual, weight, eps, gemma, post, round_each_step)
    except RuntimeError as error:
        named = {"x": x, "residual": residual, "weight": weight, "post_residual_addition": post}
        explain(error, ADD_RMS_NORM, **named, eps=eps, gemma=gemma, round_each_step=round_each_step)
        raise
    return y, s


# torch.fx removes a call whose result is not used, unless it is said to do more than return it.
for _function in (rms_norm, fused_add_rms_norm):
    torch.fx.node.has_side_effect(_function)


class RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, eps: float, gemma: bool, round_each_step: bool) -> Tensor:
        y: Tensor = _rms_norm(x, weight, eps, gemma, round_each_step)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.eps, ctx.gemma, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        dx, dweight = norm_backward(dy.float(), x.float(), weight, ctx.eps, ctx.gemma, needs_x, needs_weight)
        return cast(dx, x), dweight, None, None, None


class AddRMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        eps: float,
        gemma: bool,
        post: Tensor | None,
        round_each_step: bool,
    ) -> tuple[Tensor, Tensor]:
        y_and_sum: tuple[Tensor, Tensor] = _add_rms_norm(x, residual, weight, eps, gemma, post, round_each_step)
        return y_and_sum

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, _, weight, ctx.eps, ctx.gemma, _, _ = inputs
        ctx.dtype = x.dtype
        ctx.save_for_backward(output[1], weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dsum: Tensor) -> tuple[Tensor | None, ...]:
        s, weight = ctx.saved_tensors
        needs_x, needs_residual, needs_weight, _, _, needs_post, _ = ctx.needs_input_grad
        needs_s = needs_x or needs_residual or needs_post
        ds, dweight = norm_backward(dy.float(), s.float(), weight, ctx.eps, ctx.gemma, needs_s, needs_weight)
        ds = cast(None if ds is None else ds + dsum, s)
        dx = ds.to(ctx.dtype) if ds is not None and needs_x else None
        return dx, ds if needs_residual else None, dweight, None, None, ds if needs_post else None, None


def norm_backward(
    dy: Tensor, s: Tensor, weight: Tensor | None, eps: float, gemma: bool, needs_s: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """With ``n = s * rstd`` and ``g = dy * w`` (w is ``1 + weight`` with gemma, 1 without a weight), all in float32::

        ds      = rstd * (g - n * mean(g * n))
        dweight = sum over rows of dy * n

    x, residual and post_residual_addition are summed, so each gets ds. A gradient is rounded once, to its input's dtype.
    The formula is differentiable itself, so second and higher derivatives are right. The weight may have the shape of
    the last two dimensions, groups and their elements.
    """
    rstd = torch.rsqrt(s.square().mean(-1, keepdim=True) + eps)
    n = s * rstd
    ds = dweight = None
    if needs_s:
        g = dy if weight is None else dy * (1 + weight.float() if gemma else weight.float())
        ds = rstd * (g - n * (g * n).mean(-1, keepdim=True))
    if needs_weight and weight is not None:
        rows = list(range(s.dim() - weight.dim()))
        dweight = cast((dy * n).sum(rows) if rows else dy * n, weight)
    return ds, dweight


def cast(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(like.dtype)
