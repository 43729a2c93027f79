"""gemma_norm.reference: the oracle is right, and the error that it allows is too small for the mistakes that peers
made.
"""

from __future__ import annotations

import math

import pytest
import torch

from gemma_norm import reference
from support import make_weight, randn


def test_oracle_by_hand():
    x = torch.tensor([[3.0, 4.0]])
    weight = torch.tensor([2.0, -1.0])
    rms = math.sqrt((9 + 16) / 2 + torch.tensor(0.1).item())
    assert reference.oracle(x, weight, 0.1).tolist() == [[pytest.approx(6 / rms, rel=1e-15), pytest.approx(-4 / rms)]]
    assert reference.oracle(x, weight, 0.1, True).tolist() == [[pytest.approx(9 / rms, rel=1e-15), 0.0]]


@pytest.mark.parametrize("hidden", [1, 7, 256, 4096, 65536])
def test_reference_is_within_the_bound(dtype, gemma, hidden):
    x, weight = randn(40, hidden, dtype=dtype), make_weight(hidden, torch.float32, "cpu", gemma)
    y = reference.rms_norm(x, weight, gemma=gemma)
    error = reference.ulp_error(y, reference.oracle(x, weight, gemma=gemma))
    assert error <= reference.max_ulp_error(dtype, hidden)


def test_ulp_error_counts_last_places(dtype):
    one = torch.ones(3, dtype=dtype)
    eps = torch.finfo(dtype).eps
    assert reference.ulp_error(one, one.double()) == 0
    assert reference.ulp_error(one, one.double() + 0.75 * eps) == 0.75
    below = torch.tensor([1.0, 1.0, 1 - eps], dtype=torch.float64)  # where units are half as large
    assert reference.ulp_error(one, below) == 2.0
    smallest = torch.finfo(dtype).smallest_normal * eps
    assert reference.ulp_error(torch.zeros(1, dtype=dtype), torch.tensor([smallest], dtype=torch.float64)) == 1.0


def test_ulp_error_of_values_that_are_not_numbers(dtype):
    def error(y: float, exact: float) -> float:
        return reference.ulp_error(torch.tensor([y], dtype=dtype), torch.tensor([exact], dtype=torch.float64))

    largest = torch.finfo(dtype).max
    assert error(math.nan, math.nan) == 0
    assert error(math.nan, 1.0) == error(1.0, math.nan) == math.inf
    assert error(math.inf, math.inf) == 0
    assert error(math.inf, 4 * largest) == 0
    assert error(largest, 4 * largest) >= 1
    assert error(math.inf, largest) >= 1
    assert error(-math.inf, math.inf) > 100


def truncate(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    kept = 2 ** (16 if dtype == torch.bfloat16 else 13)
    return (y.view(torch.int32) & -kept).view(torch.float32).to(dtype)


@pytest.mark.parametrize("hidden", [256, 4096])
@pytest.mark.parametrize("mistake", ["truncated", "1 + w rounded", "normalised value rounded", "1 + forgotten"])
def test_the_bound_catches_common_mistakes_in_16_bits(mistake, hidden):
    dtype = torch.bfloat16
    x, weight = randn(16, hidden, dtype=dtype), make_weight(hidden, dtype, "cpu", True)
    n = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    wrong = {
        "truncated": truncate(n * (1 + weight.float()), dtype),
        "1 + w rounded": (n * (1 + weight).float()).to(dtype),
        "normalised value rounded": (n.to(dtype).float() * (1 + weight.float())).to(dtype),
        "1 + forgotten": (n * weight.float()).to(dtype),
    }[mistake]
    error = reference.ulp_error(wrong, reference.oracle(x, weight, gemma=True))
    assert error > 1.2 * reference.max_ulp_error(dtype, hidden)


def test_the_bound_catches_a_lost_element_in_float32():
    x, weight = randn(16, 256), torch.ones(256)
    exact = reference.oracle(x, weight)
    lost = x * torch.rsqrt(x[:, :-1].square().sum(-1, keepdim=True) / 256 + 1e-6)
    assert reference.ulp_error(lost, exact) > 100 * reference.max_ulp_error(torch.float32, 256)


def test_add_rms_norm_rounds_in_the_order_of_the_contract():
    x, residual, post = (randn(64, 96, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    weight = torch.ones(96)
    y, s = reference.add_rms_norm(x, residual, weight, post_residual_addition=post)
    assert torch.equal(s, (x.float() + (residual.float() + post.float()).bfloat16().float()).bfloat16())
    assert not torch.equal(s, (x.float() + residual.float() + post.float()).bfloat16())
    assert torch.equal(y, reference.rms_norm(s, weight))
