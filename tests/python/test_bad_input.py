"""Every bad argument: an exception that names op, argument, expected and got, and nothing written.

Each case runs on the native operator, on the plain-PyTorch implementation that serves devices without one, and, unless
it is about memory, on meta tensors: the three must say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, ones

import gemma_norm
from bad_arguments import BAD, BAD_MEMORY, Bad, not_dense
from gemma_norm import reference
from operators import (
    ADD_RMS_NORM,
    FUSED_ADD_RMS_NORM,
    FUSED_RMS_NORM_ADD_RMS_NORM,
    GATED_RMS_NORM,
    OPERATORS,
    RMS_NORM,
    RMS_NORM_ADD_RMS_NORM,
    SHAPE,
    Arguments,
    Operator,
    call,
    with_tensor,
)
from support import warnings_are


def message(kernel: Callable[..., Any], arguments: Arguments) -> str:
    """What the exception says; there is one, and no argument has changed by then."""
    tensors = [t for t in arguments.values() if isinstance(t, Tensor) and t.device.type != "meta"]
    before = [t.clone() for t in tensors]
    with pytest.raises(RuntimeError) as caught:
        call(kernel, arguments)
    for t, kept in zip(tensors, before, strict=True):
        assert torch.equal(t.to(torch.complex128), kept.to(torch.complex128)), "something was written"
    return str(caught.value).partition("\n")[0]


def parameters(cases: list[Bad]) -> list[Any]:
    return [pytest.param(op, bad, id=f"{op}-{bad.name}") for bad in cases for op in bad.ops]


every_operator = pytest.mark.parametrize("op", OPERATORS, ids=str)


@every_operator
def test_the_good_arguments_are_good(device, op):
    with torch.device(device):
        call(op.native, op.good())
        with warnings_are("ignore"):
            call(op.plain, op.good())
    with torch.device("meta"):
        call(op.native, op.good())


@pytest.mark.parametrize(("op", "bad"), parameters(BAD))
def test_a_bad_argument_is_named_alike_by_every_implementation(device, op, bad):
    with torch.device(device):
        expected = op.prefix + bad.message
        assert message(op.native, op.good() | bad.replace()) == expected
        assert message(op.plain, op.good() | bad.replace()) == expected
    with torch.device("meta"):
        assert message(op.native, op.good() | bad.replace()) == expected


@pytest.mark.parametrize(("op", "bad"), parameters(BAD_MEMORY))
def test_memory_that_must_not_overlap_is_named_alike_by_every_implementation(device, op, bad):
    with torch.device(device):
        got = message(op.native, op.good() | bad.replace())
        assert got == op.prefix + bad.message
        assert message(op.plain, op.good() | bad.replace()) == got


@pytest.mark.parametrize("what", not_dense())
@pytest.mark.parametrize(
    "argument", ["x", "weight", "residual", "post_residual_addition", "gate", "post_weight", "out"]
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_dense(what, argument):
    """They reach dispatch keys of their own (SparseCPU, QuantizedCPU, ...), for none of which there is a kernel."""
    bad = not_dense()[what]()
    for op in with_tensor(argument):
        with pytest.raises(RuntimeError) as caught:
            call(op.native, op.good() | {argument: bad})
        assert str(caught.value) == f"{op.prefix}{argument} must be a dense tensor, got {what}"


@every_operator
@pytest.mark.parametrize("kind", ["meta", *(["cuda"] if torch.cuda.is_available() else [])])
def test_a_tensor_on_another_device_than_x_is_named(op, kind):
    """On a machine without a GPU the other device is meta, whose tensors reach the fake implementation."""
    device = "cuda:0" if kind == "cuda" else "meta"
    for argument in op.tensors[1:]:
        expected = f"{op.prefix}{argument} must be on x's device"
        arguments = op.good()
        arguments[argument] = arguments[argument].to(kind)
        assert message(op.native, arguments) == f"{expected} cpu, got {device}"
        with torch.device(kind):
            arguments = op.good()
        arguments[argument] = ones(arguments[argument].shape)
        assert message(op.native, arguments) == f"{expected} {device}, got cpu"


@every_operator
@pytest.mark.parametrize("where", ["native", "plain", "meta"])
def test_gradients_are_not_lost_in_silence(op, where):
    """What writes records none, and neither do the twins and kernels below autograd: a tensor that requires one is
    refused, naming what records it.
    """
    with torch.device("meta" if where == "meta" else "cpu"):
        for name in op.tensors:
            arguments = op.good()
            arguments[name].requires_grad_()
            kernel = op.plain if where == "plain" else op.below_autograd
            got = message(kernel, arguments)
            assert got.startswith(f"{op.prefix}{name} must not require grad while grad mode is enabled")
            assert f"call gemma_norm.{op.call_instead}, which is differentiable" in got
            with torch.no_grad(), warnings_are("ignore"):
                call(kernel, arguments)


@pytest.mark.parametrize("op", [RMS_NORM, ADD_RMS_NORM, GATED_RMS_NORM, RMS_NORM_ADD_RMS_NORM], ids=str)
@pytest.mark.parametrize("where", ["native", "plain", "meta"])
def test_functional_operators_record_gradients(op, where):
    """Of each argument by itself, beside the formula in float64; on devices without a native kernel, too."""
    for name in op.tensors:
        arguments = {k: t + torch.arange(16) if isinstance(t, Tensor) else t for k, t in op.good().items()}
        wanted = arguments[name].requires_grad_()
        exact = {k: t.detach().double() for k, t in arguments.items() if isinstance(t, Tensor)}
        wanted64 = exact[name].requires_grad_()
        x = reference.oracle(exact["x"], exact["post_weight"]) if "post_weight" in exact else exact["x"]
        s = x + sum(exact[k] for k in ("residual", "post_residual_addition") if k in exact)
        y64 = reference.oracle(s, exact["weight"])
        y64 = y64 * torch.nn.functional.silu(exact["gate"]) if op is GATED_RMS_NORM else y64
        want = torch.autograd.grad(y64.sin().sum(), wanted64)[0]
        if where == "meta":
            arguments = {k: t.detach().to("meta") if isinstance(t, Tensor) else t for k, t in arguments.items()}
            wanted = arguments[name].requires_grad_()
        with plain_kernels(op) if where == "plain" else nullcontext():
            y = call(op.native, arguments)
            y = y[0] if isinstance(y, tuple) else y
            (got,) = torch.autograd.grad(y.sin().sum(), wanted)
        assert got.shape == wanted.shape and got.dtype == wanted.dtype and got.device == wanted.device
        if where != "meta":
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@contextmanager
def plain_kernels(op: Operator) -> Iterator[None]:
    """In place of the CPU's, as on a device without a native library."""
    with warnings_are("ignore"), torch.library._scoped_library("gemma_norm", "IMPL") as library:
        for name in (op.name, f"_{op.name}"):
            library.impl(name, op.plain, "CPU", allow_override=True)
        yield


@pytest.mark.parametrize("op", [RMS_NORM, ADD_RMS_NORM, GATED_RMS_NORM, RMS_NORM_ADD_RMS_NORM], ids=str)
def test_memory_that_is_short_is_reported_in_pytorchs_words(device, op):
    """Programs that try again with a smaller batch look for these words."""
    x, weight = ones(1, 16, device=device).expand(2**44, 16), ones(16, device=device)
    arguments = (x, *[x] * len(op.like_x[:1]), *[weight] * len(op.like_weight), weight)
    with pytest.raises(RuntimeError) as mine:
        op.native(*arguments)
    with pytest.raises(RuntimeError) as torchs:
        torch.empty(x.shape, device=device)
    words = (
        "can't allocate memory: you tried to allocate 1125899906842624 bytes" if device == "cpu" else "out of memory"
    )
    assert words in str(torchs.value)
    assert words in str(mine.value)
    with pytest.raises(type(torchs.value)):
        getattr(gemma_norm, op.name)(*arguments)


def test_memory_that_is_short_has_pytorchs_own_type(monkeypatch):
    """As on a GPU, where the operator can only raise a RuntimeError."""

    def short(*args: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(gemma_norm._ops.rms_norm, "_rms_norm", short)
    monkeypatch.setattr(gemma_norm._ops.rms_norm, "_add_rms_norm", short)
    for function in (gemma_norm.rms_norm, lambda x, w: gemma_norm.add_rms_norm(x, x, w)):
        with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory\. Tried to allocate 2\.00 GiB\.$"):
            function(ones(SHAPE), ones(16))


@every_operator
def test_a_lazily_negated_tensor_is_not_overwritten(op):
    for name in op.written:
        arguments = op.good()
        arguments[name] = arguments[name]._neg_view()
        expected = f"{name} is written and must not be negated lazily, got a tensor with its negative bit set"
        assert message(op.native, arguments).startswith(op.prefix + expected)
        assert all(t._version == 0 for t in arguments.values() if isinstance(t, Tensor))


@every_operator
def test_lazily_negated_tensors_that_are_read_count_as_negated(op):
    for name in set(op.tensors) - set(op.written):
        lazy, negated = op.good(), op.good()
        lazy[name], negated[name] = lazy[name]._neg_view(), -negated[name]
        got, want = call(op.native, lazy), call(op.native, negated)
        if op in (FUSED_ADD_RMS_NORM, FUSED_RMS_NORM_ADD_RMS_NORM):
            got, want = (lazy["x"], lazy["residual"]), (negated["x"], negated["residual"])
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize(
    "op",
    [RMS_NORM, ADD_RMS_NORM, FUSED_ADD_RMS_NORM, RMS_NORM_ADD_RMS_NORM, FUSED_RMS_NORM_ADD_RMS_NORM],
    ids=str,
)
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("eps", None, "eps must be a number, got None"),
        ("eps", "1e-6", "eps must be a number, got '1e-6'"),
        ("eps", torch.ones(2), r"eps must be a number, got tensor\(\[1., 1.\]\)"),
        ("eps", 10**400, "eps must be finite in float32 and at least 0, got 10*"),
        ("gemma", "yes", "gemma must be a bool, got 'yes'"),
        ("round_each_step", "yes", "round_each_step must be a bool, got 'yes'"),
        ("x", [1.0], r"x must be a tensor, got \[1.0\]"),
        ("x", None, "x must be a tensor, got None"),
        ("weight", 2.0, "weight must be a tensor, got 2.0"),
        ("residual", 0, "residual must be a tensor, got 0"),
        ("post_residual_addition", 0, "post_residual_addition must be a tensor, got 0"),
        ("post_weight", 0, "post_weight must be a tensor, got 0"),
    ],
)
def test_what_is_of_the_wrong_type_is_named(op, context, argument, value, message):
    """The message does not have the text of PyTorch's binding layer, which speaks of overloads and schemas."""
    arguments = op.good()
    if argument in arguments or argument in ("eps", "gemma", "round_each_step"):
        with context(), pytest.raises(RuntimeError, match=f"^{op}: {message}$"):
            call(getattr(gemma_norm, op.name), arguments | {argument: value})


EPS_WITH_DERIVATIVE: dict[str, tuple[Callable[[Callable[[Tensor], Any]], Any], str]] = {
    "autograd": (lambda f: f(torch.tensor(0.1, requires_grad=True)), "a tensor that requires grad"),
    "torch.func": (lambda f: torch.func.vmap(f)(torch.tensor([0.1])), "a tensor inside a torch.func transform"),
    "forward mode": (lambda f: dual(f), "a dual tensor"),
}


def dual(f: Callable[[Tensor], Any]) -> Any:
    with torch.autograd.forward_ad.dual_level():
        return f(torch.autograd.forward_ad.make_dual(torch.tensor(0.1), torch.tensor(1.0)))


@pytest.mark.parametrize("way", EPS_WITH_DERIVATIVE)
@pytest.mark.parametrize(
    "op",
    [RMS_NORM, ADD_RMS_NORM, FUSED_ADD_RMS_NORM, GATED_RMS_NORM, RMS_NORM_ADD_RMS_NORM, FUSED_RMS_NORM_ADD_RMS_NORM],
    ids=str,
)
def test_the_derivative_of_eps_is_not_dropped_in_silence(op, way):
    """PyTorch's dispatcher takes a tensor of one element for a number."""
    differentiate, got = EPS_WITH_DERIVATIVE[way]
    function = getattr(gemma_norm, op.name)
    with pytest.raises(
        RuntimeError, match=f"^{op}: eps must be a plain number, since it has no derivative, got {got}$"
    ):
        differentiate(lambda eps: call(function, op.good() | {"eps": eps}))
    with torch.no_grad():
        call(function, op.good() | {"eps": torch.tensor(0.1, requires_grad=True)})


@every_operator
def test_more_dimensions_than_pytorch_itself_counts_on(op):
    x = ones([1] * 64 + [16])
    for kernel in (op.native, op.plain):
        got = message(kernel, op.good() | {name: x for name in ("x", *op.like_x)})
        assert got == f"{op.prefix}x must have at most 64 dimensions, got 65"


def test_nothing_but_none_is_an_error_that_names_the_first():
    with pytest.raises(RuntimeError, match=r"^rms_norm: x must be a tensor, got None$"):
        gemma_norm.rms_norm(None, None)


def test_the_python_functions_pass_the_messages_on():
    x, short = ones(SHAPE), ones(15)
    needs_grad = x.clone().requires_grad_()
    for function in (gemma_norm.rms_norm, lambda x, w: gemma_norm.add_rms_norm(x, x, w)):
        for first in (x, needs_grad):
            with pytest.raises(RuntimeError, match=r"rms_norm: weight must have shape \[16\], got \[15\]"):
                function(first, short)
    with pytest.raises(
        RuntimeError, match=r"^fused_add_rms_norm: residual must have x's shape \[4, 6, 16\], got \[6, 16\]"
    ):
        gemma_norm.fused_add_rms_norm(x, x[0], ones(16))
    with pytest.raises(RuntimeError, match=r"call gemma_norm\.rms_norm without out"):
        gemma_norm.rms_norm(x, ones(16, requires_grad=True), out=torch.empty(SHAPE))
