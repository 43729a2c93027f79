"""The operators of the norm's backward pass: every pair of dtypes, layouts of inputs, bits, values beyond float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, ones

from support import LAYOUTS, Placed, assert_same_bits, make_weight, place, randn

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
