"""The public functions. Thin on purpose: in a decoding step, a microsecond of host time is the kernel's own time."""

from __future__ import annotations

import torch
from torch import Tensor

from ._autograd import AddRMSNormFunction, RMSNormFunction

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
            memory apart from it. Records no gradient.

    Returns:
        ``out``, or a new row-major tensor of x's shape and dtype. Differentiable in x and weight, once.

    Raises:
        RuntimeError: for an argument that breaks a rule above; nothing has been written then.
    """
    if out is not None:
        result: Tensor = _rms_norm_out(x, weight, eps, gemma, out=out)
    elif _is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        result = RMSNormFunction.apply(x, weight, eps, gemma)  # type: ignore[no-untyped-call]
    else:
        result = _rms_norm(x, weight, eps, gemma)
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

    Records no gradient and refuses tensors that require one while grad mode is on: :func:`add_rms_norm` is for them.

    Raises:
        RuntimeError: for an argument that breaks a rule above; nothing has been written then.
    """
    _fused_add_rms_norm(x, residual, weight, eps, gemma, post_residual_addition)


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
    dtype, bit for bit those of :func:`fused_add_rms_norm`, and differentiable, once, in x, residual, weight and
    post_residual_addition.

    Raises:
        RuntimeError: for an argument that breaks a rule.
    """
    if _is_grad_enabled() and (
        x.requires_grad
        or residual.requires_grad
        or weight.requires_grad
        or (post_residual_addition is not None and post_residual_addition.requires_grad)
    ):
        apply = AddRMSNormFunction.apply
        y, s = apply(x, residual, weight, eps, gemma, post_residual_addition)  # type: ignore[no-untyped-call]
    else:
        y, s = _add_rms_norm(x, residual, weight, eps, gemma, post_residual_addition)
    return y, s
