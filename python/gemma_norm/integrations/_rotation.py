"""The norms of q and k and their rotation as one operator, in the attention of a patched model.

Only statements of exactly these forms are known, q and k being names, a and b any expressions, f the name of a
function, and with assignments between them that mention neither q nor k:

    q = self.q_norm(a).transpose(1, 2)    becomes    q = (a).transpose(1, 2)
    k = self.k_norm(b).transpose(1, 2)    becomes    k = (b).transpose(1, 2)
    q, k = f(q, k, cos, sin)              becomes    q, k = self._gemma_norm_rotate(q, k, self.q_norm, self.k_norm, f,
                                                                                   cos, sin, True)

    q = self.q_norm(q)                    goes
    k = self.k_norm(k)                    goes
    q, k = f(q, k, cos, sin)              becomes    the same, with False

f is recognised by what it computes. Where the call does not suit, the method calls the norms and f.
"""

from __future__ import annotations

import ast
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
from ._source import Source, blocks, changed, name_of, own_name, placed, source, target
from ._swap import STATE, SWAP, State, Swap, base_of, derive, exchange, own_forward, state

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class AttentionSwap:
    base: type[nn.Module]


@dataclass(frozen=True)
class Form:
    """Where the statements are among those of a block, and what they name."""

    places: tuple[int, int, int]
    """Of the two norms and of the rotation."""
    names: tuple[str, str]
    norms: tuple[str, str]
    function: str
    transposed: bool


def attention_subclass(swap: AttentionSwap) -> type[nn.Module]:
    return _attention_subclass(swap, swap.base.forward)


@functools.cache
def _attention_subclass(swap: AttentionSwap, original: Any) -> type[nn.Module]:
    """One for each forward that the base has had: a class may be given another one."""
    forward = changed(swap.base, _join)
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
) -> Any:
    """``function(q_norm(q), k_norm(k), cos, sin)``, in one operator where it has the same bits and effects.

    q and k are ``[batch, heads, tokens, head_dim]``. ``transposed``: the norms are given tokens before heads.
    """
    reason = _apart(q, k, q_norm, k_norm, function, cos, sin)
    if reason is None:
        swap = norm_swap(q_norm)
        assert swap is not None
        q_weight, k_weight = (weight_of(norm) if swap.semantics.weighted else None for norm in (q_norm, k_norm))
        try:
            y, z = qk_norm_rope(
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
            )
        except RuntimeError as error:
            reason = refusal(error)
        else:
            return y.transpose(1, 2), z.transpose(1, 2)
    if not is_compiling():
        state(self).apart(reason)
    if transposed:
        return function(q_norm(q.transpose(1, 2)).transpose(1, 2), k_norm(k.transpose(1, 2)).transpose(1, 2), cos, sin)
    return function(q_norm(q), k_norm(k), cos, sin)


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
        found = _forms(known.body) if isinstance(known, Source) else []
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
        report.rotated.append(Rotated(name, kind, *form.norms))
        if not report.dry_run:
            exchange(module, attention_subclass(AttentionSwap(type(module))))
            module.__dict__[STATE] = State(name, report.fallbacks, report.rotations)
            done.append(module)


def _join(body: ast.FunctionDef) -> None:
    own = own_name(body)
    for statements, form in _forms(body):
        q, k = form.names
        at_q, at_k, at_function = form.places
        call = statements[at_function].value  # type: ignore[attr-defined]
        cos, sin = (f"({ast.unparse(argument)})" for argument in call.args[2:])
        norms = ", ".join(f"{own}.{norm}" for norm in form.norms)
        joined = f"{own}._gemma_norm_rotate({q}, {k}, {norms}, {form.function}, {cos}, {sin}, {form.transposed})"
        statements[at_function] = placed(f"{q}, {k} = {joined}", statements[at_function])
        for place in (at_k, at_q):  # from the end, so that places stay right
            if form.transposed:
                transpose = statements[place].value  # type: ignore[attr-defined]
                transpose.func.value = transpose.func.value.args[0]
            else:
                del statements[place]


def _forms(body: ast.FunctionDef) -> list[tuple[list[ast.stmt], Form]]:
    """The statements of a known form, with the block that they are in; at most one in a block."""
    found = [(statements, _form(statements, own_name(body))) for statements in blocks(body)]
    return [(statements, form) for statements, form in found if form is not None]


def _form(statements: list[ast.stmt], own: str) -> Form | None:
    for at_function, statement in enumerate(statements):
        rotated = _rotation_call(statement)
        if rotated is None:
            continue
        function, names = rotated
        norms: dict[str, tuple[int, str, bool]] = {}
        for place in range(at_function - 1, -1, -1):
            before = statements[place]
            name = target(before)
            if name in names and name not in norms:
                norm = _norm_of(before, own)
                if norm is None:
                    return None
                norms[name] = (place, *norm)
                if len(norms) == 2:
                    break
            elif not isinstance(before, ast.Assign) or any(name_of(node) in names for node in ast.walk(before)):
                return None
        if len(norms) < 2:
            return None
        (at_q, q_norm, transposed), (at_k, k_norm, other) = (norms[name] for name in names)
        between = statements[min(at_q, at_k) + 1 : max(at_q, at_k)]
        mixed = any(name_of(node) in names for s in between for node in ast.walk(s))
        if mixed or transposed != other or at_q > at_k:
            return None
        return Form((at_q, at_k, at_function), names, (q_norm, k_norm), function, transposed)
    return None


def _rotation_call(statement: ast.stmt) -> tuple[str, tuple[str, str]] | None:
    """f and the names q and k in ``q, k = f(q, k, cos, sin)``."""
    call = getattr(statement, "value", None)
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1 or not isinstance(call, ast.Call):
        return None
    targets = statement.targets[0]
    names = [name_of(e) for e in targets.elts] if isinstance(targets, ast.Tuple) else []
    function = name_of(call.func)
    if len(names) != 2 or None in names or names[0] == names[1] or function is None or call.keywords:
        return None
    if len(call.args) != 4 or [name_of(a) for a in call.args[:2]] != names:
        return None
    if any(isinstance(a, ast.Starred) or name_of(n) in names for a in call.args[2:] for n in ast.walk(a)):
        return None
    return function, (names[0], names[1])  # type: ignore[return-value]


def _norm_of(statement: ast.stmt, own: str) -> tuple[str, bool] | None:
    """The attribute in ``q = self.attribute(q)``, or in ``q = self.attribute(a).transpose(1, 2)``, which is True."""
    value = getattr(statement, "value", None)
    transposed = False
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "transpose":
        if value.keywords or [getattr(a, "value", None) for a in value.args] != [1, 2]:
            return None
        value, transposed = value.func.value, True
    if not isinstance(value, ast.Call) or value.keywords or len(value.args) != 1:
        return None
    function = value.func
    if not isinstance(function, ast.Attribute) or name_of(function.value) != own:
        return None
    if isinstance(value.args[0], ast.Starred) or (not transposed and name_of(value.args[0]) != target(statement)):
        return None
    return function.attr, transposed
