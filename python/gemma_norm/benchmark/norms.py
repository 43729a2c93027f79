"""The norms as this package and PyTorch compute them, and copies of as many bytes: providers.py says what is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import gemma_norm

from .cases import ADD_RMS_NORM, GATED_RMS_NORM, NORM_ADD_NORM, RMS_NORM, post_weight
from .formula import EPS, normed

Outputs = Tensor | tuple[Tensor, ...]
Call = Callable[..., Outputs]
Make = Callable[[str, Tensor, bool], Call]


def ours(op: str, weight: Tensor, gemma: bool) -> Call:
    norm, add_norm = gemma_norm.rms_norm, gemma_norm.fused_add_rms_norm
    if op == RMS_NORM:
        return lambda x: norm(x, weight, EPS, gemma)
    if op == GATED_RMS_NORM:
        return lambda x, gate: gemma_norm.gated_rms_norm(x, gate, weight, EPS)
    if op == NORM_ADD_NORM:
        return in_place(gemma_norm.fused_rms_norm_add_rms_norm, post_weight(weight), weight, EPS, gemma)
    return in_place(add_norm, weight, EPS, gemma)


def two_calls(op: str, weight: Tensor, gemma: bool) -> Call:
    norm, add_norm, post = gemma_norm.rms_norm, gemma_norm.fused_add_rms_norm, post_weight(weight)
    return two_kernels(lambda x: norm(x, post, EPS, gemma, out=x), in_place(add_norm, weight, EPS, gemma))


def ours_op(op: str, weight: Tensor, gemma: bool) -> Call:
    norm = torch.ops.gemma_norm.rms_norm.default
    add_norm = torch.ops.gemma_norm.fused_add_rms_norm.default
    if op == RMS_NORM:
        return lambda x: norm(x, weight, EPS, gemma)
    return in_place(add_norm, weight, EPS, gemma)


def ours_module(op: str, weight: Tensor, gemma: bool) -> Call:
    kind = gemma_norm.GemmaRMSNorm if gemma else gemma_norm.RMSNorm
    module = kind(weight.numel(), EPS, device=weight.device, dtype=weight.dtype)
    assert module.weight is not None
    module.weight.copy_(weight)
    return module


def copy(op: str, weight: Tensor, gemma: bool) -> Call:
    if op == RMS_NORM:
        return lambda x: torch.empty_like(x).copy_(x)
    if op == GATED_RMS_NORM:  # the bytes of three tensors: two read, one written
        return lambda x, gate: torch.empty_like(both := _half_more(x, gate)).copy_(both)[: x.numel()].view_as(x)
    return lambda x, residual: (torch.empty_like(x).copy_(x), torch.empty_like(residual).copy_(residual))


def _half_more(x: Tensor, gate: Tensor) -> Tensor:
    """x and the first half of gate, which follows it in memory."""
    assert gate.data_ptr() == x.data_ptr() + x.nbytes
    return x.as_strided((x.numel() + x.numel() // 2,), (1,))


def eager(op: str, weight: Tensor, gemma: bool) -> Call:
    def norm(x: Tensor, weight: Tensor = weight) -> Tensor:
        y = normed(x)
        y = y * (1.0 + weight.float()) if gemma else y * weight.float()
        return y.type_as(x)

    def add_norm(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        s = x + residual
        return norm(s), s

    def gated_norm(x: Tensor, gate: Tensor) -> Tensor:
        y = normed(x)
        return (weight * y.type_as(x) * functional.silu(gate.float())).type_as(x)

    def norm_add_norm(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        s = residual + norm(x, post)
        return norm(s), s

    post = post_weight(weight)
    calls: dict[str, Call] = {
        RMS_NORM: norm,
        ADD_RMS_NORM: add_norm,
        GATED_RMS_NORM: gated_norm,
        NORM_ADD_NORM: norm_add_norm,
    }
    return calls[op]


def compiled(op: str, weight: Tensor, gemma: bool) -> Call:
    torch._dynamo.reset()  # so that each shape is compiled, and none exceeds the recompilation limit
    return torch.compile(eager(op, weight, gemma), fullgraph=True, dynamic=False)


def torch_rms_norm(op: str, weight: Tensor, gemma: bool) -> Call:
    shape, norm, post = tuple(weight.shape), functional.rms_norm, post_weight(weight)
    if op == RMS_NORM:
        return lambda x: norm(x, shape, weight, EPS)

    def add_norm(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        s = x + residual
        return norm(s, shape, weight, EPS), s

    if op == NORM_ADD_NORM:
        return lambda x, residual: add_norm(norm(x, shape, post, EPS), residual)
    return add_norm


def in_place(function: Callable[..., Any], *options: Any) -> Call:
    def call(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        function(x, residual, *options)
        return x, residual

    return call


def two_kernels(norm: Callable[[Tensor], Tensor], add_norm: Call) -> Call:
    """The norm of x, then the addition and the norm of the sum."""
    return lambda x, residual: add_norm(norm(x), residual)
