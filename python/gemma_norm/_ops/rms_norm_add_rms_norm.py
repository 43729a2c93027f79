"""The norm of x, added to the residual stream, and the norm of the sum: operators, public functions and derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function

from .. import reference
from .._calls import check_eps, differentiable, explain, is_compiled, is_exported, overridden
from .._checks import LIKE_WEIGHT, LIKE_X, WEIGHT, X
from .._registry import Operator, bare, register
from .rms_norm_backward import gradients

_RULES = {"x": X, "weight": WEIGHT, "residual": LIKE_X, "post_weight": LIKE_WEIGHT}
_is_grad_enabled = torch.is_grad_enabled


def fused_rms_norm_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    gemma: bool = False,
    round_each_step: bool = False,
) -> None:
    """Overwrite residual with ``s = round(residual + rms_norm(x, post_weight))`` and x with ``rms_norm(s, weight)``.

    This stands between two blocks of a model that normalises both what a block takes and what it gives: the post-norm
    of one block, the residual addition and the pre-norm of the next (Gemma 2, 3 and 4, GLM-4). The bits are those of
    :func:`gemma_norm.rms_norm` followed by :func:`gemma_norm.fused_add_rms_norm`, and the norm of x is rounded to x's
    dtype as it is there.

    Args:
        x: ``[..., hidden]``, read and written; see :func:`gemma_norm.rms_norm` for dtypes and strides. No two of its
            elements may share memory.
        residual: x's shape, dtype and device, strides of its own; read and written. It must not overlap x.
        post_weight: ``[hidden]``, contiguous, the weight's dtype: that of the norm of x.
        weight: ``[hidden]``, contiguous, x's dtype or float32; if x is float32, float16 and bfloat16 as well: that of
            the norm of the sum.
        eps, gemma, round_each_step: as for :func:`gemma_norm.rms_norm`, for both norms.

    No derivative is recorded. Tensors that require a gradient while grad mode is on, dual tensors, and calls inside a
    ``torch.func`` transform other than ``functionalize`` are refused. Use :func:`rms_norm_add_rms_norm` for these.

    Raises:
        RuntimeError: if an argument breaks a rule above. Nothing has been written then.
    """
    tensors = (x, residual, post_weight, weight)
    if has_torch_function(tensors):
        overridden(
            fused_rms_norm_add_rms_norm,
            FUSED_RMS_NORM_ADD_RMS_NORM,
            tensors,
            *tensors,
            eps,
            gemma,
            round_each_step,
        )
        return
    try:
        if type(eps) is not float:
            check_eps(FUSED_RMS_NORM_ADD_RMS_NORM, eps)
        _fused_rms_norm_add_rms_norm(x, residual, post_weight, weight, eps, gemma, round_each_step)
    except RuntimeError as error:
        _explain(error, FUSED_RMS_NORM_ADD_RMS_NORM, tensors, eps, gemma, round_each_step)
        raise


def rms_norm_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    gemma: bool = False,
    round_each_step: bool = False,
) -> tuple[Tensor, Tensor]:
    """``(rms_norm(s, weight), s)`` with ``s = round(residual + rms_norm(x, post_weight))``, two new tensors.

    The arguments are those of :func:`fused_rms_norm_add_rms_norm`, but none is written, so they may overlap. The
    results are row-major and have x's shape and dtype. Their bits are those of :func:`fused_rms_norm_add_rms_norm`.
    Derivatives of any order and mode with respect to x, residual and both weights are supported, and so are the
    transforms of ``torch.func``.

    Raises:
        RuntimeError: if an argument breaks a rule.
        torch.OutOfMemoryError: if a GPU has no memory for the results. On the CPU, as in PyTorch, it is a RuntimeError.
    """
    tensors = (x, residual, post_weight, weight)
    if has_torch_function(tensors):
        op = RMS_NORM_ADD_RMS_NORM
        y, s = overridden(rms_norm_add_rms_norm, op, tensors, *tensors, eps, gemma, round_each_step)
        return y, s
    try:
        if type(eps) is not float:
            check_eps(RMS_NORM_ADD_RMS_NORM, eps)
        if _is_grad_enabled() or forward_ad._current_level >= 0 or is_compiled() or is_exported():
            arguments = (*tensors, eps, gemma, round_each_step)
            y, s = differentiable(_rms_norm_add_rms_norm, RMS_NORM_ADD_RMS_NORM, *arguments)
        else:
            y, s = _rms_norm_add_rms_norm(x, residual, post_weight, weight, eps, gemma, round_each_step)
    except RuntimeError as error:
        _explain(error, RMS_NORM_ADD_RMS_NORM, tensors, eps, gemma, round_each_step)
        raise
    return y, s


def _explain(error: RuntimeError, op: Operator, tensors: tuple[Any, ...], eps: Any, gemma: Any, each: Any) -> None:
    named = dict(zip(("x", "residual", "post_weight", "weight"), tensors, strict=True))
    explain(error, op, **named, eps=eps, gemma=gemma, round_each_step=each)


class RMSNormAddRMSNormFunction(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, _, post_weight, weight, ctx.eps, ctx.gemma, _ = inputs
        # PyTorch would make zeros for a result that is not used. They would be plain tensors beside DTensors.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, post_weight, output[1], weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient of s is the residual's, and that of the norm of x. It goes through the second norm first."""
        x, post_weight, s, weight = ctx.saved_tensors
        needs_x, needs_residual, needs_post_weight, needs_weight = ctx.needs_input_grad[:4]
        needs_s = needs_x or needs_residual or needs_post_weight
        ds, dweight = gradients(dy, s, weight, dsum, ctx.eps, ctx.gemma, needs_s, needs_weight)
        dx = dpost_weight = None
        if needs_x or needs_post_weight:
            dx, dpost_weight = gradients(ds, x, post_weight, None, ctx.eps, ctx.gemma, needs_x, needs_post_weight)
        return dx if needs_x else None, ds if needs_residual else None, dpost_weight, dweight, None, None, None


RMS_NORM_ADD_RMS_NORM = Operator(
    "rms_norm_add_rms_norm",
    reference.rms_norm_add_rms_norm,
    _RULES,
    "rms_norm_add_rms_norm",
    more_results=("residual",),
    derivative=RMSNormAddRMSNormFunction,
)
FUSED_RMS_NORM_ADD_RMS_NORM = Operator(
    "fused_rms_norm_add_rms_norm", reference.rms_norm_add_rms_norm, _RULES, "rms_norm_add_rms_norm"
)
register(RMS_NORM_ADD_RMS_NORM, FUSED_RMS_NORM_ADD_RMS_NORM)
torch.fx.node.has_side_effect(fused_rms_norm_add_rms_norm)

_rms_norm_add_rms_norm = bare(RMS_NORM_ADD_RMS_NORM.twin)
_fused_rms_norm_add_rms_norm = FUSED_RMS_NORM_ADD_RMS_NORM.overload
