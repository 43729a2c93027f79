"""What the gradients of the three functions promise, on every device: their values, and what they do with memory.

Also what the operators that compute them refuse, in the same words natively and in plain PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gemma_norm
from gemma_norm import _registry
from support import DTYPES, assert_same_bits, randn, warnings_are

OPS = torch.ops.gemma_norm
# From the tensors x, weight and one more to y; `other` is the residual stream or the gate.
NORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "rms_norm": lambda x, weight, other: gemma_norm.rms_norm(x, weight),
    "gemma": lambda x, weight, other: gemma_norm.rms_norm(x, weight, gemma=True),
    "add_rms_norm": lambda x, weight, other: gemma_norm.add_rms_norm(x, other, weight)[0],
    "gated_rms_norm": lambda x, weight, other: gemma_norm.gated_rms_norm(x, other, weight),
    "sigmoid first": lambda x, weight, other: gemma_norm.gated_rms_norm(
        x, other, weight, sigmoid=True, norm_before_gate=False
    ),
}
every_norm = pytest.mark.parametrize("name", NORMS)


def exact(name: str, x: Tensor, weight: Tensor, other: Tensor, constant_rstd: bool = False) -> Tensor:
    """The definition in float64. Of add_rms_norm, x is the rounded sum."""
    activation = torch.sigmoid(other) if name == "sigmoid first" else torch.nn.functional.silu(other)
    s = x * activation if name == "sigmoid first" else x
    rstd = torch.rsqrt(s.square().mean(-1, keepdim=True) + 1e-6)
    n = s * (rstd.detach() if constant_rstd else rstd) * (1 + weight if name == "gemma" else weight)
    return n * activation if name == "gated_rms_norm" else n


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def tensors(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    """x, weight, other, and the incoming gradient."""
    x, other, dy = (randn(*shape, dtype=dtype, device=device, seed=seed) for seed in range(3))
    return [x, 1 + randn(shape[-1], dtype=dtype, device=device, seed=3) / 8, other, dy]


def used(name: str) -> tuple[int, ...]:
    """Which of x, weight and other the norm has."""
    return (0, 1) if name in ("rms_norm", "gemma") else (0, 1, 2)


def gradients(name: str, dy: Tensor, *given: Tensor) -> list[Tensor]:
    inputs = leaves(*given)
    return list(torch.autograd.grad(NORMS[name](*inputs), [inputs[i] for i in used(name)], dy))


def assert_close(got: Tensor, want: Tensor, term: Tensor, hidden: int, rows: int) -> None:
    """One rounding to the gradient's dtype, and float32's errors. The latter are a few units of the terms that the
    gradient is the sum of, and grow as the roots of the numbers of terms that are added. x's gradient is the difference
    of ``term`` and one of about its size, so it can be much smaller than both; with one element to a row, it is almost
    zero.
    """
    assert got.isfinite().all()
    float32 = torch.finfo(torch.float32).eps * (8 + math.sqrt(hidden) + math.sqrt(rows))
    size = want.abs().max()
    limit = torch.finfo(got.dtype).eps / 2 * size + float32 * torch.maximum(size, term.abs().max())
    assert float((got.double() - want).abs().max()) <= float(limit)


@every_norm
@pytest.mark.parametrize("hidden", [1, 31, 64, 1000, 4104])
@pytest.mark.parametrize("rows", [1, 9, 600])
def test_values(device, dtype, name, hidden, rows):
    for weight_dtype in {dtype, torch.float32, *(DTYPES if dtype == torch.float32 else ())}:
        x, weight, other, dy = tensors(rows, hidden, dtype=dtype, device=device)
        weight = weight.to(weight_dtype)
        got = gradients(name, dy, x, weight, other)
        if name == "add_rms_norm":
            assert_same_bits(got[0], got.pop())  # the residual stream's is x's
            x = x + other
        exact_inputs = leaves(x.double(), weight.double(), other.double())
        wanted = exact_inputs[: len(got)]
        want, terms = (
            torch.autograd.grad(exact(name, *exact_inputs, constant), wanted, dy.double()) for constant in (False, True)
        )
        for g, w, term, t in zip(got, want, terms, (x, weight, other), strict=False):
            assert g.dtype == t.dtype and g.shape == t.shape
            assert_close(g, w, term, hidden, rows if g.dim() == 1 else 1)


INCOMING: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded from one number": lambda dy: dy[0, 0, 0].expand(dy.shape),
    "expanded from a row": lambda dy: dy[0, 0].expand(dy.shape),
    "expanded from rows": lambda dy: dy[:, :1].expand(dy.shape),
    "rows transposed": lambda dy: dy.transpose(0, 1).contiguous().transpose(0, 1),
    "last stride not 1": lambda dy: dy.movedim(-1, 0).contiguous().movedim(0, -1),
    "every other element": lambda dy: dy.repeat_interleave(2, -1)[..., ::2],
    "padded rows": lambda dy: torch.nn.functional.pad(dy, (3, 2))[..., 3:-2],
}


@every_norm
@pytest.mark.parametrize("strided", INCOMING)
def test_incoming_gradients_of_any_strides_are_read_and_not_written(device, dtype, name, strided):
    x, weight, other, dy = tensors(5, 6, 72, dtype=dtype, device=device)
    incoming = INCOMING[strided](dy)
    kept = incoming.clone()
    got = gradients(name, incoming, x, weight, other)
    assert_same_bits(incoming, kept)
    for g, w in zip(got, gradients(name, kept.contiguous(), x, weight, other), strict=True):
        assert_same_bits(g, w)


def test_one_of_two_results_is_used(device, dtype):
    """The gradient of the other is zero, as if it were given."""
    x, weight, residual, dy = tensors(7, 96, dtype=dtype, device=device)
    for index in range(2):
        inputs = leaves(x, weight, residual)
        results = gemma_norm.add_rms_norm(inputs[0], inputs[2], inputs[1])
        got = torch.autograd.grad(results[index], inputs, dy, retain_graph=True)
        both = [dy, torch.zeros_like(dy)] if index == 0 else [torch.zeros_like(dy), dy]
        for g, w in zip(got, torch.autograd.grad(results, inputs, both), strict=True):
            torch.testing.assert_close(g, w, rtol=0, atol=0)  # -0 and 0 are equal
        if index == 1:
            assert_same_bits(got[0], dy)


@every_norm
@pytest.mark.parametrize("frozen", [0, 1, 2], ids=["x", "weight", "other"])
def test_what_is_frozen_has_no_gradient_and_changes_no_other(device, dtype, name, frozen):
    x, weight, other, dy = tensors(70, 96, dtype=dtype, device=device)
    all_of_them = dict(zip(used(name), gradients(name, dy, x, weight, other), strict=True))
    inputs = leaves(x, weight, other)
    inputs[frozen].requires_grad_(False)
    wanted = [i for i in used(name) if i != frozen]
    got = torch.autograd.grad(NORMS[name](*inputs), [inputs[i] for i in wanted], dy)
    for i, g in zip(wanted, got, strict=True):
        assert_same_bits(g, all_of_them[i])
    assert inputs[frozen].grad is None


@every_norm
def test_a_weight_of_two_norms_has_the_sum_of_both_gradients(device, name):
    x, weight, other, dy = tensors(20, 96, device=device)
    y, shared, z = leaves(x, weight, other)
    (got,) = torch.autograd.grad([NORMS[name](y, shared, z), NORMS[name](2 * y, shared, z)], shared, [dy, dy])
    first, second = (gradients(name, dy, t, weight, other)[1] for t in (x, 2 * x))
    assert_same_bits(got, first + second)


@every_norm
def test_every_repetition_has_the_same_bits(device, dtype, name, restore_threads):
    """With any number of threads, too."""
    given = tensors(3000, 160, dtype=dtype, device=device)
    want = gradients(name, given[3], *given[:3])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for g, w in zip(gradients(name, given[3], *given[:3]), want, strict=True):
            assert_same_bits(g, w)


@every_norm
def test_no_rows(device, dtype, name):
    x, weight, other, dy = tensors(0, 48, dtype=dtype, device=device)
    got = gradients(name, dy, x, weight, other)
    assert [g.shape for g in got] == [(x, weight, other)[i].shape for i in used(name)]
    assert bool((got[1] == 0).all())


# --- The operators themselves


def good(op: str, device: str = "cpu") -> dict[str, Any]:
    x, weight, gate, dout = tensors(4, 6, 16, device=device)
    return {"dout": dout, "x": x} | ({"gate": gate} if op.startswith("gated") else {}) | {"weight": weight}


BACKWARD = ("rms_norm_backward", "rms_norm_backward_input", "gated_rms_norm_backward", "gated_rms_norm_backward_input")
every_operator = pytest.mark.parametrize("op", BACKWARD)


@every_operator
def test_opcheck(device, op):
    arguments = good(op, device)
    options: list[dict[str, Any]] = [{}, {"eps": 1e-3}]
    if op.startswith("gated"):
        options += [{"sigmoid": True}, {"norm_before_gate": False, "group_size": 8}]
    else:
        options += [{"gemma": True, "dsum": arguments["x"].clone()}]
    for more in options:
        torch.library.opcheck(getattr(OPS, op).default, tuple(arguments.values()), more)


def bad() -> dict[str, tuple[str, Any, str]]:
    """The argument, what it is instead, and what is said of it."""
    like_x = "must have x's shape [4, 6, 16], got"
    cases: dict[str, tuple[str, Any, str]] = {
        "x: dtype": ("x", torch.ones(4, 6, 16).double(), "must have dtype float32, float16 or bfloat16, got float64"),
        "weight: shape": ("weight", torch.ones(15), "must have shape [16], got [15]"),
        "weight: strided": ("weight", torch.ones(32)[::2], "must be contiguous (stride 1), got stride 2"),
        "eps": ("eps", -1e-6, "must be finite in float32 and at least 0, got -1e-06"),
        "dout: None": ("dout", None, "must be a tensor, got None"),
        "dout: dtype": ("dout", torch.ones(4, 6, 16).double(), ""),  # what may come differs
        "group_size": ("group_size", 5, "must divide x's last dimension 16, got 5"),
        "gate: dtype": ("gate", torch.ones(4, 6, 16).half(), "must have x's dtype float32, got float16"),
    }
    for name in ("dout", "gate", "dsum"):
        cases[f"{name}: shape"] = (name, torch.ones(4, 5, 16), f"{like_x} [4, 5, 16]")
        strided = torch.ones(16, 4, 6).movedim(0, -1)
        cases[f"{name}: strided"] = (name, strided, "must have a contiguous last dimension (stride 1), got stride 24")
    return cases


def takes(op: str, argument: str) -> bool:
    return argument in {a.name for a in getattr(OPS, op).default._schema.arguments}


def refusal(kernel: Callable[..., Any], arguments: dict[str, Any]) -> str:
    with pytest.raises(RuntimeError) as caught, warnings_are("ignore"):
        kernel(**arguments)
    return str(caught.value).partition("\n")[0]


def on(device: str, value: Tensor) -> Tensor:
    """The tensor on the device, with its strides: Tensor.to() would make a tensor with gaps dense."""
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(value)


@pytest.mark.parametrize(("op", "case"), [(op, case) for op in BACKWARD for case in bad() if takes(op, bad()[case][0])])
def test_a_bad_argument_is_named_alike_by_every_implementation(device, op, case):
    name, value, says = bad()[case]
    value = on(device, value) if isinstance(value, Tensor) else value
    arguments = good(op, device) | {name: value}
    native = refusal(getattr(OPS, op).default, arguments)
    assert native.startswith(f"{op}: {name} {says}")
    assert says == "" or native == f"{op}: {name} {says}"
    assert refusal(_registry.OPERATORS[op].plain, arguments) == native
    on_meta = {k: t.to("meta") if isinstance(t, Tensor) else t for k, t in arguments.items()}
    if isinstance(value, Tensor):
        on_meta[name] = on("meta", value)
    assert refusal(getattr(OPS, op).default, on_meta) == native


@every_operator
def test_a_tensor_on_another_device_than_x_is_named(op):
    for name in good(op):
        if name == "x":
            continue
        arguments = good(op)
        arguments[name] = arguments[name].to("meta")
        assert refusal(getattr(OPS, op).default, arguments) == f"{op}: {name} must be on x's device cpu, got meta"


@every_operator
@pytest.mark.parametrize("where", ["native", "plain"])
def test_gradients_of_gradients_are_not_lost_in_silence(device, op, where):
    kernel = getattr(OPS, op).default if where == "native" else _registry.OPERATORS[op].plain
    for name in good(op):
        arguments = good(op, device)
        arguments[name].requires_grad_()
        got = refusal(kernel, arguments)
        assert got.startswith(f"{op}: {name} must not require grad while grad mode is enabled")
        with torch.no_grad(), warnings_are("ignore"):
            kernel(**arguments)
