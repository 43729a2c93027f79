"""What the engines' functions for q and k of an attention layer share: where they are, when they are ours, the call."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._checks import INTEGERS
from .._checks_heads import MAX_HEAD_DIM
from .._ops.qk_norm_rope import qk_norm_rope
from ._engine import Engine, has_kernels

Function = Callable[..., Any]
_HALVES = (torch.float16, torch.bfloat16)


def find(engine: Engine, module: str, name: str, *parameters: str) -> Function | None:
    """The engine's function. None where it has none, or cannot import it for lack of Triton, without which nobody calls
    it.

    Raises:
        RuntimeError: it has other parameters than one of these.
    """
    try:
        found = importlib.import_module(module)
    except ImportError:
        return None
    if not hasattr(found, name):
        return None
    engine.parameters(found, name, *parameters)
    function: Function = getattr(found, name)
    return function


def replace(package: str, name: str, old: Function, new: Function) -> None:
    """Put ``new`` in place of ``old`` into each module that has it: that of its definition, and those of models."""
    for path, module in list(sys.modules.items()):
        if path.startswith(f"{package}.") and isinstance(module, ModuleType) and vars(module).get(name) is old:
            setattr(module, name, new)


def serves(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    head_dim: int,
    rotary_dim: int,
    three_positions: bool,
) -> bool:
    dtype = q.dtype
    return (
        dtype in _HALVES
        and k.dtype is dtype
        and (q_weight.dtype is dtype or q_weight.dtype is torch.float32)
        and k_weight.dtype is q_weight.dtype
        and positions.dtype in INTEGERS
        and positions.dim() == (2 if three_positions else 1)
        and head_dim <= MAX_HEAD_DIM
        and cos_sin_cache.shape[-1] == rotary_dim
        and q.stride(-1) == k.stride(-1) == positions.stride(-1) == 1
        and q_weight.is_contiguous()
        and k_weight.is_contiguous()
        and cos_sin_cache.stride(-1) == 1
        and not torch.compiler.is_compiling()
        and has_kernels(q)
    )


def compute(
    q: Tensor,
    k: Tensor,
    weights: tuple[Tensor, Tensor],
    cos_sin_cache: Tensor,
    positions: Tensor,
    eps: float,
    heads: tuple[int, int],
    head_dim: int,
    has_gate: bool,
    gemma: bool,
    sections: Sequence[int] | None,
    in_turns: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """q, k and the gate, ``[tokens, heads, head_dim]``. q and k are ``[tokens, heads * head_dim]``, with a gate behind
    each head of q. The cache is in float32: with one of q's dtype, the operator would round the products.
    """
    q, gate = q.view(len(q), heads[0], head_dim * (2 if has_gate else 1)), None
    if has_gate:
        q, gate = q[..., :head_dim], q[..., head_dim:]
    y, z, *copies = qk_norm_rope(
        q,
        k.view(len(k), heads[1], head_dim),
        *weights,
        cos_sin_cache=cos_sin_cache,
        positions=positions,
        eps=eps,
        gemma=gemma,
        round_rotation=True,
        mrope_section=sections,
        mrope_interleaved=in_turns,
        gate=gate,
    )
    return y, z, copies[0] if has_gate else None
