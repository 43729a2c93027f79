"""RMSNorm, plain or fused with the residual addition: the operators, the public functions and their derivatives.

The functions do little, because host time counts: in a decoding step a kernel takes about a microsecond.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function, has_torch_function_variadic

from .. import reference
from .._calls import check_eps, differentiable, explain, is_compiled, is_exported, overridden
from .._checks import LIKE_X, OPTIONAL_LIKE_RESIDUAL, OPTIONAL_WEIGHT, RESIDUAL, X
from .._registry import Operator, bare, register
from .rms_norm_backward import gradients

_NORM = {"x": X, "weight": OPTIONAL_WEIGHT}
_ADD = {**_NORM, "residual": RESIDUAL, "post_residual_addition": OPTIONAL_LIKE_RESIDUAL}
_is_grad_enabled = torch.is_grad_enabled


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

    All arithmetic is in float32, and the result is rounded once, to nearest even. Without a weight, w is 1.

    Args:
        x: ``[..., hidden]``, float32, float16 or bfloat16; last dimension contiguous, any other strides (never copied).
        weight: ``[hidden]``, contiguous, x's dtype or float32; if x is float32, float16 and bfloat16 as well. None for
            a norm without scale.
        eps: a number, finite and not negative; used as a float32. There is no derivative of it.
        gemma: the weight is stored zero-centred, as in Gemma and Qwen3-Next (transformers' ``GemmaRMSNorm``).
        round_each_step: compute ``y = round(round(x * rstd) * w)``, as the Llama-like classes of transformers and the
            kernels of vLLM do. Liger calls it ``casting_mode="llama"``, SGLang ``cast_x_before_out_mul=True``, aiter
            ``use_model_sensitive_rmsnorm=1``. It cannot be combined with gemma, and the weight must have x's dtype. In
            float32 it changes nothing. Derivatives ignore the roundings.
        out: written instead of a new tensor. It must have x's shape, dtype and device and a contiguous last dimension,
            and must be x itself or not overlap it. No derivative is recorded, and tensors of which a derivative is
            expected are refused.

    Returns:
        ``out``, or a new row-major tensor of x's shape and dtype. Derivatives of any order and mode with respect to x
        and weight are supported, and so are the transforms of ``torch.func``.

    Raises:
        RuntimeError: if an argument breaks a rule above. Nothing has been written then.
        torch.OutOfMemoryError: if a GPU has no memory for the result. On the CPU, as in PyTorch, it is a RuntimeError.
    """
    if has_torch_function_variadic(x, weight, out):
        op = RMS_NORM if out is None else RMS_NORM_OUT
        extra = {} if out is None else {"out": out}
        result: Tensor = overridden(rms_norm, op, (x, weight, out), x, weight, eps, gemma, round_each_step, **extra)
        return result
    try:
        if type(eps) is not float:
            check_eps(RMS_NORM, eps)
        if out is not None:
            result = _rms_norm_out(x, weight, eps, gemma, round_each_step, out=out)
        elif _is_grad_enabled() or forward_ad._current_level >= 0 or is_compiled() or is_exported():
            result = differentiable(_rms_norm, RMS_NORM, x, weight, eps, gemma, round_each_step)
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
    """Overwrite residual with ``s = round(x + residual)`` and x with ``rms_norm(s)``, as in SGLang and vLLM.

    With ``post_residual_addition``, ``s = round(x + round(residual + post_residual_addition))``.

    Args:
        x: ``[..., hidden]``, read and written; see :func:`rms_norm` for dtypes and strides. No two of its elements may
            share memory.
        residual: x's shape and device, x's dtype or float32, strides of its own; read and written. It must not overlap
            x. s has its dtype. A float32 residual with 16-bit x is what Mamba calls ``residual_in_fp32`` and Megatron
            ``fp32_residual_connection``.
        weight, eps, gemma, round_each_step: as for :func:`rms_norm`.
        post_residual_addition: like residual, but only read.

    No derivative is recorded. Tensors that require a gradient while grad mode is on, dual tensors, and calls inside a
    ``torch.func`` transform other than ``functionalize`` are refused. Use :func:`add_rms_norm` for these.

    Raises:
        RuntimeError: if an argument breaks a rule above. Nothing has been written then.
    """
    post = post_residual_addition
    if has_torch_function((x, residual, weight, post)):
        tensors = (x, residual, weight, post)
        overridden(
            fused_add_rms_norm, FUSED_ADD_RMS_NORM, tensors, x, residual, weight, eps, gemma, post, round_each_step
        )
        return
    try:
        if type(eps) is not float:
            check_eps(FUSED_ADD_RMS_NORM, eps)
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

    The arguments are the same, but none is written, so they may overlap. The results are row-major and have x's shape;
    y has x's dtype, and s the residual's. Their bits are those of :func:`fused_add_rms_norm`. Derivatives of any order
    and mode with respect to x, residual, weight and post_residual_addition are supported, and so are the transforms of
    ``torch.func``.

    Raises:
        RuntimeError: if an argument breaks a rule.
        torch.OutOfMemoryError: if a GPU has no memory for the results. On the CPU, as in PyTorch, it is a RuntimeError.
    """
    post = post_residual_addition
    if has_torch_function((x, residual, weight, post)):
        tensors = (x, residual, weight, post)
        arguments = (x, residual, weight, eps, gemma, post, round_each_step)
        y, s = overridden(add_rms_norm, ADD_RMS_NORM, tensors, *arguments)
        return y, s
    try:
        if type(eps) is not float:
            check_eps(ADD_RMS_NORM, eps)
        if _is_grad_enabled() or forward_ad._current_level >= 0 or is_compiled() or is_exported():
            arguments = (x, residual, weight, eps, gemma, post, round_each_step)
            y, s = differentiable(_add_rms_norm, ADD_RMS_NORM, *arguments)
        else:
            y, s = _add_rms_norm(x, residual, weight, eps, gemma, post, round_each_step)
    except RuntimeError as error:
        named = {"x": x, "residual": residual, "weight": weight, "post_residual_addition": post}
        explain(error, ADD_RMS_NORM, **named, eps=eps, gemma=gemma, round_each_step=round_each_step)
        raise
    return y, s


# torch.fx removes a call whose result is not used, unless the function is registered as one that has side effects.
for _function in (rms_norm, fused_add_rms_norm):
    torch.fx.node.has_side_effect(_function)


class RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.eps, ctx.gemma, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx, dweight = gradients(dy, x, weight, None, ctx.eps, ctx.gemma, *ctx.needs_input_grad[:2])
        return dx, dweight, None, None, None


class AddRMSNormFunction(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, _, weight, ctx.eps, ctx.gemma, _, _ = inputs
        ctx.dtype = x.dtype
        # PyTorch would make zeros for a result that is not used. They would be plain tensors beside DTensors.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1], weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
        """s is the sum of x, residual and post_residual_addition, so its gradient is that of each of them."""
        s, weight = ctx.saved_tensors
        needs_x, needs_residual, needs_weight, _, _, needs_post, _ = ctx.needs_input_grad
        needs_s = needs_x or needs_residual or needs_post
        ds, dweight = gradients(dy, s, weight, dsum, ctx.eps, ctx.gemma, needs_s, needs_weight)
        dx = ds.to(ctx.dtype) if ds is not None and needs_x else None
        return dx, ds if needs_residual else None, dweight, None, None, ds if needs_post else None, None


RMS_NORM = Operator("rms_norm", reference.rms_norm, _NORM, "rms_norm", derivative=RMSNormFunction)
ADD_RMS_NORM = Operator(
    "add_rms_norm",
    reference.add_rms_norm,
    _ADD,
    "add_rms_norm",
    more_results=("residual",),
    derivative=AddRMSNormFunction,
)
RMS_NORM_OUT = Operator("rms_norm.out", reference.rms_norm, {**_NORM, "out": LIKE_X}, "rms_norm")
FUSED_ADD_RMS_NORM = Operator("fused_add_rms_norm", reference.add_rms_norm, _ADD, "add_rms_norm")
register(RMS_NORM, RMS_NORM_OUT, ADD_RMS_NORM, FUSED_ADD_RMS_NORM)

_rms_norm = bare(RMS_NORM.twin)
_rms_norm_out = RMS_NORM_OUT.overload
_fused_add_rms_norm = FUSED_ADD_RMS_NORM.overload
_add_rms_norm = bare(ADD_RMS_NORM.twin)
