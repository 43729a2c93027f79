"""Who else normalises and rotates q and k, or writes both norms around an addition, in kernels of their own.

A function raises ValueError at a point that the library has no function for; the results then have a note. Left out are
those that rotate by angles of their own making, or write a cache of keys and values in the same kernel: sgl_kernel's
``fused_qk_norm_rope``, FlashInfer's ``fused_qk_rmsnorm_rope`` and aiter's ``fused_qk_norm_rope_cache_quant_shuffle``.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from .rotation import EPS, Call, contiguous, k_weight, packed


def liger(op: str, weight: Tensor, gemma: bool) -> Call:
    """Its norm of q and of k, then its rotation of both, which takes [batch, heads, tokens, head_dim] and writes in
    place. It rotates whole heads.
    """
    norm = importlib.import_module("liger_kernel.ops").LigerRMSNormFunction.apply
    rope = importlib.import_module("liger_kernel.ops").LigerRopeFunction.apply
    options = (EPS, 1.0, "gemma", False) if gemma else (EPS, 0.0, "llama", False)
    second = k_weight(weight)

    def call(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        if cos.shape[-1] != q.shape[-1]:
            raise ValueError("liger's rotation has no partial form")
        q, k = (norm(x, w, *options)[None].transpose(1, 2) for x, w in ((q, weight), (k, second)))
        q, k = rope(q, k, cos[None], sin[None])
        return q.transpose(1, 2)[0], k.transpose(1, 2)[0], *contiguous(others[2:])

    return call


def flashinfer(op: str, weight: Tensor, gemma: bool) -> Call:
    """Its norm of q and of k, then its rotation of both, in place."""
    module = importlib.import_module("flashinfer")
    norm = module.gemma_rmsnorm if gemma else module.rmsnorm
    rope, second = module.apply_rope_with_cos_sin_cache_inplace, k_weight(weight)

    def call(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, rows: Tensor, *copied: Tensor
    ) -> tuple[Tensor, ...]:
        y, z = norm(q, weight, EPS), norm(k, second, EPS)
        rope(rows, y.flatten(1), z.flatten(1), q.shape[-1], cache, True)
        return y, z, *contiguous(copied)

    return call


def sglang(op: str, weight: Tensor, gemma: bool) -> Call:
    """The function of Qwen3.5's attention, which has no plain weight."""
    module = importlib.import_module("sglang.kernels.ops.attention.fused_qk_rmsnorm_rope_gate")
    function, second = module.fused_qk_gemma_rmsnorm_rope_gate, k_weight(weight)

    def call(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, rows: Tensor, *copied: Tensor
    ) -> tuple[Tensor, ...]:
        if not gemma:
            raise ValueError("sglang's function has a zero-centred weight only")
        sizes = (q.shape[1], k.shape[1], q.shape[2], cache.shape[-1])
        heads, has_gate = _flat(q, copied)
        results = function(heads, k.flatten(1), weight, second, cache, rows, EPS, *sizes, has_gate)
        return _as_heads(results, q, k, has_gate)

    return call


def vllm_gate(op: str, weight: Tensor, gemma: bool) -> Call:
    """The function of Qwen3-Next's and Qwen3.5's attention, which always copies a gate."""
    module = importlib.import_module("vllm.model_executor.layers.fused_qk_norm_rope")
    function, second = module.fused_qk_rmsnorm_rope_gate, k_weight(weight)

    def call(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, rows: Tensor, *copied: Tensor
    ) -> tuple[Tensor, ...]:
        sizes = (q.shape[1], k.shape[1], q.shape[2], cache.shape[-1])
        heads, has_gate = _flat(q, copied)
        if not has_gate:
            raise ValueError("vllm's function needs a gate")
        beta = 1.0 if gemma else 0.0
        results = function(heads, k.flatten(1), weight, second, cache, rows, EPS, *sizes, norm_beta=beta)
        return _as_heads(results, q, k, has_gate)

    return call


def vllm_in_place(op: str, weight: Tensor, gemma: bool) -> Call:
    """What its compilation pass puts into models, which has no zero-centred weight."""
    importlib.import_module("vllm._custom_ops")
    function, second = torch.ops._C.fused_qk_norm_rope, k_weight(weight)

    def call(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, rows: Tensor, *copied: Tensor
    ) -> tuple[Tensor, ...]:
        qkv = packed(q, k, copied)
        heads = (q.shape[1], k.shape[1], qkv.shape[1] // q.shape[2] - q.shape[1] - k.shape[1])
        function(qkv, *heads, q.shape[2], EPS, weight, second, cache, True, rows)
        return q, k

    return call


def _flat(q: Tensor, copied: tuple[Tensor, ...]) -> tuple[Tensor, bool]:
    """Each token's heads of q as one dimension, with the gates between them where there are any."""
    size, beside = q.shape[-1], q.stride(1) == 2 * q.shape[-1]
    if len(copied) != beside:
        raise ValueError("it copies the gate where there is one, and nothing else")
    return q.as_strided((len(q), q.shape[1] * size * (2 if beside else 1)), (q.stride(0), 1)), beside


def _as_heads(results: tuple[Any, ...], q: Tensor, k: Tensor, has_gate: bool) -> tuple[Tensor, ...]:
    y, z, gate = results
    return y.view(q.shape), z.view(k.shape), *((gate.view(q.shape),) if has_gate else ())


def aiter_norm_add_norm(op: str, weight: Tensor, gemma: bool) -> Call:
    """A Triton kernel, which has a zero-centred weight only."""
    name = "aiter.ops.triton.normalization.fused_rmsnorm_add_rmsnorm"
    function, post = importlib.import_module(name).fused_rmsnorm_add_rmsnorm, k_weight(weight)

    def call(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        if not gemma:
            raise ValueError("aiter's function has a zero-centred weight only")
        s = torch.empty_like(x)
        return function(x, residual, post, weight, EPS, EPS, s), s

    return call
