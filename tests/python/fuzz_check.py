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
from fuzz_calls import Arguments, Call
from fuzz_memory import Memory, as_argument
from fuzz_results import as_tuple, assert_same, check_fake, check_results, composed, returns_y, tensors_of
from gemma_norm._checks import WITH_ROWS, Extent, check_arguments, check_memory
from gemma_norm._registry import Operator

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
        # Dynamo takes no out that has gaps.
        compiled = call.mode == "compile" and not refusal and memory.is_without_gaps("out")
        compiled = compiled and not _inductor_cannot(call)
        run = functools.partial(_function(call, compiled), **arguments)
        if refusal:
            with pytest.raises(RuntimeError) as caught:
                run()
            said = str(caught.value).partition("\n")[0]
            assert said == refusal or (refusal.endswith("...") and said.startswith(refusal[:-3])), (
                f"it says {said!r}, expected {refusal!r}"
            )
            memory.assert_nothing_written_but(())
            return "refused"
        if any(t.is_meta for t in tensors_of(arguments).values()):  # x, with no other tensor
            assert all(t.is_meta for t in as_tuple(run()))
            return "meta"
        before = {k: t.detach().clone(memory_format=torch.contiguous_format) for k, t in tensors_of(arguments).items()}
        before = arguments | before
        if call.mode == "vmap" and _can_vmap(call):
            got = _vmapped(call, arguments)
        elif call.mode == "vjp" and not op.written and not op.new_results:
            got = _in_a_transform(call, arguments)
        elif call.mode == "autograd" and op.derivative is not None:
            got = _recorded(call, arguments, before)
        else:
            got = run()
        memory.assert_nothing_written_but(op.written)
        check_results(call, arguments, before, got)
        if call.mode in ("no_grad", "grad mode", "inference_mode") and (op.new_results or not op.written):
            check_fake(call, arguments, got)
    return call.mode


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
        arguments[name] = as_argument(name, value)
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
    if _is_refused_in_a_transform(call):
        what = "a quantised result has no derivative" if op.new_results else "writing into an argument is not available"
        return f"{op.label}: {what}..."
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
    if not said and outside and arguments["positions"].numel() and call.device == "cpu":
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


def _inductor_cannot(call: Call) -> bool:
    """What the docstring of fused_add_rms_norm_quant says of PyTorch 2.13."""
    exponents = call.options.get("scale_dtype") == "float8_e8m0fnu"
    return exponents and not call.public and call.op.startswith("fused_add_rms_norm_quant")


def _function(call: Call, compiled: bool = False) -> Callable[..., Any]:
    """The function of the package, unless it takes what the operator does not: shapes that it broadcasts."""
    op = call.operator
    broadcasts = call.flaw and call.flaw[0] in ("shape", "none", "option", "sparse", "meta", "dtype", "stride")
    public = getattr(gemma_norm, op.label, None)
    is_public = public and call.public and not broadcasts
    function = public if is_public else op.overload
    if _is_refused_in_a_transform(call):
        return _in_vjp(function)
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True, dynamic=bool(call.seed % 2))
    return functools.partial(_as_operator, op, function) if is_public else function


def _as_operator(op: Operator, function: Callable[..., Any], **arguments: Any) -> Any:
    """A function's results as the operator returns them: not with the scale that was given, and with empty copies."""
    got = function(**arguments, **({"return_y": True} if returns_y(op) else {}))
    if "scale" in op.rules:
        assert got[1] is arguments["scale"]
        return got[0] if len(got) == 2 else (got[0], *got[2:])
    if op.name.endswith(".copies"):
        q, k, *copies = got
        empty = torch.empty_like(arguments["q"][..., :0, :], memory_format=torch.contiguous_format)
        return q, k, *(empty if arguments[name] is None else copies.pop(0) for name in ("gate", "v"))
    return got


def _is_refused_in_a_transform(call: Call) -> bool:
    op = call.operator
    refused = (op.written and call.mode in ("vmap", "vjp")) or (op.new_results is not None and call.mode == "vjp")
    return bool(refused) and call.flaw is None


def _in_vjp(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(**arguments: Any) -> Any:
        tensors = {k: t for k, t in tensors_of(arguments).items() if t.is_floating_point()}

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
    for name in tensors_of(arguments):
        shared = rules[name].extent in (Extent.HIDDEN, Extent.TABLE, Extent.ONE)
        dims[name] = None if shared else 1 if rules[name].extent is Extent.POSITIONS and sections else 0
    rest = {k: v for k, v in arguments.items() if k not in dims}
    function = call.operator.overload

    def one(tensors: dict[str, Tensor]) -> Any:
        return function(**tensors, **rest)

    return torch.func.vmap(one, in_dims=(dims,))(tensors_of(arguments))


def _in_a_transform(call: Call, arguments: Arguments) -> Any:
    """Results of torch.func.vjp, after a comparison of its gradients with those of the definition."""
    floats = {k: t for k, t in tensors_of(arguments).items() if t.is_floating_point()}
    rest = {k: v for k, v in arguments.items() if k not in floats}

    def pulled(function: Callable[..., Any]) -> tuple[Any, Any]:
        got, back = torch.func.vjp(lambda given: function(**given, **rest), floats)
        return got, back(torch.utils._pytree.tree_map(lambda t: (t.float() * 0.37).cos().to(t.dtype), got))[0]

    rest = {k: v for k, v in call.operator.bind((), rest).items() if k not in floats}
    got, mine = pulled(call.operator.overload)
    _, want = pulled(call.operator.definition)
    for name in floats:
        torch.testing.assert_close(mine[name], want[name], equal_nan=True)
    return got


def _recorded(call: Call, arguments: Arguments, before: Arguments) -> Any:
    """Results under autograd, after a comparison of the gradients with those of the backward operators, to the bit."""
    floats = [k for k, t in tensors_of(arguments).items() if t.is_floating_point()]
    wanted = [k for k in floats if k not in call.frozen]
    given = arguments | {k: arguments[k].detach().requires_grad_(k in wanted) for k in floats}
    got = _function(call)(**given)
    returned = as_tuple(got)
    if wanted and not call.special:
        random = torch.Generator().manual_seed(call.seed + 1)
        douts = [torch.randn(y.shape, generator=random).to(y) for y in returned]
        pairs = [(y, dy) for y, dy in zip(returned, douts, strict=True) if y.requires_grad]
        mine = torch.autograd.grad(
            [y for y, _ in pairs], [given[k] for k in wanted], [dy for _, dy in pairs], allow_unused=True
        )
        want = composed(call.operator.label, call.operator.bind((), before), douts)
        for name, gradient in zip(wanted, mine, strict=True):
            assert gradient is not None and gradient.dtype == given[name].dtype
            assert gradient.shape == given[name].shape
            if name in want:
                assert_same(gradient, want[name], f"the gradient of {name}")
    return torch.utils._pytree.tree_map(torch.Tensor.detach, got)
