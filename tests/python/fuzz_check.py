"""Makes a call of fuzz_calls.py and checks it.

A call that the contract allows must give results within it, and write nothing else. Any other must raise the exception
whose words :mod:`gemma_norm._checks` has, and write nothing at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import gemma_norm
from fuzz_calls import OPERATORS, Arguments, Call, Memory
from fuzz_oracle import OPS, assert_gradients, results
from gemma_norm import reference
from gemma_norm._checks import WITH_ROWS, Extent, check_arguments, check_memory
from support import bits

CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


def check(call: Call) -> str:
    """Make the call and check all that follows from it. Returns what kind of call it was."""
    op = call.operator
    with CONTEXTS.get(call.mode, nullcontext)():
        memory = Memory(call)
        arguments = _flawed(call, memory)
        refusal = _refusal(call, arguments, memory)
        run = functools.partial(_function(call), **arguments)
        if refusal:
            with pytest.raises(RuntimeError) as caught:
                run()
            said = str(caught.value).partition("\n")[0]
            assert said == refusal or (refusal.endswith("...") and said.startswith(refusal[:-3])), (
                f"it says {said!r}, expected {refusal!r}"
            )
            memory.assert_nothing_written_but(())
            return "refused"
        if any(t.is_meta for t in _tensors(arguments).values()):  # x, with no other tensor
            assert run().is_meta
            return "meta"
        before = {k: t.detach().clone(memory_format=torch.contiguous_format) for k, t in _tensors(arguments).items()}
        before = arguments | before
        if call.mode == "vmap" and _can_vmap(call):
            got = _vmapped(call, arguments)
        elif call.mode == "vjp" and not op.written:
            got = _in_a_transform(call, arguments)
        elif call.mode == "autograd" and op.derivative is not None:
            got = _recorded(call, arguments, before)
        else:
            got = run()
        memory.assert_nothing_written_but(op.written)
        _check_results(call, arguments, before, got)
        if call.mode in ("no_grad", "grad mode", "inference_mode") and not op.written:
            _check_fake(call, arguments, got)
    return call.mode


def _tensors(arguments: Arguments) -> dict[str, Tensor]:
    return {k: t for k, t in arguments.items() if isinstance(t, Tensor)}


def _flawed(call: Call, memory: Memory) -> Arguments:
    """The arguments with the flaws that are not of their memory."""
    arguments = memory.arguments
    kind, name, value = call.flaw or ("", "", None)
    if kind == "none":
        arguments[name] = None
    elif kind == "meta":
        arguments[name] = arguments[name].to("meta")
    elif kind == "sparse":
        arguments[name] = arguments[name].to_sparse()
    elif kind == "option":
        arguments[name] = value
    elif kind == "requires_grad" and arguments[name].is_floating_point() and call.mode != "inference_mode":
        arguments[name] = arguments[name].detach().requires_grad_()
    return {k: v for k, v in arguments.items() if v is not None or k in call.operator.rules}


def _refusal(call: Call, arguments: Arguments, memory: Memory) -> str:
    """What the call must say, by the checks in Python; and overlaps are looked for here, byte by byte."""
    op = call.operator
    full = op.bind((), arguments)
    differentiable = op.derivative is not None
    if differentiable:
        full = {k: v.detach() if isinstance(v, Tensor) else v for k, v in full.items()}
    if _writes_in_a_transform(call):
        return f"{op.label}: writing into an argument is not available ..."
    try:
        check_arguments(op, full)
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    outside = [p for p in call.flaw[2:] if call.flaw[0] == "position"] if call.flaw else []
    said = ""
    try:
        check_memory(op, full)
    except RuntimeError as error:
        said = str(error).partition("\n")[0]
    assert bool(said) == _overlaps(call, arguments, memory), f"the checks in Python say {said!r} of the overlap"
    if not said and outside and arguments["positions"].numel():
        rule = "positions must be at least 0 and less than cos_sin_cache's 7 rows"
        return f"{op.label}: {rule}, got {outside[0]}"
    return said


def _overlaps(call: Call, arguments: Arguments, memory: Memory) -> bool:
    """C9.3: an output is an input itself or overlaps no input, no other output, and not itself."""
    op = call.operator
    if not op.written or arguments[op.first].numel() == 0:
        return False
    where = {n: memory.elements(n) for n in memory.views if arguments.get(n) is not None}

    def apart(a: str, b: str) -> bool:
        return memory.views[a][0] != memory.views[b][0] or not set(where[a].tolist()) & set(where[b].tolist())

    def is_itself(a: str, b: str) -> bool:
        rows = op.rules[a].extent in WITH_ROWS and op.rules[b].extent in WITH_ROWS
        return rows and arguments[a].shape == arguments[b].shape and torch.equal(where[a], where[b])

    for name in op.written:
        if where[name].unique().numel() < where[name].numel():
            return True
        for other in where:
            if other != name and not apart(name, other) and (other in op.written or not is_itself(name, other)):
                return True
    return False


def _function(call: Call) -> Callable[..., Any]:
    """The function of the package, unless it takes what the operator does not: shapes that it broadcasts."""
    op = call.operator
    broadcasts = call.flaw and call.flaw[0] in ("shape", "none", "option", "sparse", "meta", "dtype", "stride")
    public = getattr(gemma_norm, op.label, None)
    function = public if public and call.public and not broadcasts else op.overload
    return _writing_in_a_transform(function) if _writes_in_a_transform(call) else function


def _writes_in_a_transform(call: Call) -> bool:
    return call.mode in ("vmap", "vjp") and bool(call.operator.written) and call.flaw is None


def _writing_in_a_transform(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(**arguments: Any) -> Any:
        tensors = {k: t for k, t in _tensors(arguments).items() if t.is_floating_point()}

        def of_tensors(given: dict[str, Tensor]) -> Tensor:
            function(**arguments | given)
            return torch.zeros(())

        return torch.func.vjp(of_tensors, tensors)

    return run


def _can_vmap(call: Call) -> bool:
    """Over the first dimension of x, which every tensor with rows has, and the angles too."""
    leading = len(call.shape) - (2 if "q" in call.dtypes else 1)
    return not call.operator.written and "backward" not in call.op and leading >= 1 and call.shape[0] > 0


def _vmapped(call: Call, arguments: Arguments) -> Any:
    rules, sections = call.operator.rules, call.options.get("mrope_section")
    dims = {}
    for name in _tensors(arguments):
        shared = rules[name].extent in (Extent.HIDDEN, Extent.TABLE)
        dims[name] = None if shared else 1 if rules[name].extent is Extent.POSITIONS and sections else 0
    rest = {k: v for k, v in arguments.items() if k not in dims}
    function = call.operator.overload

    def one(tensors: dict[str, Tensor]) -> Any:
        return function(**tensors, **rest)

    return torch.func.vmap(one, in_dims=(dims,))(_tensors(arguments))


def _in_a_transform(call: Call, arguments: Arguments) -> Any:
    """Results of torch.func.vjp, after a comparison of its gradients with those of the definition."""
    floats = {k: t for k, t in _tensors(arguments).items() if t.is_floating_point()}
    rest = {k: v for k, v in arguments.items() if k not in floats}

    def pulled(function: Callable[..., Any]) -> tuple[Any, Any]:
        got, back = torch.func.vjp(lambda given: function(**given, **rest), floats)
        return got, back(torch.utils._pytree.tree_map(lambda t: (t.float() * 0.37).cos().to(t.dtype), got))[0]

    full = call.operator.bind((), rest)
    names = call.operator.definition.__code__.co_varnames[: call.operator.definition.__code__.co_argcount]
    rest = {k: full[k] for k in names if k not in floats}
    got, mine = pulled(call.operator.overload)
    _, want = pulled(call.operator.definition)
    for name in floats:
        torch.testing.assert_close(mine[name], want[name], equal_nan=True)
    return got


def _recorded(call: Call, arguments: Arguments, before: Arguments) -> Any:
    """Results under autograd, after a comparison of the gradients with those of the backward operators, to the bit."""
    floats = [k for k, t in _tensors(arguments).items() if t.is_floating_point()]
    wanted = [k for k in floats if k not in call.frozen]
    given = arguments | {k: arguments[k].detach().requires_grad_(k in wanted) for k in floats}
    got = _function(call)(**given)
    returned = got if isinstance(got, tuple) else (got,)
    if wanted and not call.special:
        random = torch.Generator().manual_seed(call.seed + 1)
        douts = [torch.randn(y.shape, generator=random).to(y.dtype) for y in returned]
        mine = torch.autograd.grad(returned, [given[k] for k in wanted], douts, allow_unused=True)
        want = _composed(call.op, call.operator.bind((), before), douts)
        for name, gradient in zip(wanted, mine, strict=True):
            assert gradient is not None and gradient.dtype == given[name].dtype
            assert gradient.shape == given[name].shape
            if name in want:
                _assert_same(gradient, want[name], f"the gradient of {name}")
    return torch.utils._pytree.tree_map(torch.Tensor.detach, got)


def _composed(op: str, a: Arguments, douts: list[Tensor]) -> dict[str, Tensor]:
    """The gradients of docs/contract.md, C8, C10.3 and C11.8, by the backward operators, which are fuzzed themselves.

    That of a weight depends on the strides of x (C8.2) and is left out, but for its shape and dtype.
    """
    x, eps, gemma = a.get("x"), a["eps"], bool(a.get("gemma"))

    def ds(dout: Tensor, s: Tensor, weight: Tensor | None, dsum: Tensor | None = None) -> Tensor:
        return OPS.rms_norm_backward_input(dout, s, weight, dsum, eps, gemma)

    if op == "rms_norm":
        return {"x": ds(douts[0], x, a["weight"])}
    if op == "gated_rms_norm":
        if a["gate"] is None:
            return {"x": ds(douts[0], x, a["weight"])} if a.get("group_size") is None else {}
        options = [a.get(k) for k in ("eps", "sigmoid", "norm_before_gate", "group_size")]
        dx, dgate = OPS.gated_rms_norm_backward_input(douts[0], x, a["gate"], a["weight"], *options)
        return {"x": dx, "gate": dgate}
    if op == "qk_norm_rope":
        cos, sin = a["cos"], a["sin"]
        if cos is None:
            sections = a.get("mrope_section"), bool(a.get("mrope_interleaved"))
            cos, sin = reference.angles(a["cos_sin_cache"], a["positions"], a["interleaved"], *sections)
        found = {}
        for name, dy in zip(("q", "k"), douts, strict=True):
            first, rest = dy[..., : cos.shape[-1]].float(), dy[..., cos.shape[-1] :]
            turned = reference.rotate_half(first * sin.float().unsqueeze(-2), a["interleaved"])
            back = (first * cos.float().unsqueeze(-2) - turned).to(dy.dtype)
            found[name] = ds(torch.cat((back, rest), -1), a[name], a[f"{name}_weight"])
        return found
    given = {k: a[k] for k in ("x", "residual", "post_residual_addition") if k in a}
    if op == "rms_norm_add_rms_norm":
        options = {k: a[k] for k in ("eps", "gemma", "round_each_step")}
        n = gemma_norm.rms_norm(x, a["post_weight"], **options)
        of_s = ds(douts[0], n + a["residual"], a["weight"], douts[1])
        return {"residual": of_s, "x": ds(of_s, x, a["post_weight"])}
    s = reference.add_rms_norm(x, a["residual"], None, post_residual_addition=a["post_residual_addition"])[1]
    of_s = ds(douts[0], s, a["weight"], douts[1])
    return {k: of_s.to(t.dtype) for k, t in given.items() if t is not None}


def _assert_same(got: Tensor, want: Tensor, what: str) -> None:
    """To the bit, but for the payload of NaN."""
    differ = (bits(got) != bits(want)).view(got.shape) & ~(got.isnan() & want.isnan())
    assert not bool(differ.any()), f"{what}: {int(differ.sum())} of {differ.numel()} elements differ"


def _check_results(call: Call, arguments: Arguments, before: Arguments, got: Any) -> None:
    op = call.operator
    if op.written:
        assert got is None or got is arguments["out"]
        returned = tuple(arguments[name] for name in op.written)
    else:
        returned = tuple(y.detach() for y in (got if isinstance(got, tuple) else (got,)))
        inputs = {t.untyped_storage().data_ptr() for t in _tensors(arguments).values() if t.numel()}
        for y, name in zip(returned, (op.first, *op.more_results), strict=True):
            assert y.dtype == before[name].dtype and y.shape == before[name].shape
            assert y.is_contiguous() or call.mode in ("vmap", "vjp")
            assert not y.numel() or y.untyped_storage().data_ptr() not in inputs
    a = op.bind((), before)
    with torch.no_grad():
        if "backward" in call.op:
            if not call.special:
                assert_gradients(call.op, a, returned)
            return
        functional = OPERATORS[op.functional].overload
        same = functional(**{k: v for k, v in a.items() if k != "out"})
        native = call.mode not in ("vmap", "vjp")  # these have the bits of plain PyTorch (C8.4)
        want = results(op.functional, a, returned, native)
        for y, bound, other in zip(returned, want, same if isinstance(same, tuple) else (same,), strict=True):
            if isinstance(bound, Tensor):
                _assert_same(y, bound, "the new residual")
            else:
                bound.assert_holds(y)
            if native:
                _assert_same(y, other, "beside new tensors without gaps")


def _check_fake(call: Call, arguments: Arguments, got: Any) -> None:
    """The fake implementation, for torch.compile, foretells the shapes, strides and dtypes."""

    def on_meta(t: Any) -> Any:
        tensor = isinstance(t, Tensor)
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") if tensor else t

    with torch.no_grad():
        foretold = call.operator.overload(**{k: on_meta(t) for k, t in arguments.items()})
    for y, fake in zip(*(t if isinstance(t, tuple) else (t,) for t in (got, foretold)), strict=True):
        assert (fake.shape, fake.stride(), fake.dtype) == (y.shape, y.stride(), y.dtype)
