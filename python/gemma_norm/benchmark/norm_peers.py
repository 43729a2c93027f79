"""The norms of other libraries: providers.py says what is timed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cases import ADD_RMS_NORM, NORM_ADD_NORM, RMS_NORM, post_weight
from .formula import EPS
from .norms import Call, Make, in_place, two_kernels


def liger(op: str, weight: Tensor, gemma: bool) -> Call:
    ops = importlib.import_module("liger_kernel.ops")
    options = (weight, EPS, 1.0, "gemma", False) if gemma else (weight, EPS, 0.0, "llama", False)
    norm = (ops.LigerRMSNormFunction if op == RMS_NORM else ops.LigerFusedAddRMSNormFunction).apply
    return (lambda x: norm(x, *options)) if op == RMS_NORM else lambda x, residual: norm(x, residual, *options)


def quack(op: str, weight: Tensor, gemma: bool) -> Call:
    norm, offset = importlib.import_module("quack").rmsnorm, float(gemma)
    if op == RMS_NORM:
        return lambda x: norm(x, weight, eps=EPS, weight_offset=offset)
    return lambda x, residual: norm(x, weight, residual=residual, eps=EPS, prenorm=True, weight_offset=offset)


def flashinfer_names(module: str) -> Make:
    """For FlashInfer and sgl_kernel, whose functions have the same names."""

    def make(op: str, weight: Tensor, gemma: bool) -> Call:
        prefix, names = "gemma_" if gemma else "", importlib.import_module(module)
        norm: Callable[..., Any] = getattr(names, f"{prefix}rmsnorm")
        add_norm: Callable[..., Any] = getattr(names, f"{prefix}fused_add_rmsnorm")
        if op == RMS_NORM:
            return lambda x: norm(x, weight, EPS)
        if op == NORM_ADD_NORM:
            post = post_weight(weight)
            return two_kernels(lambda x: norm(x, post, EPS), in_place(add_norm, weight, EPS))
        return in_place(add_norm, weight, EPS)

    return make


def vllm(op: str, weight: Tensor, gemma: bool) -> Call:
    ops = importlib.import_module("vllm._custom_ops")

    def norm(x: Tensor, weight: Tensor = weight) -> Tensor:
        y = torch.empty_like(x)
        ops.rms_norm(y, x, weight, EPS)
        return y

    if op == RMS_NORM:
        return norm
    add_norm, post = in_place(ops.fused_add_rms_norm, weight, EPS), post_weight(weight)
    return add_norm if op == ADD_RMS_NORM else two_kernels(lambda x: norm(x, post), add_norm)


def aiter(op: str, weight: Tensor, gemma: bool) -> Call:
    library = importlib.import_module("aiter")
    if op == RMS_NORM:
        return lambda x: library.rms_norm(x, weight, EPS)

    def add_norm(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y, s = torch.empty_like(x), torch.empty_like(x)
        library.rmsnorm2d_fwd_with_add(y, x, residual, s, weight, EPS)
        return y, s

    return add_norm


def transformer_engine(op: str, weight: Tensor, gemma: bool) -> Call:
    te = importlib.import_module("transformer_engine.pytorch")
    module = te.RMSNorm(weight.numel(), eps=EPS, zero_centered_gamma=gemma).to(weight.device, weight.dtype)
    module.weight.copy_(weight)
    call: Call = module
    return call


def fla(op: str, weight: Tensor, gemma: bool) -> Call:
    norm = importlib.import_module("fla.modules.norm.fused_norm_gate").rms_norm_gated
    return lambda x, gate: norm(x, gate, weight, None, eps=EPS)
