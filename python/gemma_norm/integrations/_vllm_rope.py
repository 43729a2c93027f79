"""vLLM's function for the q and k of Qwen3-Next's and Qwen3.5's attention, and what computes it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import _engine_rope
from ._engine import Engine
from ._engine_rope import Function, compute, serves

NAME = "fused_qk_rmsnorm_rope_gate"
_MODULE = "vllm.model_executor.layers.fused_qk_norm_rope"
_FIRST = "q_gate, k, q_weight, k_weight, cos_sin_cache, positions, eps, num_q_heads, num_kv_heads, head_dim, rotary_dim"
_PARAMETERS = (_FIRST, f"{_FIRST}, mrope_section=None, norm_beta=0.0")
"""At first the caller adds the 1 to a zero-centred weight, and there is one position."""
_wide: Any = WeakTensorKeyDictionary()
"""By vLLM's cache: the version of it that was read, and its numbers in float32."""


def find(engine: Engine) -> Function | None:
    return _engine_rope.find(engine, _MODULE, NAME, *_PARAMETERS)


def replace(old: Function, new: Function) -> None:
    _engine_rope.replace("vllm", NAME, old, new)
    _wide.clear()


def ours(theirs: Function, batch_invariant: Callable[[], bool]) -> Function:
    """``theirs``, with our kernels for the calls that they serve."""

    @functools.wraps(theirs)
    def fused_qk_rmsnorm_rope_gate(
        q_gate: Tensor,
        k: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        cos_sin_cache: Tensor,
        positions: Tensor,
        eps: float,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rotary_dim: int,
        mrope_section: Sequence[int] | None = None,
        norm_beta: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors = (q_gate, k, q_weight, k_weight, cos_sin_cache, positions)
        cache = None
        if (
            norm_beta in (0.0, 1.0)
            and serves(*tensors, head_dim, rotary_dim, mrope_section is not None)
            and not batch_invariant()
        ):
            cache = _in_float32(cos_sin_cache)
        if cache is None:
            sizes = (num_q_heads, num_kv_heads, head_dim, rotary_dim)
            # vLLM's first form of the function does not know the last two.
            options = {"mrope_section": mrope_section, "norm_beta": norm_beta}
            given = {name: value for name, value in options.items() if value}
            result: tuple[Tensor, Tensor, Tensor] = theirs(*tensors, eps, *sizes, **given)
            return result
        weights, heads = (q_weight, k_weight), (num_q_heads, num_kv_heads)
        # Three positions take turns.
        sections = (None, False) if mrope_section is None else (list(mrope_section), True)
        gemma = norm_beta == 1.0
        y, z, gate = compute(q_gate, k, weights, cache, positions, eps, heads, head_dim, True, gemma, *sections)
        assert gate is not None
        return y.flatten(-2), z.flatten(-2), gate.flatten(-2)

    return fused_qk_rmsnorm_rope_gate


def _in_float32(cache: Tensor) -> Tensor | None:
    """vLLM keeps the cache in the model's dtype and rotates in float32, for which ours reads it in float32. A copy is
    made when a cache is first seen, not while a CUDA graph is captured, in whose memory it would lie.
    """
    if cache.dtype is torch.float32:
        return cache
    version = None if cache.is_inference() else cache._version
    known = _wide.get(cache)
    if known is None or known[0] != version:
        if cache.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        known = _wide[cache] = (version, cache.float())
    wide: Tensor = known[1]
    return wide
