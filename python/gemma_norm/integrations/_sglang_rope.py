"""SGLang's function for the q and k of Qwen3.5's attention, as of SGLang 0.5.23, and what computes it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import reference
from . import _engine_rope
from ._engine import Engine
from ._engine_rope import Function, compute, serves

NAME = "fused_qk_gemma_rmsnorm_rope_gate"
_MODULE = "sglang.kernels.ops.attention.fused_qk_rmsnorm_rope_gate"
_PARAMETERS = (
    "q_gate, k, q_weight, k_weight, cos_sin_cache, positions, eps, num_q_heads, num_kv_heads, head_dim, rotary_dim, "
    "has_gate=True, mrope_axis_map=None"
)
_sections: Any = WeakTensorKeyDictionary()
"""By SGLang's axis map: mrope_section and mrope_interleaved, or None if no call of ours has such a map."""


def find(engine: Engine) -> Function | None:
    return _engine_rope.find(engine, _MODULE, NAME, _PARAMETERS)


def replace(old: Function, new: Function) -> None:
    _engine_rope.replace("sglang", NAME, old, new)


def ours(theirs: Function) -> Function:
    """``theirs``, with our kernels for the calls that they serve."""

    @functools.wraps(theirs)
    def fused_qk_gemma_rmsnorm_rope_gate(
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
        has_gate: bool = True,
        mrope_axis_map: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        sections = _sections_of(mrope_axis_map) if mrope_axis_map is not None else (None, False)
        tensors = (q_gate, k, q_weight, k_weight, cos_sin_cache, positions)
        if (
            sections is None
            or cos_sin_cache.dtype is not torch.float32
            or not serves(*tensors, head_dim, rotary_dim, mrope_axis_map is not None)
        ):
            sizes = (num_q_heads, num_kv_heads, head_dim, rotary_dim)
            result: tuple[Tensor, Tensor, Tensor | None] = theirs(*tensors, eps, *sizes, has_gate, mrope_axis_map)
            return result
        weights, heads = (q_weight, k_weight), (num_q_heads, num_kv_heads)
        y, z, gate = compute(
            q_gate, k, weights, cos_sin_cache, positions, eps, heads, head_dim, has_gate, True, *sections
        )
        return y.flatten(-2), z.flatten(-2), gate

    return fused_qk_gemma_rmsnorm_rope_gate


def _sections_of(axis_map: Tensor) -> tuple[list[int], bool] | None:
    """The options by which our pairs take the same axes as in SGLang's map, which is read once, when it is first seen.

    A CUDA graph that is being captured could not wait for it.
    """
    if axis_map not in _sections:
        if torch.compiler.is_compiling() or (axis_map.is_cuda and torch.cuda.is_current_stream_capturing()):
            return None
        axes = axis_map.tolist()
        sizes = [axes.count(axis) for axis in range(3)]
        fits = (way for way in (False, True) if reference.mrope_axes(sizes, way).tolist() == axes)
        interleaved = next(fits, None)
        _sections[axis_map] = None if interleaved is None else (sizes, interleaved)
    known: tuple[list[int], bool] | None = _sections[axis_map]
    return known
