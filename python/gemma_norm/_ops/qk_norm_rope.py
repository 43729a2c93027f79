"""The norms of q and k, head by head, and their rotation: operators and public functions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function

from .. import reference
from .._calls import check_eps, differentiable, explain, is_compiled, is_exported, overridden
from .._checks import COPIED, COS, COS_SIN_CACHE, OPTIONAL_LIKE_WEIGHT, OPTIONAL_WEIGHT, POSITIONS, SIN, K, Q
from .._registry import Operator, bare, register
from .qk_norm_rope_backward import QKNormRopeCopiesFunction, QKNormRopeFunction
from .rms_norm_backward import rows

_RULES = {
    "q": Q,
    "q_weight": OPTIONAL_WEIGHT,
    "k": K,
    "k_weight": OPTIONAL_LIKE_WEIGHT,
    "cos": COS,
    "sin": SIN,
    "cos_sin_cache": COS_SIN_CACHE,
    "positions": POSITIONS,
}
_TENSORS = ("q", "k", "q_weight", "k_weight", "cos", "sin", "cos_sin_cache", "positions")
_OPTIONS = (
    "eps",
    "gemma",
    "round_each_step",
    "round_rotation",
    "interleaved",
    "mrope_section",
    "mrope_interleaved",
)
_COPIED = ("gate", "v")
_is_grad_enabled = torch.is_grad_enabled


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    cos_sin_cache: Tensor | None = None,
    positions: Tensor | None = None,
    eps: float = 1e-6,
    gemma: bool = False,
    round_each_step: bool = False,
    round_rotation: bool = False,
    interleaved: bool = False,
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
    gate: Tensor | None = None,
    v: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Normalise each head of q and of k, and rotate it by its token's angles (RoPE), in two new tensors::

        n = x * rstd * (gemma ? 1 + weight : weight)              for each head x of q, and of k
        y = round(n * cos + rotate_half(n) * sin)                 of the first rotary elements
        y = round(n)                                              of the others

    with rstd as in :func:`gemma_norm.rms_norm`, over the elements of a head. ``rotate_half`` is that of transformers:
    ``(-second half, first half)`` of the rotated elements. All arithmetic is in float32, and y is rounded once.

    Args:
        q: ``[..., q_heads, head_dim]``, float32, float16 or bfloat16, head_dim at most 512; last dimension contiguous,
            any other strides, such as those of a slice of a fused projection, with or without a gate beside each head.
        k: ``[..., k_heads, head_dim]`` with q's other sizes, dtype and device, and strides of its own.
        q_weight, k_weight: ``[head_dim]``, contiguous, q's dtype or float32, one dtype for both; if q is float32,
            float16 and bfloat16 as well. None for both normalises without weights.
        cos, sin: ``[..., rotary]``, as the models of transformers make them: a number for each element that is rotated.
            ``...`` is that of q, or broadcasts to it. q's dtype or float32. rotary is even and at most head_dim.
        cos_sin_cache: in place of cos and sin, ``[max, rotary]``, as SGLang and vLLM have it: a row is the cosines of
            all pairs of elements, then their sines. q's dtype or float32.
        positions: the row of each token, int32 or int64, ``...`` of q, or broadcasts to it; with ``mrope_section``
            ``[3, ...]``. One that is not in the cache raises an error on a CPU. On a GPU, which could not report it
            without waiting, the cache's first or last row is taken.
        eps: a number, finite and not negative; used as a float32. There is no derivative of it.
        gemma: the weights are zero-centred: multiply by ``1 + weight``, which is never rounded to 16 bits.
        round_each_step: as for :func:`gemma_norm.rms_norm`; needs ``round_rotation``.
        round_rotation: round the norm to q's dtype before it is rotated and, where cos and sin, or the cache, have that
            dtype too, both products before they are added, as the classes of transformers do. With float32 angles the
            rotation is in float32, as in serving engines. Derivatives ignore the roundings.
        interleaved: the two elements of a pair are neighbours, and not half of rotary apart (NeoX). ``rotate_half`` is
            then ``(-second, first)`` of each pair, and cos and sin still have a number for each element.
        mrope_section: three sizes, which add up to rotary / 2: how many pairs take a token's first (temporal), second
            (height) and third (width) position, as in Qwen2-VL.
        mrope_interleaved: the three kinds of pairs take turns, as in Qwen3-VL and Qwen3.5: of the pairs 1, 4, 7, ...
            the first so many have the height, of 2, 5, 8, ... the width, all others the temporal position.
        gate, v: ``[..., heads, head_dim]``, any number of heads, otherwise as k. The same kernel copies them to new
            tensors, so that a gate beside each head of q, or the v of a fused projection, becomes contiguous.

    Returns:
        New row-major tensors of the shapes of q and k, and of the gate and v where they are given: ``(q, k)``,
        ``(q, k, gate)``, ``(q, k, v)`` or ``(q, k, gate, v)``. Derivatives of any order and mode with respect to q, k,
        the weights, the gate and v are supported, also of cos, sin and the cache, and so are the transforms of
        ``torch.func``.

    Raises:
        RuntimeError: if an argument breaks a rule above.
        torch.OutOfMemoryError: if a GPU has no memory for the results. On the CPU, as in PyTorch, it is a RuntimeError.
    """
    tensors = (q, k, q_weight, k_weight, cos, sin, cos_sin_cache, positions)
    options = (eps, gemma, round_each_step, round_rotation, interleaved, mrope_section, mrope_interleaved)
    if gate is not None or v is not None:
        return _with_copies(tensors, options, gate, v)
    if has_torch_function(tensors):
        named = dict(zip((*_TENSORS[6:], *_OPTIONS), (*tensors[6:], *options), strict=True))
        y, z = overridden(qk_norm_rope, QK_NORM_ROPE, tensors, *tensors[:6], **named)
        return y, z
    try:
        if type(eps) is not float:
            check_eps(QK_NORM_ROPE, eps)
        tensors = (*tensors[:4], *_broadcast(q, cos, sin, cos_sin_cache, positions, mrope_section))
        if _is_grad_enabled() or forward_ad._current_level >= 0 or is_compiled() or is_exported():
            y, z = differentiable(_qk_norm_rope, QK_NORM_ROPE, *tensors, *options)
        else:
            y, z = _qk_norm_rope(*tensors, *options)
    except RuntimeError as error:
        _explain(error, QK_NORM_ROPE, tensors, options)
        raise
    return y, z


def _with_copies(
    tensors: tuple[Any, ...], options: tuple[Any, ...], gate: Tensor | None, v: Tensor | None
) -> tuple[Tensor, ...]:
    op, copied = QK_NORM_ROPE_COPIES, (gate, v)
    given = (True, True, gate is not None, v is not None)
    if has_torch_function((*tensors, *copied)):
        names = (*_TENSORS[6:], *_OPTIONS, *_COPIED)
        named = dict(zip(names, (*tensors[6:], *options, *copied), strict=True))
        results = overridden(qk_norm_rope, op, (*tensors, *copied), *tensors[:6], **named)
        if not isinstance(results, tuple):  # a proxy of torch.fx
            return tuple(results[i] for i in range(sum(given)))
        return tuple(compress(results, given)) if len(results) == len(given) else results
    q, _, _, _, cos, sin, cos_sin_cache, positions = tensors
    try:
        if type(options[0]) is not float:
            check_eps(op, options[0])
        mrope_section = options[_OPTIONS.index("mrope_section")]
        tensors = (*tensors[:4], *_broadcast(q, cos, sin, cos_sin_cache, positions, mrope_section))
        if _is_grad_enabled() or forward_ad._current_level >= 0 or is_compiled() or is_exported():
            results = differentiable(_qk_norm_rope_copies, op, *tensors, *options, *copied)
        else:
            results = _qk_norm_rope_copies(*tensors, *options, *copied)
    except RuntimeError as error:
        _explain(error, op, (*tensors, *copied), options)
        raise
    return tuple(compress(results, given))


def fused_qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    cos_sin_cache: Tensor | None = None,
    positions: Tensor | None = None,
    eps: float = 1e-6,
    gemma: bool = False,
    round_each_step: bool = False,
    round_rotation: bool = False,
    interleaved: bool = False,
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
) -> None:
    """Overwrite q and k with the results of :func:`qk_norm_rope`, to whose bits these are equal.

    Args:
        q, k: read and written, with any strides, such as two slices of one fused projection. They must not overlap, and
            no two elements of one may share memory.
        q_weight, k_weight, cos, sin, cos_sin_cache, positions, eps, gemma, round_each_step, round_rotation,
            interleaved, mrope_section, mrope_interleaved: as for :func:`qk_norm_rope`. They must not overlap q or k.

    A gate or v stays where it is.

    No derivative is recorded. Tensors that require a gradient while grad mode is on, dual tensors, and calls inside a
    ``torch.func`` transform other than ``functionalize`` are refused. Use :func:`qk_norm_rope` for these.

    Raises:
        RuntimeError: if an argument breaks a rule. Nothing has been written then.
    """
    tensors = (q, k, q_weight, k_weight, cos, sin, cos_sin_cache, positions)
    options = (eps, gemma, round_each_step, round_rotation, interleaved, mrope_section, mrope_interleaved)
    if has_torch_function(tensors):
        named = dict(zip((*_TENSORS[6:], *_OPTIONS), (*tensors[6:], *options), strict=True))
        overridden(fused_qk_norm_rope, FUSED_QK_NORM_ROPE, tensors, *tensors[:6], **named)
        return
    try:
        if type(eps) is not float:
            check_eps(FUSED_QK_NORM_ROPE, eps)
        tensors = (*tensors[:4], *_broadcast(q, cos, sin, cos_sin_cache, positions, mrope_section))
        _fused_qk_norm_rope(*tensors, *options)
    except RuntimeError as error:
        _explain(error, FUSED_QK_NORM_ROPE, tensors, options)
        raise


def _broadcast(
    q: Any, cos: Any, sin: Any, cos_sin_cache: Any, positions: Any, mrope_section: Any
) -> tuple[Any, Any, Any, Any]:
    """Expand cos, sin and positions to q's tokens, where they are of fewer. What cannot be is left for the checks."""
    if isinstance(q, Tensor) and q.dim() >= 2:
        tokens = q.shape[:-2]
        if isinstance(cos, Tensor) and isinstance(sin, Tensor) and _are_others(cos.shape[:-1], tokens):
            cos, sin = _expanded(cos, tokens, 0, 1), _expanded(sin, tokens, 0, 1)
        if isinstance(positions, Tensor):
            axes = 0 if mrope_section is None else 1
            if _are_others(positions.shape[axes:], tokens) and (not axes or positions.shape[:1] == (3,)):
                given, positions = positions, _expanded(positions, tokens, axes, 0)
                if positions is not given and positions.dim():
                    positions = rows(positions)  # a kernel reads its last dimension with stride 1
    return cos, sin, cos_sin_cache, positions


def _are_others(sizes: Sequence[int], tokens: Sequence[int]) -> bool:
    if not (is_compiled() or is_exported()):
        return sizes != tokens
    return len(sizes) != len(tokens) or any(map(_may_differ, sizes, tokens))


def _may_differ(size: int, other: int) -> bool:
    """Whether two sizes differ, or could differ when the program that is being compiled runs."""
    if not (is_compiled() or is_exported()):
        return size != other
    from torch.fx.experimental.symbolic_shapes import guard_or_true  # takes long to import, and is loaded by now

    return bool(guard_or_true(size != other))


def _expanded(t: Tensor, tokens: torch.Size, before: int, after: int) -> Tensor:
    own = t.shape[before : t.dim() - after]
    if t.dim() < before + after or len(own) > len(tokens):
        return t
    padded = (1,) * (len(tokens) - len(own)) + tuple(own)
    if any(_may_differ(size, want) and _may_differ(size, 1) for size, want in zip(padded, tokens, strict=True)):
        return t
    shape = (*t.shape[:before], *padded, *t.shape[t.dim() - after :])
    return t.reshape(shape).expand(*t.shape[:before], *tokens, *t.shape[t.dim() - after :])


def _explain(error: RuntimeError, op: Operator, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> None:
    named = dict(zip((*_TENSORS, *_COPIED), tensors, strict=False))
    explain(error, op, **named, **dict(zip(_OPTIONS, options, strict=True)))


def _definition_with_copies(
    q: Tensor, *tensors: Any, gate: Tensor | None = None, v: Tensor | None = None, **others: Any
) -> tuple[Tensor, ...]:
    copied = (q[..., :0, :] if t is None else t for t in (gate, v))
    copies = (t.clone(memory_format=torch.contiguous_format) for t in copied)
    return *reference.qk_norm_rope(q, *tensors, **others), *copies


QK_NORM_ROPE = Operator(
    "qk_norm_rope",
    reference.qk_norm_rope,
    _RULES,
    "qk_norm_rope",
    more_results=("k",),
    derivative=QKNormRopeFunction,
)
QK_NORM_ROPE_COPIES = Operator(
    "qk_norm_rope.copies",
    _definition_with_copies,
    {**_RULES, **dict.fromkeys(_COPIED, COPIED)},
    "qk_norm_rope",
    more_results=("k", *_COPIED),
    derivative=QKNormRopeCopiesFunction,
)
FUSED_QK_NORM_ROPE = Operator("fused_qk_norm_rope", reference.qk_norm_rope, _RULES, "qk_norm_rope")
register(QK_NORM_ROPE, QK_NORM_ROPE_COPIES, FUSED_QK_NORM_ROPE)
torch.fx.node.has_side_effect(fused_qk_norm_rope)

_qk_norm_rope = bare(QK_NORM_ROPE.twin)
_qk_norm_rope_copies = bare(QK_NORM_ROPE_COPIES.twin)
_fused_qk_norm_rope = FUSED_QK_NORM_ROPE.overload
