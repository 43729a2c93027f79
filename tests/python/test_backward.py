"""Gradients of the norms agree with float64's for every dtype, layout and set of wanted gradients, and the backward
operators check their arguments as the others do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, ones

import gemma_norm
from gemma_norm import _registry
from support import LAYOUTS, Placed, assert_same_bits, make_weight, place, randn, warnings_are

OPS = torch.ops.gemma_norm
EPS = 1e-6
UNIT = torch.finfo(torch.float32).eps

# Every pair of dtypes of x and dout, with every dtype of a weight that it may have.
PAIRS = [
    *((dtype, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
]
DTYPES = [
    (x, dout, weight)
    for x, dout in PAIRS
    for weight in ((None, x, torch.float32) if x.itemsize == 2 else (None, x, torch.float16, torch.bfloat16))
]


def exact(dout: Tensor, x: Tensor, weight: Tensor | None, dsum: Tensor | None, gemma: bool) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight by autograd in float64."""
    s = x.double().requires_grad_()
    factor = ones(x.shape[-1], dtype=torch.float64, device=x.device) if weight is None else weight.double()
    factor.requires_grad_()
    y = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + EPS) * (1 + factor if gemma else factor)
    dx, dweight = torch.autograd.grad(y, (s, factor), dout.double())
    return dx if dsum is None else dx + dsum.double(), dweight


def assert_near(got: Tensor, want: Tensor, arithmetic: Tensor) -> None:
    """``got`` is ``want`` but for its own rounding and for errors of float32's arithmetic of that size."""
    half_ulp = torch.finfo(got.dtype).eps / 2 * want.abs() + torch.finfo(got.dtype).smallest_normal
    error = (got.double() - want).abs() - half_ulp - arithmetic
    assert got.shape == want.shape and float(error.max()) <= 0, f"off by {float(error.max()):g} more than allowed"


def assert_right(
    dout: Tensor, x: Tensor, weight: Tensor | None, dsum: Tensor | None, gemma: bool, dx: Tensor, dweight: Tensor | None
) -> None:
    want_dx, want_dweight = exact(dout, x, weight, dsum, gemma)
    n = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS)
    rstd = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS)
    factor = 1 if weight is None else (1 + weight.double() if gemma else weight.double())
    g = (dout.double() * factor).abs()
    # A sum of k terms with errors in random directions is off by about sqrt(k) units of the terms.
    terms = rstd * (g + n.abs() * (g * n.abs()).mean(-1, keepdim=True)) + (0 if dsum is None else dsum.double().abs())
    assert dx.dtype == x.dtype and dx.is_contiguous()
    assert_near(dx, want_dx, terms * UNIT * (8 + x.shape[-1] ** 0.5 / 4))
    if dweight is not None:
        assert weight is not None and dweight.dtype == weight.dtype
        rows = list(range(x.dim() - 1))
        size = (dout.double() * n).abs()
        count = x.numel() // x.shape[-1]
        assert_near(dweight, want_dweight, (size.sum(rows) if rows else size) * UNIT * (8 + count**0.5))


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d))
def test_the_operators(device, dtypes):
    x_dtype, dout_dtype, weight_dtype = dtypes
    for seed, shape in enumerate([(1,), (5, 1), (3, 31), (9, 64), (2, 3, 100), (1, 4097), (70, 256), (2, 20000)]):
        x, dsum = (randn(*shape, dtype=x_dtype, device=device, seed=seed + k) for k in (0, 30))
        dout = randn(*shape, dtype=dout_dtype, device=device, seed=seed + 60)
        for gemma in (False, True)[: 1 if weight_dtype is None else 2]:
            weight = None if weight_dtype is None else make_weight(shape[-1], weight_dtype, device, gemma)
            for add in (None, dsum):
                dx = OPS.rms_norm_backward_input(dout, x, weight, add, EPS, gemma)
                dweight = None
                if weight is not None:
                    both, dweight = OPS.rms_norm_backward(dout, x, weight, add, EPS, gemma)
                    assert_same_bits(both, dx)
                assert_right(dout, x, weight, add, gemma, dx, dweight)


def layouts_of_gradients() -> dict[str, Callable[[Tensor], Tensor]]:
    """Each gives some of the values of a tensor [6, 10, 96] in a layout that gradients of real programs have."""
    return {
        "of a sum": lambda t: t[:1, :1, :1].expand_as(t),
        "of a sum over rows": lambda t: t[:1, :1].expand_as(t),
        "of a sum over hidden": lambda t: t[..., :1].expand_as(t),
        "of a transposed use": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        "of a use with hidden first": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1),
        "every second element": lambda t: t.repeat_interleave(2, -1)[..., ::2],
        "every second row": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    }


@pytest.mark.parametrize("layout", layouts_of_gradients())
def test_layouts_of_gradients(device, dtype, layout):
    x, dsum = (randn(6, 10, 96, dtype=dtype, device=device, seed=seed).requires_grad_() for seed in (0, 1))
    weight = make_weight(96, dtype, device, False).requires_grad_()
    dout = layouts_of_gradients()[layout](randn(6, 10, 96, dtype=dtype, device=device, seed=2))
    kept = dout.clone()
    got = torch.autograd.grad(gemma_norm.rms_norm(x, weight), (x, weight), dout)
    want = torch.autograd.grad(gemma_norm.rms_norm(x, weight), (x, weight), dout.contiguous())
    for gradient, same in zip(got, want, strict=True):
        assert_same_bits(gradient, same)
    y, s = gemma_norm.add_rms_norm(x, dsum, weight)
    got = torch.autograd.grad((y, s), (x, weight), (dout, dout))
    assert_right(dout, s.detach(), weight.detach(), dout, False, *got)
    assert_same_bits(dout.contiguous(), kept.contiguous())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_inputs(device, dtype, layout):
    x, dout, dsum = (place(randn(5, 4, 40, dtype=dtype, device=device, seed=seed), layout) for seed in range(3))
    weight = make_weight(40, dtype, device, True)
    got = OPS.rms_norm_backward(dout.view, x.view, weight, dsum.view, EPS, True)
    want = OPS.rms_norm_backward(*(t.view.contiguous() for t in (dout, x)), weight, dsum.view.contiguous(), EPS, True)
    assert_same_bits(got[0], want[0])  # dweight adds up the rows in the order in which they lie in memory
    assert_right(dout.view, x.view, weight, dsum.view, True, *got)
    for t in (x, dout, dsum):
        t.assert_gaps_intact()


def test_more_dimensions_than_a_launch_has(device):
    """Rows that do not collapse into two dimensions are computed slice by slice, and dweight is the sum over all."""
    shape, strides = (3, 2, 5, 4, 24), (2500, 1100, 190, 33, 1)
    x, dout = (Placed(randn(*shape, device=device, seed=seed), strides).view for seed in (0, 1))
    weight = make_weight(24, torch.float32, device, False)
    got = OPS.rms_norm_backward(dout, x, weight, None, EPS, False)
    assert_right(dout, x, weight, None, False, *got)


@pytest.mark.parametrize("used", ["y", "sum", "both"])
@pytest.mark.parametrize("frozen", ["nothing", "weight", "x", "no weight"])
def test_what_is_used_and_wanted(device, dtype, used, frozen):
    for residual_dtype in {dtype, torch.float32}:
        x = randn(7, 72, dtype=dtype, device=device)
        residual = randn(7, 72, dtype=residual_dtype, device=device, seed=1)
        weight = None if frozen == "no weight" else make_weight(72, dtype, device, True)
        wanted = [t for name, t in (("x", x), ("x", residual), ("weight", weight)) if name != frozen and t is not None]
        for t in wanted:
            t.requires_grad_()
        gemma = weight is not None
        y, s = gemma_norm.add_rms_norm(x, residual, weight, EPS, gemma)
        dy, ds = (randn(7, 72, dtype=t.dtype, device=device, seed=k) for k, t in ((2, y), (3, s)))
        outputs = [(t, d) for name, t, d in (("y", y, dy), ("sum", s, ds)) if used in (name, "both")]
        if frozen == "x" and not any(t.requires_grad for t, _ in outputs):
            continue
        outputs = [(t, d) for t, d in outputs if t.requires_grad]
        got = torch.autograd.grad([t for t, _ in outputs], wanted, [d for _, d in outputs])
        zero_y, zero_s = torch.zeros_like(dy), torch.zeros_like(ds)
        dsum = ds if used != "y" else zero_s
        dout = dy if used != "sum" else zero_y
        weight_now = None if weight is None else weight.detach()
        by_tensor = dict(zip(map(id, wanted), got, strict=True))
        if id(residual) in by_tensor:
            assert_right(dout, s.detach(), weight_now, dsum, gemma, by_tensor[id(residual)], by_tensor.get(id(weight)))
            assert_same_bits(by_tensor[id(x)], by_tensor[id(residual)].to(dtype))
        else:
            dx = OPS.rms_norm_backward_input(dout, s.detach(), weight_now, None, EPS, gemma)
            assert_right(dout, s.detach(), weight_now, None, gemma, dx, by_tensor[id(weight)])


def test_modules_that_share_a_weight(device, kind):
    first, second = kind(48).to(device), kind(48).to(device)
    second.weight = first.weight
    x = randn(5, 48, device=device).requires_grad_()
    douts = [randn(5, 48, device=device, seed=seed) for seed in (1, 2)]
    torch.autograd.backward([first(x), second(2 * x)], douts)
    gemma = kind is gemma_norm.GemmaRMSNorm
    eps = first.variance_epsilon if hasattr(first, "variance_epsilon") else EPS
    x64, weight64 = x.detach().double().requires_grad_(), first.weight.detach().double().requires_grad_()
    factor = 1 + weight64 if gemma else weight64
    outputs = [s * torch.rsqrt(s.square().mean(-1, keepdim=True) + eps) * factor for s in (x64, 2 * x64)]
    torch.autograd.backward(outputs, [d.double() for d in douts])
    torch.testing.assert_close(first.weight.grad.double(), weight64.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 4096), (16, 4096), (300, 1000), (5000, 64), (3, 70000)])
def test_bits_depend_on_no_thread(device, dtype, shape, restore_threads):
    x, dout, dsum = (randn(*shape, dtype=dtype, device=device, seed=seed) for seed in range(3))
    weight = make_weight(shape[-1], dtype, device, False)
    first: tuple[Tensor, ...] | None = None
    for threads in (1, 2, 3, 2, 1):
        torch.set_num_threads(threads)
        got = OPS.rms_norm_backward(dout, x, weight, dsum, EPS, False)
        first = first or got
        for gradient, same in zip(got, first, strict=True):
            assert_same_bits(gradient, same)


def test_values_beyond_float32(device):
    """Squares that overflow make rstd 0; a sum that overflows though its mean does not is computed anew."""
    weight = ones(64, device=device)
    huge = torch.full((2, 64), 1e25, device=device)
    dsum = randn(2, 64, device=device)
    dx, dweight = OPS.rms_norm_backward(ones(2, 64, device=device), huge, weight, dsum, EPS, False)
    assert_same_bits(dx, dsum)
    assert bool((dweight == 0).all())

    x, dout = randn(2, 64, device=device, seed=1) * 1e15, randn(2, 64, device=device, seed=2) * 1e25
    assert bool((dout * x).abs().amax() == torch.inf)
    assert_right(dout, x, weight, None, False, *OPS.rms_norm_backward(dout, x, weight, None, EPS, False))

    for bad in (torch.nan, torch.inf):
        x = randn(3, 64, device=device)
        good = OPS.rms_norm_backward_input(x, x, weight)
        x[1, 5] = bad
        dx, dweight = OPS.rms_norm_backward(x.nan_to_num(0, 0, 0), x, weight)
        assert_same_bits(dx[::2], good[::2])
        assert bool(dx[1].isnan().any()) and bool(dweight[5].isnan())


def test_no_rows(device, dtype):
    x, weight = torch.empty(4, 0, 24, dtype=dtype, device=device), ones(24, dtype=dtype, device=device)
    dx, dweight = OPS.rms_norm_backward(x, x, weight)
    assert dx.shape == x.shape and bool((dweight == 0).all()) and dweight.dtype == dtype


@pytest.mark.parametrize("with_weight", [False, True])
def test_opcheck(device, dtype, with_weight):
    dout, x, dsum = (randn(4, 6, 16, dtype=dtype, device=device, seed=seed) for seed in range(3))
    weight = make_weight(16, dtype, device, True)
    operators = [OPS.rms_norm_backward_input.default, *([OPS.rms_norm_backward.default] if with_weight else [])]
    for op in operators:
        torch.library.opcheck(op, (dout, x, weight if with_weight else None, None, EPS, with_weight))
        torch.library.opcheck(op, (dout, x, weight if with_weight else None, dsum, EPS, with_weight))


SHAPE = (4, 6, 16)
BAD: list[tuple[str, dict[str, Any]]] = [
    ("x must have dtype float32, float16 or bfloat16, got float64", {"x": ones(SHAPE).double()}),
    ("x must be a tensor, got None", {"x": None}),
    ("x must have a contiguous last dimension (stride 1), got stride 24", {"x": ones(16, 4, 6).movedim(0, -1)}),
    ("weight must have shape [16], got [15]", {"weight": ones(15)}),
    ("weight must be contiguous (stride 1), got stride 2", {"weight": ones(32)[::2]}),
    ("weight must have dtype float32, float16 or bfloat16, got float64", {"weight": ones(16).double()}),
    ("dout must be a tensor, got None", {"dout": None}),
    ("dout must have dtype float32, float16 or bfloat16, got float64", {"dout": ones(SHAPE).double()}),
    ("dout must have x's shape [4, 6, 16], got [4, 5, 16]", {"dout": ones(4, 5, 16)}),
    ("dout must have x's shape [4, 6, 16], got [24, 16]", {"dout": ones(24, 16)}),
    ("dout must have a contiguous last dimension (stride 1), got stride 24", {"dout": ones(16, 4, 6).movedim(0, -1)}),
    ("dout must have a contiguous last dimension (stride 1), got stride 0", {"dout": ones(1).expand(SHAPE)}),
    ("dout must have x's dtype float16, got float32", {"x": ones(SHAPE).half()}),
    ("dsum must have x's dtype float32, got float16", {"dsum": ones(SHAPE).half()}),
    ("dsum must have x's shape [4, 6, 16], got [16]", {"dsum": ones(16)}),
    ("dsum must have a contiguous last dimension (stride 1), got stride 2", {"dsum": ones(4, 6, 32)[..., ::2]}),
    ("eps must be finite in float32 and at least 0, got -1", {"eps": -1.0}),
]


def message(kernel: Callable[..., Any], arguments: dict[str, Any], device: str) -> str:
    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if device != "meta":
            return value.to(device)
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)

    good = {"dout": ones(SHAPE), "x": ones(SHAPE), "weight": ones(16), "dsum": ones(SHAPE), "eps": EPS, "gemma": False}
    with pytest.raises(RuntimeError) as caught:
        kernel(*(moved(value) for value in (good | arguments).values()))
    return str(caught.value).partition("\n")[0]


@pytest.mark.parametrize("name", ["rms_norm_backward", "rms_norm_backward_input"])
@pytest.mark.parametrize(("text", "arguments"), BAD, ids=[text for text, _ in BAD])
def test_bad_arguments_are_named_alike_by_every_implementation(device, name, text, arguments):
    with warnings_are("ignore"):
        for kernel in (getattr(OPS, name), _registry.OPERATORS[name].plain):
            assert message(kernel, arguments, device) == f"{name}: {text}"
    assert message(getattr(OPS, name), arguments, "meta") == f"{name}: {text}"


def test_each_operator_has_a_rule_for_its_weight(device):
    text = message(OPS.rms_norm_backward, {"weight": None}, device)
    assert text == "rms_norm_backward: weight must be a tensor, got None"
    text = message(OPS.rms_norm_backward_input, {"weight": None, "gemma": True}, device)
    assert text == "rms_norm_backward_input: gemma must be False without a weight, got True"


@pytest.mark.parametrize("name", ["weight", "dout", "dsum"])
def test_other_devices_are_refused(device, name):
    arguments = {"dout": ones(SHAPE), "x": ones(SHAPE), "weight": ones(16), "dsum": ones(SHAPE)}
    arguments = {key: t.to("meta" if key == name else device) for key, t in arguments.items()}
    for op in ("rms_norm_backward", "rms_norm_backward_input"):
        with pytest.raises(RuntimeError, match=f"{op}: {name} must be on x's device"):
            getattr(OPS, op)(*arguments.values())


def test_a_derivative_that_would_be_lost_is_refused(device):
    """The operators record none. The gradients of rms_norm have derivatives of their own all the same."""
    x, weight = ones(SHAPE, device=device), ones(16, device=device)
    for op in ("rms_norm_backward", "rms_norm_backward_input"):
        with pytest.raises(RuntimeError, match=f"{op}: x must not require grad while grad mode is enabled"):
            getattr(OPS, op)(x, x.clone().requires_grad_(), weight)
