"""The public functions. Thin on purpose: in a decoding step, a microsecond of host time is the kernel's own time."""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_variadic

from . import _autograd, reference
from ._autograd import AddRMSNormFunction, RMSNormFunction
from ._checks import has_tangent

_functorch_is_active = torch._C._are_functorch_transforms_active
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
        torch.OutOfMemoryError: there is no memory for the result.
    """
    if has_torch_function_variadic(x, weight, out) and not _any_nested(x, weight, out):
        if out is None and _is_in_onnx_export():
            return reference.rms_norm(x, weight, eps, gemma)
        arguments = (x, weight, out)
        overridden: Tensor = handle_torch_function(rms_norm, arguments, x, weight, eps=eps, gemma=gemma, out=out)
        return overridden
    try:
        if out is not None:
            result: Tensor = _rms_norm_out(x, weight, eps, gemma, out=out)
        elif forward_ad._current_level >= 0 and has_tangent(x, weight):
            result = _autograd.rms_norm(x, weight, eps, gemma)
        elif _is_grad_enabled() and _require_grad(x, weight):
            result = RMSNormFunction.apply(x, weight, eps, gemma)  # type: ignore[no-untyped-call]
        else:
            result = _rms_norm(x, weight, eps, gemma)
    except RuntimeError as error:
        _raise_out_of_memory(error)
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
    ``torch.func`` transform are refused: :func:`add_rms_norm` is for them.

    Raises:
        RuntimeError: for an argument that breaks a rule above; nothing has been written then.
    """
    tensors = (x, residual, weight, post_residual_addition)
    if has_torch_function(tensors) and not _any_nested(*tensors):
        handle_torch_function(fused_add_rms_norm, tensors, x, residual, weight, eps, gemma, post_residual_addition)
    else:
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
    dtype, and bit for bit those of :func:`fused_add_rms_norm`. Derivatives of any order and mode with respect to x,
    residual, weight and post_residual_addition are supported, and so are the transforms of ``torch.func``.

    Raises:
        RuntimeError: for an argument that breaks a rule.
        torch.OutOfMemoryError: there is no memory for the results.
    """
    tensors = (x, residual, weight, post_residual_addition)
    if has_torch_function(tensors) and not _any_nested(*tensors):
        arguments = (x, residual, weight, eps, gemma, post_residual_addition)
        if _is_in_onnx_export():
            return reference.add_rms_norm(*arguments)
        overridden: tuple[Tensor, Tensor] = handle_torch_function(add_rms_norm, tensors, *arguments)
        return overridden
    try:
        if forward_ad._current_level >= 0 and has_tangent(*tensors):
            y, s = _autograd.add_rms_norm(x, residual, weight, eps, gemma, post_residual_addition)
        elif _is_grad_enabled() and _require_grad(*tensors):
            apply = AddRMSNormFunction.apply
            y, s = apply(x, residual, weight, eps, gemma, post_residual_addition)  # type: ignore[no-untyped-call]
        else:
            y, s = _add_rms_norm(x, residual, weight, eps, gemma, post_residual_addition)
    except RuntimeError as error:
        _raise_out_of_memory(error)
        raise
    return y, s


def _any_nested(*tensors: Tensor | None) -> bool:
    """The operators refuse nested tensors, whose own __torch_function__ takes ``rms_norm`` for PyTorch's, by its name."""
    return any(isinstance(t, Tensor) and t.is_nested for t in tensors)


def _is_in_onnx_export() -> bool:
    """Whether the call is traced for ONNX, which has no such operator and takes its definition. Importing torch.onnx is
    slow, and there is no export before it has been imported."""
    onnx = sys.modules.get("torch.onnx")
    return onnx is not None and bool(onnx.is_in_onnx_export())


def _require_grad(*tensors: Tensor | None) -> bool:
    """Whether a gradient is to be recorded here. Inside a torch.func transform the operator itself sees to it."""
    return any(getattr(t, "requires_grad", False) for t in tensors) and not _functorch_is_active()


def _raise_out_of_memory(error: RuntimeError) -> None:
    """The operators can only raise a RuntimeError; memory that is short has a type of its own in PyTorch."""
    if " out of memory" in str(error) and type(error) is RuntimeError:
        raise torch.OutOfMemoryError(str(error)) from None
