"""All that is tested of rms_norm_add_rms_norm and its fused form: values, gradients, transforms, memory. Only what is
tested of every operator alike is elsewhere (operators.py).

The operator is rms_norm, an addition and rms_norm. So it must have their bits, and those are tested elsewhere.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gemma_norm
from gemma_norm import reference
from support import DTYPES, LAYOUTS, assert_right, assert_same_bits, make_weight, place, randn

OPS = torch.ops.gemma_norm
OP = OPS.rms_norm_add_rms_norm.default
FUNCTIONS = {"function": gemma_norm.rms_norm_add_rms_norm, "torch.ops": OP}
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "gemma": {"gemma": True},
    "each step rounded": {"round_each_step": True},
    "large eps": {"eps": 0.5},
}


@pytest.fixture(params=MODES.values(), ids=MODES)
def mode(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


def tensors(
    *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", gemma: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x is small beside the residual, as what a block gives is, and grows from row to row."""
    x, residual = (randn(*shape, dtype=dtype, device=device, seed=seed) for seed in range(2))
    post_weight = randn(shape[-1], device=device, seed=2) * (0.05 if gemma else 1)
    return x / 4, residual, post_weight.to(dtype), make_weight(shape[-1], dtype, device, gemma)


def unfused(x: Tensor, residual: Tensor, post_weight: Tensor, weight: Tensor, **mode: Any) -> tuple[Tensor, Tensor]:
    s = residual + gemma_norm.rms_norm(x, post_weight, **mode)
    return gemma_norm.rms_norm(s, weight, **mode), s


def oracle(
    x: Tensor, residual: Tensor, post_weight: Tensor, weight: Tensor, eps: float = 1e-6, gemma: bool = False
) -> tuple[Tensor, Tensor]:
    """The definition in float64, without any rounding."""
    s = residual.double() + reference.oracle(x, post_weight, eps, gemma)
    return reference.oracle(s, weight, eps, gemma), s


# 1, 2 and 7 rows, and many; rows shorter than a vector, those of the models, and some that no vector divides.
SHAPES = [(1, 1), (7, 7), (2, 64), (1, 256), (2, 1000), (3, 1152), (5, 2560), (1, 5376), (70, 640), (2, 3, 4, 129)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 8200), (2, 16384), (2, 36001), (1, 140000)], ids=str)
def test_fused_equals_unfused(device, mode, dtype, shape):
    x, residual, post_weight, weight = tensors(*shape, dtype=dtype, device=device, gemma="gemma" in mode)
    weights = [(post_weight, weight)]
    if "round_each_step" not in mode:
        weights += [(post_weight.to(t), weight.to(t)) for t in (DTYPES if dtype == torch.float32 else DTYPES[:1])]
    for pair in weights:
        want_y, want_s = unfused(x, residual, *pair, **mode)
        y, s = gemma_norm.rms_norm_add_rms_norm(x, residual, *pair, **mode)
        assert_same_bits(y, want_y)
        assert_same_bits(s, want_s)
        in_place, in_place_residual = x.clone(), residual.clone()
        assert gemma_norm.fused_rms_norm_add_rms_norm(in_place, in_place_residual, *pair, **mode) is None
        assert_same_bits(in_place, want_y)
        assert_same_bits(in_place_residual, want_s)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gemma", [False, True], ids=["plain", "gemma"])
@pytest.mark.parametrize("hidden", [1152, 2560, 5376])
def test_values_against_the_oracle(device, dtype, gemma, hidden):
    """The norm of x and the norm of the sum are each within the contract's bound, and the sum is rounded once."""
    x, residual, post_weight, weight = tensors(65, hidden, dtype=dtype, device=device, gemma=gemma)
    y, s = gemma_norm.rms_norm_add_rms_norm(x, residual, post_weight, weight, gemma=gemma)
    assert_right(y, s, weight, gemma=gemma)
    exact = oracle(x, residual, post_weight, weight, gemma=gemma)[1]
    n = reference.oracle(x, post_weight, gemma=gemma).abs()
    units = 0.5 * exact.abs() + (0.5 + reference.max_ulp_error(dtype, hidden)) * n  # of the sum, and of n
    assert bool(((s.double() - exact).abs() <= torch.finfo(dtype).eps * (units + exact.abs() / 2)).all())


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_the_norm_of_x_is_rounded_before_the_addition(device, dtype):
    x, residual, post_weight, weight = tensors(65, 2560, dtype=dtype, device=device)
    _, s = gemma_norm.rms_norm_add_rms_norm(x, residual, post_weight, weight)
    once = residual.float() + reference.rms_norm(x.float(), post_weight.float())
    differs = (s != once.to(dtype)).float().mean().item()
    assert differs > (0.001 if dtype == torch.float32 else 0.05), "without the first rounding, s would be this too"


def test_each_weight_has_its_own_norm(device):
    x, residual, post_weight, weight = tensors(9, 512, device=device)
    y, s = gemma_norm.rms_norm_add_rms_norm(x, residual, torch.zeros_like(post_weight), weight)
    assert_same_bits(s, residual)
    assert_same_bits(y, gemma_norm.rms_norm(residual, weight))
    y, s = gemma_norm.rms_norm_add_rms_norm(x, residual, post_weight, torch.zeros_like(weight))
    assert bool((y == 0).all())
    assert_same_bits(s, unfused(x, residual, post_weight, weight)[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", ["contiguous", "offset 1", "heads before tokens"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(device, mode, layout, other, dtype):
    x, residual, *weights = tensors(5, 3, 48, dtype=dtype, device=device, gemma="gemma" in mode)
    placed_x, placed_residual = place(x, layout), place(residual, other)
    want = gemma_norm.rms_norm_add_rms_norm(x, residual, *weights, **mode)
    got = gemma_norm.rms_norm_add_rms_norm(placed_x.view, placed_residual.view, *weights, **mode)
    gemma_norm.fused_rms_norm_add_rms_norm(placed_x.view, placed_residual.view, *weights, **mode)
    for w, g, p in zip(want, got, (placed_x, placed_residual), strict=True):
        assert g.is_contiguous()
        assert_same_bits(g, w)
        assert_same_bits(p.view.contiguous(), w)
        p.assert_gaps_intact()


def test_inputs_of_the_functional_form_may_be_one_tensor(device):
    x, _, weight, _ = tensors(7, 240, device=device)
    want = unfused(x, x.clone(), weight, weight.clone())
    for got, w in zip(gemma_norm.rms_norm_add_rms_norm(x, x, weight, weight), want, strict=True):
        assert_same_bits(got, w)


@pytest.mark.parametrize("rows", [2, 5, 33])
@pytest.mark.parametrize("hidden", [100, 1000, 2560])
def test_a_row_is_what_it_is_alone(device, dtype, rows, hidden):
    x, residual, *weights = tensors(rows, hidden, dtype=dtype, device=device)
    all_rows = gemma_norm.rms_norm_add_rms_norm(x, residual, *weights)
    for row in range(rows):
        one = gemma_norm.rms_norm_add_rms_norm(x[row : row + 1], residual[row : row + 1], *weights)
        for a, o in zip(all_rows, one, strict=True):
            assert_same_bits(a[row : row + 1], o)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), 1e30, 1e-30, 0.0, -0.0])
@pytest.mark.parametrize("where", [0, 1, 2, 3], ids=["x", "residual", "post_weight", "weight"])
@pytest.mark.parametrize("hidden", [33, 96])
def test_special_values(device, special, where, hidden):
    """eps is 0: the rstd of a row of zeros is then infinite."""
    arguments = [t.clone() for t in tensors(3, hidden, device=device)]
    arguments[where][..., 5] = special
    arguments[0][1] = arguments[0][2] = 0
    arguments[0][2, 3] = 1e-30
    got = gemma_norm.rms_norm_add_rms_norm(*arguments, eps=0.0)
    for g, want in zip(got, unfused(*arguments, eps=0.0), strict=True):
        torch.testing.assert_close(g, want, rtol=0, atol=0, equal_nan=True)


def test_no_rows(device, mode):
    x, residual = (torch.empty(0, 3, 48, device=device, requires_grad=True) for _ in range(2))
    weights = [torch.ones(48, device=device, requires_grad=True) for _ in range(2)]
    for function in (*FUNCTIONS.values(), reference.rms_norm_add_rms_norm):
        y, s = function(x, residual, *weights, **mode)
        assert y.shape == s.shape == x.shape
        gradients = torch.autograd.grad(y.sum() + s.sum(), (x, residual, *weights))
        assert [g.shape for g in gradients] == [x.shape, x.shape, (48,), (48,)]
        assert all(bool((g == 0).all()) for g in gradients)


@pytest.mark.parametrize("through", FUNCTIONS)
@pytest.mark.parametrize("used", ["y", "s", "both"])
@pytest.mark.parametrize("gemma", [False, True], ids=["plain", "gemma"])
def test_first_and_second_derivatives(device, through, used, gemma):
    """They agree with those of the formula in float64."""

    def loss(results: tuple[Tensor, Tensor]) -> Tensor:
        y, s = results
        return {"y": lambda: y.sin(), "s": lambda: s.cos(), "both": lambda: y.sin() * s.cos()}[used]().sum()

    inputs = [t.requires_grad_() for t in tensors(6, 48, device=device, gemma=gemma)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    found = []
    for function, leaves in ((FUNCTIONS[through], inputs), (oracle, exact)):
        wanted = leaves[:3] if used == "s" else leaves
        first = torch.autograd.grad(loss(function(*leaves, gemma=gemma)), wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.cos().sum() for g in first), wanted)
        found.append([*first, *second])
        native = torch.autograd.grad(loss(function(*leaves, gemma=gemma)), wanted)
        found.append([*native, *second])
    for ours, native, want, _ in zip(*found, strict=True):
        for got in (ours, native):
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("wanted", range(4), ids=["x", "residual", "post_weight", "weight"])
@pytest.mark.parametrize("used", [0, 1], ids=["y", "s"])
def test_the_gradient_of_one_argument_alone(device, wanted, used):
    inputs = tensors(6, 96, device=device)
    leaf = inputs[wanted].clone().requires_grad_()
    result = gemma_norm.rms_norm_add_rms_norm(*inputs[:wanted], leaf, *inputs[wanted + 1 :])[used]
    if used == 1 and wanted == 3:  # s does not depend on the weight
        (got,) = torch.autograd.grad(result.sum(), leaf, allow_unused=True)
        assert got is None or bool((got == 0).all())
        return
    exact = [t.double() for t in inputs]
    exact[wanted].requires_grad_()
    (want,) = torch.autograd.grad(oracle(*exact)[used].sin().sum(), exact[wanted])
    (got,) = torch.autograd.grad(result.sin().sum(), leaf)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_in_bfloat16(device, weight_dtype):
    """Each is within a few units of its largest element, beside the formula in float64."""
    x, residual, *weights = tensors(40, 256, dtype=torch.bfloat16, device=device)
    inputs = [t.clone().requires_grad_() for t in (x, residual, *(w.to(weight_dtype) for w in weights))]
    y, s = gemma_norm.rms_norm_add_rms_norm(*inputs)
    dy, ds = (randn(40, 256, dtype=torch.bfloat16, device=device, seed=seed) for seed in (7, 8))
    got = torch.autograd.grad((y, s), inputs, (dy, ds))
    exact = [t.detach().double().requires_grad_() for t in inputs]
    want = torch.autograd.grad(oracle(*exact), exact, (dy.double(), ds.double()))
    for g, w, t in zip(got, want, inputs, strict=True):
        assert g.dtype == t.dtype
        assert float((g.double() - w).abs().max() / w.abs().max()) < 4 * torch.finfo(torch.bfloat16).eps


def test_gradients_are_those_of_the_three_steps(device):
    """The same operators in the same order, hence the same bits."""
    arguments = tensors(9, 1152, dtype=torch.bfloat16, device=device, gemma=True)
    found = []
    for function in (gemma_norm.rms_norm_add_rms_norm, gemma_norm_steps):
        leaves = [t.clone().requires_grad_() for t in arguments]
        y, s = function(*leaves, gemma=True)
        found.append(torch.autograd.grad((y, s), leaves, (torch.ones_like(y), arguments[1])))
    for got, want in zip(*found, strict=True):
        assert_same_bits(got, want)


def gemma_norm_steps(
    x: Tensor, residual: Tensor, post_weight: Tensor, weight: Tensor, **mode: Any
) -> tuple[Tensor, Tensor]:
    return gemma_norm.add_rms_norm(gemma_norm.rms_norm(x, post_weight, **mode), residual, weight, **mode)


def test_torch_func(device, mode):
    x, residual, *weights = tensors(6, 48, device=device, gemma="gemma" in mode)

    def loss(function: Any) -> Any:
        def of(x: Tensor, residual: Tensor) -> Tensor:
            y, s = function(x, residual, *weights, **mode)
            return (y * s.sin()).sum()

        return of

    for transform in (
        lambda f: torch.func.grad(f, argnums=(0, 1))(x, residual),
        lambda f: torch.func.jvp(f, (x, residual), (residual, x)),
        lambda f: torch.func.vmap(torch.func.grad(f))(x, residual),
    ):
        want = transform(loss(reference.rms_norm_add_rms_norm))
        for function in FUNCTIONS.values():
            torch.testing.assert_close(transform(loss(function)), want)


def test_opcheck(device, mode):
    names, defaults = ("eps", "gemma", "round_each_step"), (1e-6, False, False)
    options = [mode.get(name, default) for name, default in zip(names, defaults, strict=True)]
    arguments = tensors(4, 48, device=device)
    torch.library.opcheck(OP, (*arguments, *options))
    torch.library.opcheck(OP, (*(t.clone().requires_grad_() for t in arguments), *options))
    torch.library.opcheck(OPS.fused_rms_norm_add_rms_norm.default, (*(t.clone() for t in arguments), *options))


def test_torch_compile(device):
    x, residual, *weights = (t.requires_grad_() for t in tensors(5, 96, device=device))

    def step(x: Tensor, residual: Tensor, post_weight: Tensor, weight: Tensor) -> Tensor:
        y, s = gemma_norm.rms_norm_add_rms_norm(x * 2, residual, post_weight, weight, gemma=True)
        y, s = y.sin(), s + 1
        with torch.no_grad():
            z, r = y.clone(), s.clone()
            gemma_norm.fused_rms_norm_add_rms_norm(z, r, post_weight, weight)
        return y * z + s * r

    leaves = (x, residual, *weights)
    want = torch.autograd.grad(step(*leaves).sum(), leaves)
    got = torch.autograd.grad(torch.compile(step, fullgraph=True)(*leaves).sum(), leaves)
    torch.testing.assert_close(got, want)


def test_meta_tensors_have_the_shape_and_dtype_of_x():
    x, residual, *weights = (t.to("meta") for t in tensors(4, 48, dtype=torch.float16))
    for result in gemma_norm.rms_norm_add_rms_norm(x, residual, *weights):
        assert (result.shape, result.dtype, result.device.type) == (x.shape, x.dtype, "meta")


def test_writing_is_told_to_autograd_and_keeps_its_place_in_a_graph(device):
    x, residual, *weights = tensors(4, 48, device=device)
    versions = x._version, residual._version
    gemma_norm.fused_rms_norm_add_rms_norm(x, residual, *weights)
    assert (x._version, residual._version) == (versions[0] + 1, versions[1] + 1)

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, residual: Tensor, post_weight: Tensor, weight: Tensor) -> Tensor:
            gemma_norm.fused_rms_norm_add_rms_norm(x, residual, post_weight, weight)
            return x

    traced = torch.fx.symbolic_trace(Layer())
    traced.graph.eliminate_dead_code()
    arguments = tensors(4, 48, device=device)
    want = unfused(*arguments)[0]
    assert_same_bits(traced(*(t.clone() for t in arguments)), want)
