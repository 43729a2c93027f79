"""The derivative of qk_norm_rope: rotate back, then the norms' own backward kernels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .rms_norm_backward import gradients

TENSORS = 8
"""Of the arguments: q, k, their weights, cos, sin, the cache and positions. The options follow."""


class QKNormRopeFunction(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options = inputs[TENSORS:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:TENSORS])

    @staticmethod
    def backward(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Tensor | None, ...]:
        """Rotate the gradients back, round them to q's dtype, and pass them to the norms' own backward kernels."""
        saved = ctx.saved_tensors  # once, since what checkpoints save can be unpacked once
        q, k, q_weight, k_weight, cos, sin, cache, positions = saved
        eps, gemma, _, _, interleaved, sections, mrope_interleaved = ctx.options
        needs_q, needs_k, needs_q_weight, needs_k_weight = ctx.needs_input_grad[:4]
        of_angles: tuple[Tensor | None, ...] = (None, None, None)
        if any(ctx.needs_input_grad[4:7]):
            of_angles = _gradients_of_angles(saved, ctx.options, ctx.needs_input_grad[4:7], dq, dk)
        if cos is None:
            cos, sin = reference.angles(cache, positions, interleaved, sections, mrope_interleaved)
        dq, dk = (None if d is None else _rotated_back(d, cos, sin, interleaved) for d in (dq, dk))
        dx, dq_weight = gradients(dq, q, q_weight, None, eps, gemma, needs_q, needs_q_weight)
        dz, dk_weight = gradients(dk, k, k_weight, None, eps, gemma, needs_k, needs_k_weight)
        return dx, dz, dq_weight, dk_weight, *of_angles, None, *(None for _ in ctx.options)


def _first(t: Tensor, count: int) -> Tensor:
    """The first elements of each row. PyTorch cannot batch a slice that is the whole (is_grads_batched)."""
    return t if count == t.shape[-1] else t[..., :count]


def _rotated_back(dy: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The gradient of the norm, from that of its rotation: the transposed rotation, in float32, rounded once."""
    rotary = cos.shape[-1]
    turned = _first(dy, rotary).float()
    back = turned * cos.float().unsqueeze(-2) - reference.rotate_half(turned * sin.float().unsqueeze(-2), interleaved)
    back = back.to(dy.dtype)
    return back if rotary == dy.shape[-1] else torch.cat((back, dy[..., rotary:]), dim=-1)


def _gradients_of_angles(
    tensors: Sequence[Any], options: Sequence[Any], needs: Sequence[bool], dq: Tensor | None, dk: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of cos, sin and the cache, which few programs want, by the norms' definition in plain PyTorch."""
    q, k, q_weight, k_weight, cos, sin, cache, positions = tensors
    eps, gemma, round_each_step, round_rotation, interleaved, sections, mrope_interleaved = options
    rotary = (cache if cos is None else cos).shape[-1]
    of_cos, of_sin = [], []
    for x, weight, dy in ((q, q_weight, dq), (k, k_weight, dk)):
        if dy is None:
            continue
        n = _first(reference.norm_of_heads(x, weight, eps, gemma, round_each_step, round_rotation), rotary)
        dy = _first(dy, rotary).float()
        of_cos.append((dy * n).sum(-2))
        of_sin.append((dy * reference.rotate_half(n, interleaved)).sum(-2))
    if not of_cos:
        return None, None, None
    dcos, dsin = (functools.reduce(torch.add, parts) for parts in (of_cos, of_sin))
    if cache is None:
        return dcos.to(cos.dtype) if needs[0] else None, dsin.to(sin.dtype) if needs[1] else None, None
    return None, None, _gradient_of_cache(cache, positions, dcos, dsin, interleaved, sections, mrope_interleaved)


def _gradient_of_cache(
    cache: Tensor,
    positions: Tensor,
    dcos: Tensor,
    dsin: Tensor,
    interleaved: bool,
    sections: list[int] | None,
    mrope_interleaved: bool,
) -> Tensor:
    """Each row gets the sum over the tokens at its position. A row has one number for the two elements of a pair."""

    def of_pairs(d: Tensor) -> Tensor:
        return d[..., ::2] + d[..., 1::2] if interleaved else torch.add(*d.chunk(2, dim=-1))

    def summed(rows: Tensor, index: Tensor) -> Tensor:
        # Not index_add: PyTorch 2.11 takes indices and rows apart if they are distributed tensors.
        dcache: Tensor = torch.ops.aten.embedding_dense_backward(rows, index, cache.shape[0], -1, False)
        return dcache

    rows = torch.cat((of_pairs(dcos), of_pairs(dsin)), dim=-1)
    index = positions.long().clamp(0, cache.shape[0] - 1)
    if sections is None:
        return summed(rows, index).to(cache.dtype)
    axes = reference.mrope_axes(sections, mrope_interleaved, rows.device).repeat(2)
    return functools.reduce(torch.add, [summed(rows * (axes == i), index[i]) for i in range(3)]).to(cache.dtype)


class QKNormRopeCopiesFunction(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        QKNormRopeFunction.setup_context(ctx, inputs[:-2], output)

    @staticmethod
    def backward(ctx: Any, dq: Tensor | None, dk: Tensor | None, *copied: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient of what is copied is that of the copy."""
        needs = ctx.needs_input_grad[-2:]
        passed = (d if needed else None for d, needed in zip(copied, needs, strict=True))
        return *QKNormRopeFunction.backward(ctx, dq, dk), *passed
