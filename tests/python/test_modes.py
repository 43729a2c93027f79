"""docs/contract.md, "Modes": no weight, each step rounded, a float32 residual, float32 x with a 16-bit weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gemma_norm
from gemma_norm import reference
from support import DTYPES, assert_same_bits, randn

HALVES = (torch.float16, torch.bfloat16)
SHAPES = ((1, 64), (3, 1000), (40, 4096), (5, 33000))


def bound(dtype: torch.dtype, hidden: int) -> float:
    return reference.max_ulp_error(dtype, hidden)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_weight(device, dtype, shape):
    x, residual = (randn(*shape, dtype=dtype, device=device, seed=seed) for seed in range(2))
    y = gemma_norm.rms_norm(x)
    assert reference.ulp_error(y, reference.oracle(x)) <= bound(dtype, shape[-1])
    assert_same_bits(y, gemma_norm.rms_norm(x, torch.ones(shape[-1], dtype=dtype, device=device)))
    assert_same_bits(gemma_norm.RMSNorm(shape[-1], has_weight=False)(x), y)
    y, s = gemma_norm.add_rms_norm(x, residual)
    assert_same_bits(s, x + residual)
    assert_same_bits(y, gemma_norm.rms_norm(s))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_step_rounded(device, dtype, shape):
    """The first rounding gives the norm without a weight, bit for bit. The second is of the product of two 16-bit
    numbers, which float32 holds exactly: so there is one right result.
    """
    x, residual = (randn(*shape, dtype=dtype, device=device, seed=seed) for seed in range(2))
    weight = randn(shape[-1], dtype=dtype, device=device, seed=2)
    y = gemma_norm.rms_norm(x, weight, round_each_step=True)
    assert_same_bits(y, (gemma_norm.rms_norm(x).float() * weight.float()).to(dtype))
    y, s = gemma_norm.add_rms_norm(x, residual, weight, round_each_step=True)
    assert_same_bits(s, x + residual)
    assert_same_bits(y, gemma_norm.rms_norm(s, weight, round_each_step=True))
    module = gemma_norm.RMSNorm(shape[-1], dtype=dtype, device=device, round_each_step=True)
    module.weight.data = weight
    with torch.no_grad():
        assert_same_bits(module(x), gemma_norm.rms_norm(x, weight, round_each_step=True))


def test_round_each_step_computes_what_llamas_norm_in_transformers_does():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x, weight = randn(4000, 256, dtype=torch.bfloat16), randn(256, dtype=torch.bfloat16, seed=1)
    theirs = llama.LlamaRMSNorm(256, eps=1e-6)
    theirs.weight.data = weight
    got = gemma_norm.rms_norm(x, weight, round_each_step=True)
    assert float((got != theirs(x)).float().mean()) <= 1e-5
    assert float((gemma_norm.rms_norm(x, weight) != theirs(x)).float().mean()) > 0.1


def test_in_float32_rounding_each_step_changes_nothing(device):
    x, weight = randn(5, 100, device=device), randn(100, device=device, seed=1)
    assert_same_bits(gemma_norm.rms_norm(x, weight, round_each_step=True), gemma_norm.rms_norm(x, weight))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_x_with_a_16_bit_weight(device, dtype, shape):
    x, weight = randn(*shape, device=device), randn(shape[-1], dtype=dtype, device=device, seed=1)
    for gemma in (False, True):
        assert_same_bits(
            gemma_norm.rms_norm(x, weight, gemma=gemma), gemma_norm.rms_norm(x, weight.float(), gemma=gemma)
        )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_post", [False, True], ids=["", "post"])
def test_float32_residual_stream(device, dtype, shape, with_post):
    x, weight = randn(*shape, dtype=dtype, device=device), randn(shape[-1], dtype=dtype, device=device, seed=1)
    residual, post = (randn(*shape, device=device, seed=seed) for seed in (2, 3))
    post = post if with_post else None
    want = x.float() + (residual if post is None else residual + post)
    for w, gemma in ((weight, False), (weight.float(), True), (None, False)):
        y, s = gemma_norm.add_rms_norm(x, residual, w, 1e-6, gemma, post)
        assert_same_bits(s, want)
        assert y.dtype == dtype
        assert reference.ulp_error(y, reference.oracle(want, w, 1e-6, gemma)) <= bound(dtype, shape[-1])
        in_place, stream = x.clone(), residual.clone()
        gemma_norm.fused_add_rms_norm(in_place, stream, w, 1e-6, gemma, post)
        assert_same_bits(in_place, y)
        assert_same_bits(stream, s)
    each, _ = gemma_norm.add_rms_norm(x, residual, weight, post_residual_addition=post, round_each_step=True)
    plain, _ = gemma_norm.add_rms_norm(x, residual, None, post_residual_addition=post)
    assert_same_bits(each, (plain.float() * weight.float()).to(dtype))


@pytest.mark.parametrize("weighted", [True, False], ids=["weight", "no weight"])
def test_gradients(device, weighted):
    """Each gradient has the dtype of its input, and agrees with that of the formula in float64."""
    x = randn(6, 64, dtype=torch.bfloat16, device=device).requires_grad_()
    residual = randn(6, 64, device=device, seed=1).requires_grad_()
    weight = randn(64, dtype=torch.bfloat16, device=device, seed=2).requires_grad_() if weighted else None
    inputs = [t for t in (x, residual, weight) if t is not None]

    def loss(y: Tensor, s: Tensor) -> Tensor:
        return y.sin().sum() + s.cos().sum()

    got = torch.autograd.grad(loss(*gemma_norm.add_rms_norm(x, residual, weight)), inputs)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    s = exact[0] + exact[1]
    want = torch.autograd.grad(loss(reference.oracle(s, exact[2] if weighted else None), s), exact)
    for g, w, t in zip(got, want, inputs, strict=True):
        assert g.dtype == t.dtype
        torch.testing.assert_close(g.double(), w, rtol=2e-2, atol=2e-2 * float(w.abs().max()))


def test_opcheck_and_torch_compile(device):
    x, residual = randn(4, 64, dtype=torch.bfloat16, device=device), randn(4, 64, device=device, seed=1)
    weight = randn(64, dtype=torch.bfloat16, device=device, seed=2)
    torch.library.opcheck(torch.ops.gemma_norm.rms_norm.default, (x,))
    torch.library.opcheck(torch.ops.gemma_norm.add_rms_norm.default, (x, residual, weight))
    torch.library.opcheck(torch.ops.gemma_norm.fused_add_rms_norm.default, (x, residual, weight))

    def function(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return gemma_norm.add_rms_norm(x, residual, weight, round_each_step=True)

    compiled = torch.compile(function, fullgraph=True)
    for got, want in zip(compiled(x, residual), function(x, residual), strict=True):
        assert_same_bits(got, want)
