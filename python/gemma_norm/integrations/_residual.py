"""A residual addition and the norm after it as one operator, in the layers of a patched model.

Inside a layer, ``_gemma_norm_add(a, b, norm)`` returns ``(norm(a + b), a + b)``. Across layers,
``_gemma_norm_add_last(a, b)`` returns ``s = a + b`` and offers the next layer's norm what it computes of s. That norm
takes the offer if its input is that very tensor, neither the tensor nor the weight has been written to since, and
weight and eps are the same; else it computes its result itself. A write between two layers that PyTorch does not
count, through ``.data``, NumPy or a collective of torch.distributed, is not seen.

A norm right before the addition joins as well, if it is of the same kind as the norm after it: the two methods
``_gemma_norm_add_normed`` and ``_gemma_norm_add_normed_last`` are given what it takes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from .._ops.rms_norm import add_rms_norm
from .._ops.rms_norm_add_rms_norm import rms_norm_add_rms_norm
from ._forwards import (
    in_functorch,
    is_compiling,
    is_tracing,
    refusal,
    seen_of,
    subclass,
    usable_in_compiled_code,
    weight_of,
)
from ._report import Fused, Left, Report
from ._rewrite import form, rewritten
from ._swap import STATE, SWAP, State, Swap, base_of, derive, exchange, own_forward, state

MISSES = 3  # An offer that is not taken cost a norm: after so many, none is made any more.


@dataclass(frozen=True)
class LayerSwap:
    base: type[nn.Module]
    norms: frozenset[str]
    across: bool
    posts: frozenset[str] = frozenset()


def layer_subclass(swap: LayerSwap) -> type[nn.Module]:
    return _layer_subclass(swap, swap.base.forward)


@functools.cache
def _layer_subclass(swap: LayerSwap, original: Any) -> type[nn.Module]:
    """One for each forward that the base has had: a class may be given another one."""
    forward = rewritten(swap.base, swap.norms, swap.across, swap.posts)
    members = {
        SWAP: swap,
        "_gemma_norm_add": add,
        "_gemma_norm_add_last": add_last,
        "_gemma_norm_add_normed": add_normed,
        "_gemma_norm_add_normed_last": add_normed_last,
    }
    return derive(swap.base, "layer", swap, forward, **members)


def add(self: nn.Module, a: Any, b: Any, norm: nn.Module) -> tuple[Any, Any]:
    """``(norm(a + b), a + b)``, in one operator where it has the same bits and effects."""
    join = getattr(type(norm), "_gemma_norm_join", None)
    if join is not None and not (called_otherwise(norm) or seen_after(norm)):
        both = join(norm, a, b)
        if both is not None:
            return both  # type: ignore[no-any-return]
    swap = norm_swap(norm)
    if swap is not None:
        reason = _apart(norm, swap, a, b, hooks=True)
        if reason is None:
            try:
                return _add_rms_norm(norm, swap, a, b)
            except RuntimeError as error:
                reason = refusal(error)
        if not is_compiling():
            state(norm).apart(reason)
    s = a + b
    return norm(s), s


def add_normed(self: nn.Module, x: Any, residual: Any, post: nn.Module, norm: nn.Module, first: bool) -> Any:
    """``add`` of ``post(x)`` and residual; ``first``: in this order."""
    both = None if called_otherwise(norm) or seen_after(norm) else _normed_both(post, norm, x, residual, True)
    if both is not None:
        return both
    n = post(x)
    return add(self, n, residual, norm) if first else add(self, residual, n, norm)


def add_normed_last(self: nn.Module, x: Any, residual: Any, post: nn.Module, first: bool) -> Any:
    """``add_last`` of ``post(x)`` and residual; ``first``: in this order."""
    norm = _next(self)
    if norm is not None and state(norm).wasted < MISSES:
        both = _normed_both(post, norm, x, residual, False)
        if both is not None:
            return _offer(norm, *both)
    n = post(x)
    return add_last(self, n, residual) if first else add_last(self, residual, n)


def _next(self: nn.Module) -> nn.Module | None:
    """The norm that may be offered its result, which has none yet."""
    if is_compiling() or is_tracing() or torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return None
    norm = state(self).next
    if norm is None or norm_swap(norm) is None:
        return None
    own = state(norm)
    if own.offer is not None:
        own.offer, own.wasted = None, own.wasted + 1
    return norm


def _offer(norm: nn.Module, y: Tensor, s: Tensor) -> Tensor:
    swap = norm_swap(norm)
    assert swap is not None
    state(norm).offer = (s, s._version, seen_of(norm, swap.eps_name), y)
    return s


def add_last(self: nn.Module, a: Any, b: Any) -> Any:
    """``a + b``, with the next norm's result beside it where no gradient is recorded."""
    norm = _next(self)
    swap = None if norm is None else norm_swap(norm)
    if norm is None or swap is None:
        return a + b
    own = state(norm)
    reason = "the norm after the layer is not given its sum" if own.wasted >= MISSES else None
    if reason is None:
        both = None
        if not called_otherwise(norm) and not _unreadable(norm, swap):
            both = type(norm)._gemma_norm_join(norm, a, b)  # type: ignore[attr-defined]
        if both is None:
            reason = _apart(norm, swap, a, b, hooks=False)
        if reason is None:
            try:
                y, s = both or _add_rms_norm(norm, swap, a, b)
            except RuntimeError as error:
                reason = refusal(error)
            else:
                return _offer(norm, y, s)
    own.apart(reason)
    return a + b


def _unreadable(norm: nn.Module, swap: Swap) -> bool:
    """Whether the weight is not there yet, as FSDP's is between two layers, or a change of it would not be seen."""
    if seen_of(norm, swap.eps_name) is None:
        return True
    weight = weight_of(norm)
    return weight is not None and weight.untyped_storage().nbytes() == 0


def called_otherwise(norm: nn.Module) -> Any:
    """Whether something comes before the norm's forward, or in its place."""
    return norm._forward_pre_hooks or norm._backward_pre_hooks or "forward" in norm.__dict__


def seen_after(norm: nn.Module) -> Any:
    """Whether something is told of the norm's result, which must not be a part of another call then."""
    return (
        norm._forward_hooks
        or norm._backward_hooks
        or _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


def norm_swap(module: nn.Module) -> Swap | None:
    """That of a replaced norm without a gate."""
    swap = type(module).__dict__.get(SWAP)
    return swap if isinstance(swap, Swap) and not swap.semantics.gated else None


def _add_rms_norm(norm: nn.Module, swap: Swap, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight_of(norm) if swap.semantics.weighted else None
    each_step = swap.each_step and weight is not None and weight.dtype == a.dtype
    return add_rms_norm(a, b, weight, getattr(norm, swap.eps_name), swap.semantics.gemma, None, each_step)


def _normed_both(post: nn.Module, norm: nn.Module, x: Any, residual: Any, hooks: bool) -> tuple[Tensor, Tensor] | None:
    """``(norm(s), s)`` with ``s = post(x) + residual``, in one operator with the same bits and effects; else None."""
    swap, before = norm_swap(norm), norm_swap(post)
    if swap is None or before is None or _apart(norm, swap, x, residual, hooks):
        return None  # The addition stays apart from the norm after it too, and that gives the reason.
    reason = _unlike(post, before, norm, swap) or _apart(post, before, x, residual, hooks)
    if reason is not None:
        if not is_compiling():
            state(post).apart(reason)
        return None
    weight, post_weight, eps = weight_of(norm), weight_of(post), getattr(norm, swap.eps_name)
    assert weight is not None and post_weight is not None
    try:
        each_step = swap.each_step and weight.dtype == x.dtype
        return rms_norm_add_rms_norm(x, residual, post_weight, weight, eps, swap.semantics.gemma, each_step)
    except RuntimeError as error:
        refusal(error)  # the steps are made one by one, which gives the reason
        return None


def _unlike(post: nn.Module, before: Swap, norm: nn.Module, swap: Swap) -> str | None:
    """Why the norm before an addition cannot join it together with the norm after it; None where it can.

    The two must be alike, and nothing may come between the norm of x and the addition.
    """
    if before.takes or called_otherwise(post) or seen_after(post):
        return "the norm before the addition has hooks, a forward of its own or an offered result"
    weight, post_weight = weight_of(norm), weight_of(post)
    if weight is None or post_weight is None or weight.dtype != post_weight.dtype:
        return "the norms before and after the addition have weights of two dtypes, or one has none"
    kinds = [(s.semantics.gemma, s.semantics.weighted, s.each_step, s.native) for s in (swap, before)]
    if kinds[0] != kinds[1] or not swap.semantics.weighted:
        return "the norms before and after the addition are of two kinds"
    if getattr(norm, swap.eps_name) != getattr(post, before.eps_name):
        return "the norms before and after the addition have two eps"
    return None


def _apart(norm: nn.Module, swap: Swap, a: Any, b: Any, hooks: bool) -> str | None:
    """Why the addition stays apart from the norm; None where it does not.

    ``hooks``: whether hooks after the norm matter. Across layers the norm is called all the same, and they run.
    """
    if is_compiling():
        if not swap.native or not usable_in_compiled_code(swap, a, weight_of(norm), b):
            return "in compiled code"
    elif in_functorch() or is_tracing():
        return "inside a torch.func transform or a trace"
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return "the residual has another shape or dtype"
    if not a.is_contiguous():
        return "x is not row-major, as the operator's results are"
    weight = weight_of(norm) if swap.semantics.weighted else None
    if a.device != b.device or (weight is not None and weight.device != a.device):
        return "the residual or the norm is on another device"
    if weight is not None:
        if weight.dtype != a.dtype and (a.dtype, weight.dtype) not in swap.semantics.mixed:
            return "the weight has another dtype, for which the original computes what no operator here does"
        if not hooks and _unreadable(norm, swap):
            return "the weight is not there yet, or does not tell whether it has been written to"
    return "the norm has hooks" if called_otherwise(norm) or (hooks and seen_after(norm)) else None


def fuse(
    model: nn.Module, report: Report, planned: dict[nn.Module, Swap], across: bool, changed: list[nn.Module]
) -> None:
    """Rewrite the layers, as far as their forms are known, and append them to ``changed``. A dry run changes none."""
    names = {module: name for name, module in model.named_modules()}
    layers: dict[nn.Module, tuple[frozenset[str], frozenset[str]]] = {}

    def norm(parent: nn.Module, attribute: str) -> nn.Module | None:
        """A norm of ours, or one that a dry run would make ours."""
        child = parent._modules.get(attribute)
        swap = None if child is None else planned.get(child) or norm_swap(child)
        return child if swap is not None and not swap.semantics.gated else None

    def alike(post: nn.Module | None, after: nn.Module | None) -> bool:
        if post is None or after is None:
            return False
        own, other = (planned.get(module) or norm_swap(module) for module in (post, after))
        return own is not None and other is not None and _unlike(post, own, after, other) is None

    ends: dict[nn.Module, nn.Module] = {}  # the norm that the addition at a layer's end joins
    if across:
        for parent in names:
            for child in parent.children():
                items = [item for item in child if item is not None] if isinstance(child, nn.ModuleList) else []
                if any(norm(item, key) for item in items for key in item._modules):
                    finals = [final for key in parent._modules if (final := norm(parent, key)) is not None]
                    following = [
                        next(filter(None, (norm(i, n) for n in form(_base(i)).first)), None) for i in items[1:]
                    ]
                    following.append(finals[0] if len(finals) == 1 else None)
                    ends |= {a: b for a, b in zip(items, following, strict=True) if b is not None}
    in_lists = {item for module in names if isinstance(module, nn.ModuleList) for item in module}
    for layer, name in names.items():
        if not any(norm(layer, key) is not None for key in layer._modules) or base_of(layer) is not None:
            continue
        known = form(type(layer))
        joined = frozenset(n for n in known.norms if norm(layer, n) is not None)
        last = known.ends_with_sum and layer in ends
        reason = (
            known.reason
            or own_forward(layer)
            or ("" if joined or last else "no addition of a known form before a norm")
        )
        if reason:
            if layer in in_lists:
                report.unfused.append(Left(name, type(layer).__name__, reason))
            continue
        kind = type(layer).__name__
        posts = {n: post for n, post in known.posts.items() if norm(layer, post) is not None}
        full = {n: f"{name}.{n}".lstrip(".") for n in (*known.norms, *posts.values())}
        before = {
            n: full[post]
            for n, post in posts.items()
            if alike(layer._modules[post], layer._modules.get(n) if n else ends.get(layer))
        }
        report.fused += [Fused(name, kind, full[n], False, before.get(n, "")) for n in known.norms if n in joined]
        report.fused += [Fused(name, kind, names[ends[layer]], True, before.get("", ""))] if last else []
        layers[layer] = joined, frozenset(posts.values())
    if report.dry_run:
        return
    for layer, (joined, own_posts) in layers.items():
        last = form(type(layer)).ends_with_sum and layer in ends
        exchange(layer, layer_subclass(LayerSwap(type(layer), joined, last, own_posts)))
        layer.__dict__[STATE] = State(names[layer], report.fallbacks, report.additions)
        changed.append(layer)
        if last:
            target = ends[layer]
            state(layer).next = target
            swap = norm_swap(target)
            assert swap is not None
            if not swap.takes:
                exchange(target, subclass(replace(swap, takes=True)))


def _base(module: nn.Module) -> type[nn.Module]:
    return base_of(module) or type(module)
