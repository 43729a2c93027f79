"""docs/contract.md, "Definition" and "Where float32 shows", point by point."""

from __future__ import annotations

import math

import pytest
import torch

import gemma_norm
from gemma_norm import reference
from support import LAYOUTS, assert_right, assert_same_bits, bits, make_weight, place, randn

HIDDEN = [7, 128, 256, 1000, 4096, 5120, 16384]
MODEL_SIZES = [256, 2048, 4096, 5120]


# "Definition", "The sum": s = round(x + residual), or round(x + round(residual + post)), is the new residual.
def test_the_sum_is_rounded_after_each_addition_and_post_is_added_to_the_residual_first(device, dtype):
    x, residual, post = (randn(33, 640, dtype=dtype, device=device, seed=seed) for seed in range(3))
    weight = make_weight(640, dtype, device, False)
    _, s = gemma_norm.add_rms_norm(x, residual, weight, post_residual_addition=post)
    assert_same_bits(s, x + (residual + post))
    assert bool((s != (x + residual) + post).any())


# "Definition", "The statistics" and "The result": all of it is float32, 1 + weight too, and one rounding is to 16 bits.
@pytest.mark.parametrize("hidden", MODEL_SIZES)
def test_one_plus_weight_is_not_rounded(device, hidden):
    x = randn(65, hidden, dtype=torch.bfloat16, device=device)
    weight = make_weight(hidden, torch.bfloat16, device, True)
    y = gemma_norm.rms_norm(x, weight, gemma=True)
    assert_right(y, x, weight, gemma=True)
    assert bool((y != gemma_norm.rms_norm(x, 1 + weight)).any()), "no 1 + weight of this test needs a rounding"


def test_ties_round_to_even(device):
    """The rows are of 1 and -1, so that rstd is 1 and y is the weight or its negative. Every other weight is half way
    between two 16-bit numbers.
    """
    for dtype, unit in ((torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)):
        weight = 1 + torch.arange(512, device=device) * (unit / 2)
        x = torch.ones(2, 512, dtype=dtype, device=device)
        x[1, ::2] = -1
        assert_same_bits(gemma_norm.rms_norm(x, weight, 0.0), (x.float() * weight).to(dtype))
        assert_same_bits(gemma_norm.rms_norm(x, weight - 1, 0.0, True), (x.float() * weight).to(dtype))


def test_a_float32_weight_is_read_in_float32(device):
    x = randn(9, 2048, dtype=torch.bfloat16, device=device)
    weight = randn(2048, device=device, seed=1)
    y = gemma_norm.rms_norm(x, weight)
    assert_right(y, x, weight)
    assert bool((y != gemma_norm.rms_norm(x, weight.bfloat16())).any())


# "Definition", "Fusion changes nothing". Plain PyTorch has the same result but for an element's last bit here and
# there.
@pytest.mark.parametrize("hidden", HIDDEN)
def test_fused_equals_unfused(device, dtype, gemma, hidden):
    x, residual, post = (randn(19, hidden, dtype=dtype, device=device, seed=seed) for seed in range(3))
    weight = make_weight(hidden, dtype, device, gemma)
    for addition, s in ((None, x + residual), (post, x + (residual + post))):
        want = gemma_norm.rms_norm(s, weight, 1e-6, gemma)
        y, new_residual = gemma_norm.add_rms_norm(x, residual, weight, 1e-6, gemma, addition)
        assert_same_bits(y, want)
        assert_same_bits(new_residual, s)
        in_place, in_place_residual = x.clone(), residual.clone()
        gemma_norm.fused_add_rms_norm(in_place, in_place_residual, weight, 1e-6, gemma, addition)
        assert_same_bits(in_place, want)
        assert_same_bits(in_place_residual, s)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("hidden", MODEL_SIZES)
def test_differs_from_plain_pytorch_by_a_last_bit_of_few_elements_at_most(device, dtype, gemma, hidden):
    x, weight = randn(65, hidden, dtype=dtype, device=device), make_weight(hidden, dtype, device, gemma)
    y, eager = gemma_norm.rms_norm(x, weight, gemma=gemma), reference.rms_norm(x, weight, gemma=gemma)
    assert int((bits(y).int() - bits(eager).int()).abs().max()) <= 1
    assert float((bits(y) != bits(eager)).float().mean()) < 1e-2


# "Definition", "Batch invariance": a row's bits depend on that row, the weight, eps, dtypes and hidden size alone.
@pytest.mark.parametrize("hidden", HIDDEN)
def test_independent_of_the_number_of_rows_and_the_place_among_them(device, dtype, hidden):
    x, residual = (randn(300, hidden, dtype=dtype, device=device, seed=seed) for seed in range(2))
    weight = make_weight(hidden, dtype, device, False)
    want, want_sum = gemma_norm.add_rms_norm(x, residual, weight)
    assert_same_bits(want, gemma_norm.rms_norm(want_sum, weight))
    for first, last in ((0, 1), (299, 300), (1, 3), (7, 24), (5, 38), (100, 299)):
        rows = slice(first, last)
        y, _ = gemma_norm.add_rms_norm(x[rows], residual[rows], weight)
        assert_same_bits(y, want[rows])
        assert_same_bits(gemma_norm.rms_norm(want_sum[rows], weight), want[rows])
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0)).to(device)
    assert_same_bits(gemma_norm.rms_norm(want_sum[order], weight), want[order])


def test_independent_of_the_shape_of_the_batch(device, dtype):
    x, weight = randn(12, 512, dtype=dtype, device=device), make_weight(512, dtype, device, False)
    want = gemma_norm.rms_norm(x, weight)
    for shape in ((2, 6, 512), (3, 2, 2, 512), (12, 1, 512)):
        assert_same_bits(gemma_norm.rms_norm(x.view(shape), weight).view_as(x), want)


@pytest.mark.parametrize("hidden", [96, 256, 1000, 4096])
def test_independent_of_strides_and_alignment(device, dtype, hidden):
    x, weight = randn(4, 3, hidden, dtype=dtype, device=device), make_weight(hidden, dtype, device, False)
    want = gemma_norm.rms_norm(x, weight)
    for layout in LAYOUTS:
        placed = place(x, layout)
        assert_same_bits(gemma_norm.rms_norm(placed.view, weight), want)
        gemma_norm.rms_norm(placed.view, weight, out=placed.view)
        assert_same_bits(placed.view, want)


@pytest.mark.parametrize("hidden", [64, 1000, 5120])
def test_independent_of_the_number_of_threads(dtype, hidden, restore_threads):
    x, residual = (randn(513, hidden, dtype=dtype, seed=seed) for seed in range(2))
    weight = make_weight(hidden, dtype, "cpu", False)
    want = gemma_norm.add_rms_norm(x, residual, weight)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for a, b in zip(gemma_norm.add_rms_norm(x, residual, weight), want, strict=True):
            assert_same_bits(a, b)


# "Definition", "Special values": NaN and Inf propagate as in the formula, subnormals are kept, results never vary.
@pytest.mark.parametrize("hidden", [5, 256, 4096])
def test_nan_and_inf_stay_in_their_rows(device, dtype, hidden):
    x, weight = randn(6, hidden, dtype=dtype, device=device), make_weight(hidden, dtype, device, False)
    clean = gemma_norm.rms_norm(x, weight)
    x[1, hidden // 2] = math.nan
    x[2, 0] = math.inf
    x[4, hidden - 1] = -math.inf
    y = gemma_norm.rms_norm(x, weight)
    assert bool(y[1].isnan().all())
    for row, column in ((2, 0), (4, hidden - 1)):  # rstd is 0. Inf * 0 is NaN, and all else is 0.
        assert bool(y[row, column].isnan())
        assert int((y[row] == 0).sum()) == hidden - 1
    for row in (0, 3, 5):
        assert_same_bits(y[row], clean[row])
    _, s = gemma_norm.add_rms_norm(x, -x, weight)
    assert torch.equal(s.isnan(), x.isnan() | x.isinf())  # Inf - Inf is NaN
    weight[0], weight[hidden - 1] = math.nan, math.inf
    y = gemma_norm.rms_norm(x[:1], weight)
    assert bool(y[0, 0].isnan()) and bool(y[0, -1].isinf())
    assert_same_bits(y[:, 1:-1], clean[:1, 1:-1])


def test_a_sum_that_overflows_is_infinite(device, dtype):
    x = torch.full((1, 64), 0.75 * torch.finfo(dtype).max, dtype=dtype, device=device)
    residual = torch.zeros_like(x)
    residual[0, 3] = x[0, 3]
    y, s = gemma_norm.add_rms_norm(x, residual, torch.ones(64, device=device))
    assert bool(s[0, 3].isinf()) and bool(y[0, 3].isnan())
    assert int((y == 0).sum()) == 63


def test_a_float16_result_that_overflows_is_infinite(device):
    x = torch.zeros(1, 4096, dtype=torch.float16, device=device)
    x[0, :2] = torch.tensor([1.0, -1.0])
    y = gemma_norm.rms_norm(x, torch.full((4096,), 1500.0, device=device), 0.0)
    assert y[0, :2].tolist() == [math.inf, -math.inf]  # sqrt(4096 / 2) * 1500 = 67882 > 65504
    assert int((y == 0).sum()) == 4094


def test_subnormals_are_kept(device, dtype):
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    multiples = torch.arange(1, 101, dtype=torch.float64, device=device) % 100
    x = (multiples * smallest).to(dtype)[None]
    half = torch.full((100,), 0.5, device=device)
    y = gemma_norm.rms_norm(x, half, 1.0)  # rstd is 1, so y = x / 2
    assert_right(y, x, half, 1.0)
    assert int((y != 0).sum()) >= 98
    _, s = gemma_norm.add_rms_norm(x, x, half)
    assert_same_bits(s, (2 * multiples * smallest).to(dtype)[None])
    assert_right(gemma_norm.rms_norm(x, half), x, half)  # rstd is 1000


def test_zero_rows_with_and_without_eps(device, dtype):
    x, weight = torch.zeros(2, 300, dtype=dtype, device=device), torch.ones(300, device=device)
    assert bool((gemma_norm.rms_norm(x, weight) == 0).all())
    assert bool(gemma_norm.rms_norm(x, weight, 0.0).isnan().all())  # 0 * (1 / 0), as in the formula


def test_a_weight_of_minus_one_is_zero_for_gemma(device, dtype):
    x = randn(3, 128, dtype=dtype, device=device)
    assert bool((gemma_norm.rms_norm(x, torch.full((128,), -1.0, device=device), gemma=True) == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1e15, 1e17])
def test_large_magnitudes_whose_squares_fit(device, dtype, magnitude):
    x = (randn(5, 4096, device=device) * magnitude).to(dtype)
    weight = make_weight(4096, dtype, device, False)
    assert_right(gemma_norm.rms_norm(x, weight), x, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_beyond_float32_make_the_row_zero(device, dtype):
    """The mean of squares is infinite, so that rstd and the row are 0. Other rows are as ever.

    This is what the formula gives in float32, and plain PyTorch does the same.
    """
    x = randn(4, 256, device=device).sign()
    x[0] *= 2e19  # each square overflows
    x[1] *= 1.5e19  # each fits, the sum does not
    x[2] *= torch.finfo(dtype).max
    x = x.to(dtype)
    weight = make_weight(256, dtype, device, False)
    y = gemma_norm.rms_norm(x, weight)
    assert bool((y[:3] == 0).all())
    assert_right(y, x, weight)
    assert_same_bits(y[:3], reference.rms_norm(x[:3], weight))
    assert bool((y[3] != 0).any())


def test_rows_of_the_largest_float16_are_right(device):
    x = torch.full((2, 5120), 65504.0, dtype=torch.float16, device=device)
    x[1, 1::2] = -65504.0
    weight = make_weight(5120, torch.float16, device, False)
    assert_right(gemma_norm.rms_norm(x, weight), x, weight)


@pytest.mark.parametrize("hidden", [1000, 4096])
def test_results_are_the_same_from_run_to_run(device, dtype, hidden):
    x, weight = randn(257, hidden, dtype=dtype, device=device), make_weight(hidden, dtype, device, True)
    want = gemma_norm.rms_norm(x, weight, gemma=True)
    for _ in range(5):
        assert_same_bits(gemma_norm.rms_norm(x, weight, gemma=True), want)


def test_gradients_are_the_same_from_run_to_run(device, dtype):
    def gradients() -> tuple[torch.Tensor, ...]:
        x, weight = randn(257, 1000, dtype=dtype, device=device), make_weight(1000, dtype, device, True)
        inputs = x.requires_grad_(), weight.requires_grad_()
        y, s = gemma_norm.add_rms_norm(x, x, weight, gemma=True)
        return torch.autograd.grad((y * s).float().sum(), inputs)

    want = gradients()
    for _ in range(3):
        for a, b in zip(gradients(), want, strict=True):
            assert_same_bits(a, b)


# "Where float32 shows": where results differ from the float64 oracle by more than the bound, as PyTorch's do.
def test_squares_that_underflow_make_a_row_infinite_without_eps(device):
    x, weight = torch.full((2, 64), 1e-30, device=device), torch.ones(64, device=device)
    x[1, 0], x[1, 1] = 0.0, -1e-30
    y = gemma_norm.rms_norm(x, weight, 0.0)
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (64,), weight, 0.0), equal_nan=True)
    assert bool(y[0].isinf().all()) and bool(y[1, 0].isnan()) and float(y[1, 1]) == -math.inf
    assert_right(gemma_norm.rms_norm(x, weight, 1e-20), x, weight, 1e-20)


def test_a_subnormal_product_has_fewer_bits(device):
    x, weight = randn(4, 64, device=device) * 3e-19, torch.full((64,), 1e15, device=device)
    y = gemma_norm.rms_norm(x, weight, 3e38)
    product = x * torch.rsqrt(torch.tensor(3e38, device=device))  # float32, subnormal in part
    assert float(product.abs().min()) < torch.finfo(torch.float32).tiny
    torch.testing.assert_close(y, product * weight, rtol=2**-20, atol=2e-45 * 1e15)
    assert reference.ulp_error(y, reference.oracle(x, weight, 3e38)) > reference.max_ulp_error(torch.float32, 64)
