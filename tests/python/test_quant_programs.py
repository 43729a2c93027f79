"""What programs do with the operators that quantise: torch.compile, export, torch.func, meta tensors, autograd."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext as nothing
from typing import Any

import pytest
import torch
from torch import Tensor

import gemma_norm
from gemma_norm import _registry
from quant_support import FLOAT4, OVERLOADS, arguments, function_of, on_device, operands
from support import bits, place, randn

OPS = torch.ops.gemma_norm
PLACED = ("x", "residual", "gate")


@pytest.fixture(params=OVERLOADS.values(), ids=OVERLOADS)
def overload(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


def as_bytes(results: Any) -> list[Tensor]:
    results = results if isinstance(results, tuple) else (results,)
    return [t.contiguous().view(torch.uint8) for t in results]


def test_opcheck(device, overload):
    given = operands(*overload, device)
    positional = [given.pop(n) for n in ("x", "residual", "gate", "weight", "scale") if n in given]
    torch.library.opcheck(getattr(getattr(OPS, overload[0]), overload[1]), tuple(positional), given)


def test_torch_compile(device, overload):
    def run(given: dict[str, Any]) -> Any:
        return function_of(overload[0])(**given)

    torch._dynamo.reset()  # each overload is a closure of its own, and Dynamo counts them as one
    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for rows in (4, 7):
        want, got = arguments(*overload, device, rows), arguments(*overload, device, rows)
        for a, b in zip(as_bytes(run(want)), as_bytes(compiled(got)), strict=True):
            assert torch.equal(a, b)
        for n, t in want.items():
            assert not isinstance(t, Tensor) or torch.equal(t, got[n])


def test_inductor_with_scales_that_are_exponents(device):
    """It fails at an operator that writes to an argument and has a result of their dtype."""
    w = randn(64, device=device)

    def run(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        how = {"scale_group_size": 32, "scale_dtype": torch.float8_e8m0fnu}
        return gemma_norm.fused_add_rms_norm_quant(x, residual, w, **how)

    x, residual, other = (randn(4, 64, device=device, seed=seed) for seed in (1, 2, 2))
    torch._dynamo.reset()
    for a, b in zip(as_bytes(torch.compile(run, fullgraph=True)(x, residual)), as_bytes(run(x, other)), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(residual, other)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_sizes_from_shapes_under_a_tracer(device):
    """torch.jit.trace makes tensors of them."""
    x, w = randn(4, 64, device=device), randn(64, device=device)

    def run(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = gemma_norm.gated_rms_norm(x, x, w, group_size=x.shape[-1] // 2)
        return y, *gemma_norm.rms_norm_quant(x, w, dtype=torch.int8, scale_group_size=x.shape[-1] // 4)

    with torch.no_grad():
        traced = torch.jit.trace(run, (x, w))
        assert all(map(torch.equal, traced(x, w), run(x, w)))


def test_plain_pytorch(device, overload):
    """The implementation for devices without a native one. Its y may be off by a bit, and so may q."""
    op = overload[0] if overload[1] == "default" else ".".join(overload)
    native, plain = operands(*overload, device), operands(*overload, device)
    for given in (native, plain):  # the results are row-major all the same
        given.update(
            {n: place(given[n].unflatten(0, (2, 2)), "heads before tokens").view for n in PLACED if n in given}
        )
    want = getattr(getattr(OPS, overload[0]), overload[1])(**native)
    with pytest.warns(UserWarning) if device not in _registry._warned else nothing():
        got = _registry.OPERATORS[op].plain(**plain)
    want, got = (r if isinstance(r, tuple) else (r,) for r in (want, got))
    for a, b in zip(want, got, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        torch.testing.assert_close(a.float(), b.float(), rtol=2**-2 if a.dtype.itemsize == 1 else 1e-6, atol=1e-6)
    if "residual" in native:
        assert torch.equal(native["residual"], plain["residual"])


def test_meta_tensors(overload):
    given = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments(*overload, "cpu").items()}
    real = function_of(overload[0])(**arguments(*overload, "cpu"))
    for a, b in zip(function_of(overload[0])(**given), real, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())


@pytest.mark.parametrize("scheme", FLOAT4.values(), ids=FLOAT4)
def test_float4_in_programs(device, scheme):
    """Operator, fake implementation and compiled program agree on values, shapes and strides."""
    scheme = {"dtype": torch.float4_e2m1fn_x2, **on_device(scheme, device)}
    x, weight = randn(2, 3, 768, device=device), randn(768, device=device)
    torch.library.opcheck(OPS.rms_norm_quant_y.default, (x, weight), scheme)
    want = gemma_norm.rms_norm_quant(x, weight, **scheme)
    compiled = torch.compile(lambda x: gemma_norm.rms_norm_quant(x, weight, **scheme), fullgraph=True)
    for a, b in zip(compiled(x), want, strict=True):
        assert a.shape == b.shape
        assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("scale_dtype", [None, torch.int32])
def test_the_number_of_tokens_stays_symbolic(scale_dtype):
    class Quantise(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return gemma_norm.rms_norm_quant(
                x, scale_group_size=16, scale_dtype=scale_dtype, column_major_scale=True, return_y=True
            )

    dynamic = {"x": {0: torch.export.Dim("tokens", min=2)}}
    program = torch.export.export(Quantise(), (torch.randn(5, 64),), dynamic_shapes=dynamic).module()
    x = torch.randn(9, 64)
    for a, b in zip(program(x), Quantise()(x), strict=True):
        assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("name", ["rms_norm_quant", "add_rms_norm_quant", "gated_rms_norm_quant"])
@pytest.mark.parametrize("given", [None, 0.02])
@pytest.mark.parametrize("return_y", [False, True])
def test_torchscript_traces_it(name, given, return_y):
    more = {
        "rms_norm_quant": [],
        "add_rms_norm_quant": [torch.randn(3, 64)],
        "gated_rms_norm_quant": [torch.randn(3, 64)],
    }
    scale, weight = None if given is None else torch.tensor(given), torch.randn(64)

    def run(x: Tensor) -> list[Tensor]:
        results = getattr(gemma_norm, name)(x, *more[name], weight, scale, dtype=torch.int8, return_y=return_y)
        return [t for t in results if t is not scale]

    x = torch.randn(3, 64)
    for a, b in zip(torch.jit.trace(run, x, check_trace=False)(x), run(x), strict=True):
        assert torch.equal(a, b)


def test_vmap(device):
    x, weight = randn(3, 5, 64, device=device), randn(64, device=device)
    q, scale = torch.func.vmap(lambda x: gemma_norm.rms_norm_quant(x, weight, dtype=torch.int8))(x)
    want, want_scale = gemma_norm.rms_norm_quant(x, weight, dtype=torch.int8)
    assert (q.float() - want.float()).abs().max() <= 1
    torch.testing.assert_close(scale, want_scale)


@pytest.mark.parametrize("scheme", FLOAT4.values(), ids=FLOAT4)
def test_float4_in_vmap(device, scheme):
    try:
        torch.func.vmap(lambda t: t.view(torch.int8))(torch.zeros(2, 3, dtype=torch.uint8))
    except RuntimeError as error:
        pytest.skip(f"vmap of this PyTorch has no Tensor.view(dtype): pip install torch==2.13.0 ({error})")
    scheme = {"dtype": torch.float4_e2m1fn_x2, **on_device(scheme, device)}
    x, weight = randn(2, 3, 768, device=device), randn(768, device=device)
    mapped = torch.func.vmap(lambda x: gemma_norm.rms_norm_quant(x, weight, **scheme))(x)
    for a, b in zip(mapped, gemma_norm.rms_norm_quant(x, weight, **scheme), strict=True):
        assert a.shape == b.shape
        assert (bits(a) != bits(b)).sum() <= 0.01 * x.numel()  # the definition's y may be off by a bit


def test_derivatives_are_refused(device, overload):
    given = arguments(*overload, device)
    function: Callable[..., Any] = function_of(overload[0])
    weight = given["weight"]
    with pytest.raises(RuntimeError, match="weight must not require grad while grad mode is enabled"):
        function(**{**given, "weight": weight.clone().requires_grad_()})
    with torch.no_grad():
        function(**{**given, "weight": weight.clone().requires_grad_()})
    if "fused" not in overload[0]:
        with pytest.raises(RuntimeError, match="a quantised result has no derivative"):
            torch.func.grad(lambda w: function(**{**given, "weight": w})[0].float().sum())(weight)


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.functionalize])
@pytest.mark.parametrize("format", [torch.int8, torch.float8_e4m3fn])
def test_no_derivative_is_dropped_inside_a_transform(device, transform, format):
    """Autograd sees through vmap, and would record the casts of the definition."""
    x = randn(4, 64, device=device).requires_grad_()
    with pytest.raises(RuntimeError, match="x must not require grad while grad mode is enabled"):
        transform(lambda x: gemma_norm.rms_norm_quant(x, dtype=format))(x)
    with torch.no_grad():
        assert transform(lambda x: gemma_norm.rms_norm_quant(x, dtype=format))(x)[0].shape == (4, 64)
