"""SGLang's function for the q and k of Qwen3.5's attention, as of SGLang 0.5.23, and what computes it."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import reference
from .._checks import INTEGERS
from .._checks_heads import MAX_HEAD_DIM
from .._ops.qk_norm_rope import qk_norm_rope
from ._engine import Engine, has_kernels

Function = Callable[..., Any]
NAME = "fused_qk_gemma_rmsnorm_rope_gate"
_MODULE = "sglang.kernels.ops.attention.fused_qk_rmsnorm_rope_gate"
_PARAMETERS = (
    "q_gate, k, q_weight, k_weight, cos_sin_cache, positions, eps, num_q_heads, num_kv_heads, head_dim, rotary_dim, "
    "has_gate=True, mrope_axis_map=None"
)
_HALVES = (torch.float16, torch.bfloat16)
_sections: Any = WeakTensorKeyDictionary()
"""By SGLang's axis map: mrope_section and mrope_interleaved, or None if no call of ours has such a map."""


def find(engine: Engine) -> Function | None:
    """SGLang's function. None where it has none, or cannot import it for lack of Triton, without which nobody calls it.

    Raises:
        RuntimeError: it has other parameters than in SGLang 0.5.23.
    """
    try:
        module = importlib.import_module(_MODULE)
    except ImportError:
        return None
    if not hasattr(module, NAME):
        return None
    engine.parameters(module, NAME, _PARAMETERS)
    found: Function = getattr(module, NAME)
    return found


def replace(old: Function, new: Function) -> None:
    """Put ``new`` in place of ``old`` into each module that has it: that of its definition, and those of models."""
    for module in _modules_of_sglang():
        if vars(module).get(NAME) is old:
            setattr(module, NAME, new)


def _modules_of_sglang() -> Iterator[ModuleType]:
    return (m for name, m in list(sys.modules.items()) if name.startswith("sglang.") and isinstance(m, ModuleType))


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
        if (
            sections is None
            or cos_sin_cache.shape[-1] != rotary_dim
            or positions.dim() != (1 if mrope_axis_map is None else 2)
            or not _serves(q_gate, k, q_weight, k_weight, cos_sin_cache, positions, head_dim)
        ):
            result: tuple[Tensor, Tensor, Tensor | None] = theirs(
                q_gate,
                k,
                q_weight,
                k_weight,
                cos_sin_cache,
                positions,
                eps,
                num_q_heads,
                num_kv_heads,
                head_dim,
                rotary_dim,
                has_gate,
                mrope_axis_map,
            )
            return result
        q, gate = q_gate.view(len(q_gate), num_q_heads, head_dim * (2 if has_gate else 1)), None
        if has_gate:
            q, gate = q[..., :head_dim], q[..., head_dim:]
        y, z, *copies = qk_norm_rope(
            q,
            k.view(len(k), num_kv_heads, head_dim),
            q_weight,
            k_weight,
            cos_sin_cache=cos_sin_cache,
            positions=positions,
            eps=eps,
            gemma=True,
            round_rotation=True,
            mrope_section=sections[0],
            mrope_interleaved=sections[1],
            gate=gate,
        )
        return y.flatten(-2), z.flatten(-2), copies[0] if has_gate else None

    return fused_qk_gemma_rmsnorm_rope_gate


def _serves(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos_sin_cache: Tensor, positions: Tensor, head_dim: int
) -> bool:
    dtype = q.dtype
    return (
        dtype in _HALVES
        and k.dtype is dtype
        and cos_sin_cache.dtype is torch.float32  # with one of q's dtype, ours would round the products
        and (q_weight.dtype is dtype or q_weight.dtype is torch.float32)
        and k_weight.dtype is q_weight.dtype
        and positions.dtype in INTEGERS
        and head_dim <= MAX_HEAD_DIM
        and q.stride(-1) == k.stride(-1) == positions.stride(-1) == 1
        and q_weight.is_contiguous()
        and k_weight.is_contiguous()
        and cos_sin_cache.stride(-1) == 1
        and not torch.compiler.is_compiling()
        and has_kernels(q)
    )


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
