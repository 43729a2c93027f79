"""The norms of q and k and their rotation as one operator, in the attention of a patched model.

Which statements are known, and what takes their places, is in :mod:`._rotation_form`. The function that rotates is
recognised by what it computes. Where a call does not suit, the norms and that function are called.
"""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from .._ops.qk_norm_rope import qk_norm_rope
from ._forwards import in_functorch, is_compiling, is_tracing, refusal, weight_of
from ._report import Left, Report, Rotated
from ._residual import called_otherwise, norm_swap, seen_after
from ._rotation_form import forms, join
from ._source import Source, changed, source
from ._swap import STATE, SWAP, State, Swap, base_of, derive, exchange, own_forward, state

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class AttentionSwap:
    base: type[nn.Module]


def attention_subclass(swap: AttentionSwap) -> type[nn.Module]:
    return _attention_subclass(swap, swap.base.forward)


@functools.cache
def _attention_subclass(swap: AttentionSwap, original: Any) -> type[nn.Module]:
    """One for each forward that the base has had: a class may be given another one."""
    forward = changed(swap.base, join)
    return derive(swap.base, "attention", swap, forward, **{SWAP: swap, "_gemma_norm_rotate": rotate})


def rotate(
    self: nn.Module,
    q: Any,
    k: Any,
    q_norm: nn.Module,
    k_norm: nn.Module,
    function: Callable[..., Any],
    cos: Any,
    sin: Any,
    transposed: bool,
    gate: Any = None,
    shape: tuple[Any, ...] = (),
) -> Any:
    """``function(q_norm(q), k_norm(k), cos, sin)``, in one operator where it has the same bits and effects.

    q and k are ``[batch, heads, tokens, head_dim]``. ``transposed``: the norms are given tokens before heads. With a
    gate, ``gate.reshape(*shape)`` is the third result.
    """
    reason = _apart(q, k, q_norm, k_norm, function, cos, sin)
    if reason is None:
        swap = norm_swap(q_norm)
        assert swap is not None
        q_weight, k_weight = (weight_of(norm) if swap.semantics.weighted else None for norm in (q_norm, k_norm))
        copied = _copied(gate, q, shape)
        try:
            y, z, *copies = qk_norm_rope(
                q.transpose(1, 2),
                k.transpose(1, 2),
                q_weight,
                k_weight,
                cos,
                sin,
                eps=getattr(q_norm, swap.eps_name),
                gemma=swap.semantics.gemma,
                round_each_step=swap.each_step and q_weight is not None and q_weight.dtype == q.dtype,
                round_rotation=True,
                gate=gate if copied else None,
            )
        except RuntimeError as error:
            reason = refusal(error)
        else:
            turned = y.transpose(1, 2), z.transpose(1, 2)
            return turned if gate is None else (*turned, (copies[0] if copied else gate).reshape(*shape))
    if not is_compiling():
        state(self).apart(reason)
    if transposed:
        q, k = (norm(t.transpose(1, 2)).transpose(1, 2) for norm, t in ((q_norm, q), (k_norm, k)))
    else:
        q, k = q_norm(q), k_norm(k)
    turned = function(q, k, cos, sin)
    return turned if gate is None else (*turned, gate.reshape(*shape))


def _copied(gate: Any, q: Tensor, shape: tuple[Any, ...]) -> bool:
    """Whether the reshaping would copy the gate, of q's shape with the tokens before the heads, to contiguous memory.

    Where it is a view, as of a single head, what it returns shares the gate's memory, and so must stay.
    """
    if not isinstance(gate, Tensor) or gate.dtype != q.dtype or gate.device != q.device:
        return False
    batch, heads, tokens, size = q.shape
    joined = gate.shape == (batch, tokens, heads, size) and shape in (
        (batch, tokens, -1),
        (batch, tokens, heads * size),
    )
    return joined and heads > 1 and gate.stride(-1) == 1 and gate.stride(-2) != size


def _apart(
    q: Any, k: Any, q_norm: nn.Module, k_norm: nn.Module, function: Callable[..., Any], cos: Any, sin: Any
) -> str | None:
    """Why the norms and the rotation stay apart; None where they do not."""
    if is_compiling():
        return "in compiled code"
    if in_functorch() or is_tracing():
        return "inside a torch.func transform or a trace"
    tensors = (q, k, cos, sin)
    if not all(isinstance(t, Tensor) and t.dtype == q.dtype and t.device == q.device for t in tensors):
        return "q, k, cos and sin are not tensors of one dtype and device"
    if q.dim() != 4 or k.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape:
        return "q and k have not four dimensions, or cos and sin not three"
    kinds = rotation(function)
    if not (kinds.full if cos.shape[-1] == q.shape[-1] else kinds.partial):
        return "the function that rotates is not of a known kind"
    swap, other = norm_swap(q_norm), norm_swap(k_norm)
    if swap is None or other is None:
        return "the norm of q or of k is not replaced"
    for norm in (q_norm, k_norm):
        if called_otherwise(norm) or seen_after(norm):
            return "the norms have hooks, or a forward of their own"
    return _unlike(q, q_norm, swap, k_norm, other)


def _unlike(q: Tensor, q_norm: nn.Module, swap: Swap, k_norm: nn.Module, other: Swap) -> str | None:
    """Why the two norms are not of one kind that the operator has; None where they are."""
    kinds = [(s.semantics.gemma, s.semantics.weighted, s.each_step) for s in (swap, other)]
    if kinds[0] != kinds[1] or getattr(q_norm, swap.eps_name) != getattr(k_norm, other.eps_name):
        return "the norms of q and k are of two kinds"
    if swap.semantics.weighted:
        weights = [weight_of(norm) for norm in (q_norm, k_norm)]
        if any(w is None or w.device != q.device or w.shape != q.shape[-1:] for w in weights):
            return "the norms of q and k have no weight for each element of a head"
        dtypes = {w.dtype for w in weights if w is not None}
        if len(dtypes) > 1 or not all(d == q.dtype or (q.dtype, d) in swap.semantics.mixed for d in dtypes):
            return "the weight has another dtype, for which the original computes what no operator here does"
    return None


@dataclass(frozen=True)
class Rotation:
    """Whether a function computes what transformers' ``apply_rotary_pos_emb`` does: of heads that are rotated as a
    whole, and of heads whose first elements are."""

    full: bool
    partial: bool


@functools.cache
def rotation(function: Any) -> Rotation:
    """Found out by calling it. What is not a plain function may be exchanged later, so it is not known."""
    if not isinstance(function, types.FunctionType):
        return Rotation(False, False)
    return Rotation(_rotates(function, 8), _rotates(function, 4))


def _rotates(function: Callable[..., Any], rotary: int) -> bool:
    random = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device="cpu", dtype=torch.float32)

    # On the CPU, also where the program has made another device the default.
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        for dtype, batch in itertools.product(DTYPES, (1, 2)):
            q, k = (randn(2, heads, 5, 8).to(dtype) for heads in (3, 1))
            cos, sin = (randn(batch, 5, rotary).to(dtype) for _ in range(2))
            try:
                got = function(q.clone(), k.clone(), cos.clone(), sin.clone())
            except Exception:
                return False
            wanted = [_rotated(t, cos.unsqueeze(1), sin.unsqueeze(1)) for t in (q, k)]
            if not (isinstance(got, tuple) and len(got) == 2 and all(isinstance(t, Tensor) for t in got)):
                return False
            if not all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, wanted, strict=True)):
                return False
    return True


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat((turned * cos + reference.rotate_half(turned, False) * sin, rest), dim=-1)


def fuse(model: nn.Module, report: Report, planned: dict[nn.Module, Swap], done: list[nn.Module]) -> None:
    """Rewrite the attention whose form is known, and append it to ``done``. A dry run changes none."""
    for name, module in model.named_modules():
        if base_of(module) is not None:
            continue
        norms = [n for n, m in module._modules.items() if m is not None and (m in planned or norm_swap(m) is not None)]
        if len(norms) < 2:
            continue
        kind, known = type(module).__name__, source(type(module))
        found = forms(known.body) if isinstance(known, Source) else []
        if not any(set(form.norms) <= set(norms) for _, form in found):
            continue  # such as a decoder layer, which has norms of other things
        assert isinstance(known, Source)
        functions = {known.function.__globals__.get(form.function) for _, form in found}
        kinds = [rotation(function) for function in functions]
        reason = own_forward(module)
        if reason is None and not all(k.full or k.partial for k in kinds):
            reason = "the function that rotates is not of a known kind"
        if reason is not None:
            report.unrotated.append(Left(name, kind, reason))
            continue
        _, form = found[0]
        report.rotated.append(Rotated(name, kind, *form.norms, "" if form.gate is None else form.gate[1]))
        if not report.dry_run:
            exchange(module, attention_subclass(AttentionSwap(type(module))))
            module.__dict__[STATE] = State(name, report.fallbacks, report.rotations)
            done.append(module)
