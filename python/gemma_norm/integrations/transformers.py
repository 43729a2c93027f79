"""transformers models, and any other PyTorch model, with this library's norms::

    from gemma_norm.integrations.transformers import patch, unpatch

    report = patch(model)
    print(report)
    unpatch(model)

Which module is a norm, and of which kind, is found out by running a copy of it; see :mod:`._semantics`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from ..gated_module import GatedRMSNorm
from ..module import RMSNorm
from . import _residual, _rotation
from ._forwards import subclass
from ._report import Fused, Left, Replaced, Report, Rotated
from ._semantics import Found, Semantics, classify
from ._semantics import Left as _Left
from ._swap import STATE, SWAP, State, Swap, base_of, exchange, own_forward

__all__ = ["Fused", "Left", "Replaced", "Report", "Rotated", "Semantics", "patch", "patched", "unpatch"]

Fuse = bool | Literal["layer"]
Rounding = Literal["original", "once"]
Compiled = Literal["formula", "native"]


def patch(
    model: nn.Module,
    fuse_residual: Fuse = False,
    rounding: Rounding = "original",
    gated: bool = True,
    strict: bool = False,
    dry_run: bool = False,
    compiled: Compiled = "formula",
    fuse_rotation: bool = False,
) -> Report:
    """Make every RMSNorm of a model run :func:`gemma_norm.rms_norm` or :func:`gemma_norm.gated_rms_norm`.

    A norm is recognised by what it computes. The modules stay where and what they are: the same parameters, the same
    names, hooks and ``state_dict``, and ``isinstance`` holds. Only the class of each becomes a subclass with another
    ``forward``, which ``print(model)`` shows, and :func:`unpatch` takes back.

    What has a ``forward`` of its own, set by ``kernelize`` or Liger on the module, is left and reported; set after
    patch, it comes before ours.

    A call that the operator refuses, or for which the original returns another dtype, runs the original ``forward`` and
    is counted in ``report.fallbacks``. So do calls inside the transforms of ``torch.func`` and traces.

    Args:
        model: any module; a norm itself too.
        fuse_residual: "layer": the addition before a norm becomes one :func:`gemma_norm.add_rms_norm` with it, in
            layers whose ``forward`` contains ``h = residual + h; residual = h; h = self.norm(h)``. True: also the
            addition at a layer's end with the first norm of the next, or the model's last, where no gradient is
            recorded and outside of ``torch.inference_mode``, whose tensors do not tell whether they have been written
            to. A hook that writes to a layer's result through ``.data``, NumPy or a collective is not seen there:
            "layer" is for such models. Where a norm of the same kind comes right before the addition,
            ``h = self.norm(h); h = residual + h``, the three become one :func:`gemma_norm.rms_norm_add_rms_norm`. The
            results have the same bits in each case. A norm with hooks, or in compiled code, is not joined.
        rounding: "original" rounds where the original rounds. "once": norms that round x * rstd before they multiply by
            the weight, as Llama's do, round at the end alone, which is nearer to the exact result. Gated norms
            likewise.
        gated: whether norms with a gate are replaced.
        strict: raise RuntimeError if a module is left that looks like a norm, and change nothing then.
        dry_run: change nothing, and report what would be done.
        compiled: what a norm is inside ``torch.compile`` and ``torch.export``: "formula", the original's, which
            Inductor fuses with what is around it, or "native", the operator, whose bits do not depend on the compiler.
        fuse_rotation: the norms of q and k become one :func:`gemma_norm.qk_norm_rope` with the rotary embedding after
            them, in attention whose ``forward`` contains ``q = self.q_norm(q); k = self.k_norm(k)``, or the same with
            ``.transpose(1, 2)`` behind, and then ``q, k = apply_rotary_pos_emb(q, k, cos, sin)``, a function that is
            recognised by what it computes. Where each head's q is followed by a gate, as in Qwen3-Next and Qwen3.5
            (``q, gate = torch.chunk(..., 2, dim=-1); gate = gate.reshape(*input_shape, -1)``), the same kernel makes
            the gate contiguous. The results have the same bits. Norms with hooks, and compiled code, are left as they
            are.

    Returns:
        what was done. A module that an earlier call replaced stays as that call made it, and is reported as such. With
        ``fuse_residual=True`` such a norm may be made to take a result from the layer before; :func:`unpatch` undoes
        it.

    Without gradients, a plain norm's result has the strides that the original gives it. Where gradients are recorded,
    and of gated norms, results are row-major. For the backward pass x itself is kept, where some originals keep a
    float32 copy of it: writing to x after the norm is then an error of autograd.

    Raises:
        TypeError: model is no ``torch.nn.Module``.
        ValueError: for an option that is none of those above.
        RuntimeError: with ``strict``, if a norm is left.
    """
    report, _ = _patch(model, fuse_residual, rounding, gated, strict, dry_run, compiled, fuse_rotation)
    return report


def unpatch(model: nn.Module) -> None:
    """Give every module that :func:`patch` changed its own class back. Others are not touched.

    Raises:
        RuntimeError: one of them has been given a class derived from ours, as a parametrization and ``fully_shard`` do.
            Nothing is changed then.
    """
    modules = list(model.modules())
    for module in modules:
        if base_of(module) is None and any(SWAP in kind.__dict__ for kind in type(module).__mro__):
            what = "undo what was made of it after patch, such as a parametrization, then unpatch"
            raise RuntimeError(f"unpatch: {type(module).__name__} is of a class derived from a patched one: {what}")
    for module in modules:
        _restore(module)


@contextlib.contextmanager
def patched(
    model: nn.Module,
    fuse_residual: Fuse = False,
    rounding: Rounding = "original",
    gated: bool = True,
    strict: bool = False,
    dry_run: bool = False,
    compiled: Compiled = "formula",
    fuse_rotation: bool = False,
) -> Iterator[Report]:
    """:func:`patch` for the length of a ``with``, which restores what it changed and nothing that was patched before.

    Raises what :func:`patch` raises.
    """
    report, changed = _patch(model, fuse_residual, rounding, gated, strict, dry_run, compiled, fuse_rotation)
    try:
        yield report
    finally:
        for module in changed:
            _restore(module)


def _patch(
    model: nn.Module,
    fuse_residual: Fuse,
    rounding: Rounding,
    gated: bool,
    strict: bool,
    dry_run: bool,
    compiled: Compiled,
    fuse_rotation: bool,
) -> tuple[Report, list[nn.Module]]:
    for name, value, allowed in (
        ("fuse_residual", fuse_residual, (False, "layer", True)),
        ("rounding", rounding, ("original", "once")),
        ("compiled", compiled, ("formula", "native")),
        ("fuse_rotation", fuse_rotation, (False, True)),
    ):
        if not any(value is a or (isinstance(a, str) and value == a) for a in allowed):
            raise ValueError(f"patch: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model must be a torch.nn.Module, got {type(model).__name__}")
    report = Report(dry_run=dry_run)
    swaps: dict[nn.Module, Swap] = {}
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        names[module] = name
        if isinstance(module, RMSNorm | GatedRMSNorm):
            continue
        if base_of(module) is not None:
            known = type(module).__dict__[SWAP]
            if isinstance(known, Swap):
                report.already.append(_describe(name, module, known, 0.0))
            continue
        kind = type(module).__name__
        found = classify(module)
        if isinstance(found, Found):
            reason = own_forward(module)
            if isinstance(module, torch.jit.ScriptModule):
                reason = "is a ScriptModule"
            elif found.semantics.gated and not gated:
                reason = "has a gate, and gated=False"
            if reason is None:
                once, native = rounding == "once", compiled == "native"
                swaps[module] = swap = Swap(type(module), found.semantics, found.eps_name, once, native)
                report.replaced.append(_describe(name, module, swap, found.share))
                continue
            report.left.append(Left(name, kind, reason))
        elif isinstance(found, _Left):
            report.left.append(Left(name, kind, found.reason))
    if strict:
        report.raise_if_left()
    changed: list[nn.Module] = []
    try:
        if not dry_run:
            for module, swap in swaps.items():
                exchange(module, subclass(swap))
                module.__dict__[STATE] = State(names[module], report.fallbacks, report.additions)
                changed.append(module)
        if fuse_residual is not False:
            _residual.fuse(model, report, swaps, fuse_residual is True, changed)
        if fuse_rotation:
            _rotation.fuse(model, report, swaps, changed)
    except BaseException:  # such as a class that does not let itself be derived from
        for module in changed:
            _restore(module)
        raise
    return report, changed


def _describe(name: str, module: nn.Module, swap: Swap, share: float) -> Replaced:
    weight = getattr(module, "weight", None)
    hidden, dtype = (None, None) if weight is None else (weight.shape[0], weight.dtype)
    semantics = replace(swap.semantics, each_step=swap.each_step)
    return Replaced(name, type(module).__name__, semantics, hidden, getattr(module, swap.eps_name), dtype, share)


def _restore(module: nn.Module) -> None:
    base = base_of(module)
    if base is not None:
        exchange(module, base)
        module.__dict__.pop(STATE, None)
