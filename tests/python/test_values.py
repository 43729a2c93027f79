"""rms_norm and add_rms_norm against the float64 oracle, in every dtype, size, layout, alignment and aliasing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gemma_norm
from support import DTYPES, LAYOUTS, Placed, assert_right, assert_same_bits, make_weight, place, randn

HIDDEN = [1, 2, 3, 7, 8, 31, 64, 96, 127, 128, 255, 256, 513, 576, 1000, 1024, 2048, 2560, 3584, 4095, 4096, 5120]
LONG = [7168, 8192, 12288, 16384, 16385, 65536, 262144]


def rows_for(hidden: int) -> tuple[int, ...]:
    return (1, 5) if hidden > 5120 else (1, 2, 33)


@pytest.mark.parametrize("hidden", HIDDEN + LONG)
def test_rms_norm(device, dtype, gemma, hidden):
    for weight_dtype in {dtype, torch.float32}:
        weight = make_weight(hidden, weight_dtype, device, gemma)
        for rows in rows_for(hidden):
            x = randn(rows, hidden, dtype=dtype, device=device, seed=rows)
            kept = x.clone()
            y = gemma_norm.rms_norm(x, weight, 1e-5, gemma)
            assert_right(y, x, weight, 1e-5, gemma)
            assert_same_bits(x, kept)


@pytest.mark.parametrize("hidden", [256, 4096, 65536, 262144])
def test_rows_of_one_value_whose_roundings_do_not_cancel(device, hidden):
    x = (1 + torch.rand(16, 1, generator=torch.Generator().manual_seed(0))).to(device).repeat(1, hidden)
    weight = make_weight(hidden, torch.float32, device, False)
    assert_right(gemma_norm.rms_norm(x, weight), x, weight)


@pytest.mark.parametrize("with_post", [False, True], ids=["", "post"])
@pytest.mark.parametrize("hidden", HIDDEN + LONG)
def test_add_rms_norm_functional_and_in_place(device, dtype, gemma, hidden, with_post):
    rows = rows_for(hidden)[-1]
    x, residual, post = (randn(rows, hidden, dtype=dtype, device=device, seed=seed) for seed in range(3))
    addition = post if with_post else None
    for weight_dtype in {dtype, torch.float32}:
        weight = make_weight(hidden, weight_dtype, device, gemma)
        kept = [t.clone() for t in (x, residual, post)]
        y, s = gemma_norm.add_rms_norm(x, residual, weight, 1e-6, gemma, addition)
        for now, before in zip((x, residual, post), kept, strict=True):
            assert_same_bits(now, before)
        assert_same_bits(s, x + (residual + post) if with_post else x + residual)
        assert_right(y, s, weight, 1e-6, gemma)
        in_place, new_residual = x.clone(), residual.clone()
        assert gemma_norm.fused_add_rms_norm(in_place, new_residual, weight, 1e-6, gemma, addition) is None
        assert_same_bits(in_place, y)
        assert_same_bits(new_residual, s)
        assert_same_bits(post, kept[2])


@pytest.mark.parametrize("shape", [(0,), (1,), (3,), (2, 3), (2, 1, 3), (2, 3, 2, 2), (1, 2, 1, 3, 1, 2), (3, 0, 2)])
def test_leading_dimensions(device, dtype, shape):
    x = randn(*shape, 40, dtype=dtype, device=device)
    weight = make_weight(40, dtype, device, False)
    y = gemma_norm.rms_norm(x, weight)
    assert y.shape == x.shape and y.is_contiguous() and y.device == x.device
    assert_right(y, x, weight)
    y, s = gemma_norm.add_rms_norm(x, x, weight)
    assert y.shape == s.shape == x.shape
    gemma_norm.fused_add_rms_norm(x.clone(), x.clone(), weight)


def test_one_dimension(device, dtype):
    x, weight = randn(100, dtype=dtype, device=device), make_weight(100, dtype, device, True)
    assert_right(gemma_norm.rms_norm(x, weight, gemma=True), x, weight, gemma=True)


@pytest.mark.parametrize("hidden", [8, 127, 256, 1024, 5120])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, dtype, layout, hidden):
    """Each operand has another layout. The bits are those of contiguous tensors, and what lies between rows is kept."""
    names = list(LAYOUTS)
    at = names.index(layout)
    others = [names[(at + step) % len(names)] for step in (1, 3, 5)]
    values = [randn(5, 3, hidden, dtype=dtype, device=device, seed=seed) for seed in range(3)]
    weight = make_weight(hidden, dtype, device, True)
    want_plain = gemma_norm.rms_norm(values[0], weight, gemma=True)
    want, want_sum = gemma_norm.add_rms_norm(*values[:2], weight, gemma=True, post_residual_addition=values[2])

    x = place(values[0], layout)
    y = gemma_norm.rms_norm(x.view, weight, gemma=True)
    assert y.is_contiguous()
    assert_same_bits(y, want_plain)
    out = place(torch.zeros_like(values[0]), others[0])
    assert gemma_norm.rms_norm(x.view, weight, gemma=True, out=out.view) is out.view
    assert_same_bits(out.view, want_plain)
    out.assert_gaps_intact()

    residual, post = place(values[1], others[1]), place(values[2], others[2])
    y, s = gemma_norm.add_rms_norm(x.view, residual.view, weight, gemma=True, post_residual_addition=post.view)
    assert y.is_contiguous() and s.is_contiguous()
    assert_same_bits(y, want)
    assert_same_bits(s, want_sum)
    gemma_norm.fused_add_rms_norm(x.view, residual.view, weight, gemma=True, post_residual_addition=post.view)
    assert_same_bits(x.view, want)
    assert_same_bits(residual.view, want_sum)
    for placed in (x, residual, post):
        placed.assert_gaps_intact()


@pytest.mark.parametrize("offset", range(1, 9))
def test_weight_may_be_misaligned(device, dtype, offset):
    x, weight = randn(3, 512, dtype=dtype, device=device), make_weight(512, dtype, device, False)
    moved = Placed(weight, (1,), offset).view
    assert_same_bits(gemma_norm.rms_norm(x, moved), gemma_norm.rms_norm(x, weight))


def test_more_dimensions_with_strides_of_their_own_than_a_kernel_takes_at_once(device):
    buffer = randn(3, 5, 4, 6, 3, 24, device=device)
    x = buffer[::2, 1::2, ::3, ::2, ::2, :16]
    weight = make_weight(16, torch.float32, device, False)
    assert_same_bits(gemma_norm.rms_norm(x, weight), gemma_norm.rms_norm(x.contiguous(), weight))
    want = gemma_norm.rms_norm(x.contiguous(), weight)
    kept = buffer.clone()
    gemma_norm.rms_norm(x, weight, out=x)
    assert_same_bits(x, want)
    kept[::2, 1::2, ::3, ::2, ::2, :16] = want
    assert_same_bits(buffer, kept)


def test_expanded_inputs(device, dtype):
    row, weight = randn(1, 1, 64, dtype=dtype, device=device), make_weight(64, dtype, device, False)
    x = row.expand(4, 3, 64)
    assert_same_bits(gemma_norm.rms_norm(x, weight), gemma_norm.rms_norm(x.contiguous(), weight))
    residual = randn(4, 3, 64, dtype=dtype, device=device, seed=1)
    _, s = gemma_norm.add_rms_norm(residual, x, weight, post_residual_addition=x)
    assert_same_bits(s, residual + (x + x))
    in_place, kept = residual.clone(), residual.clone()
    gemma_norm.fused_add_rms_norm(in_place, kept, weight, post_residual_addition=x)
    assert_same_bits(kept, residual + (residual + x))


def test_aliasing_that_is_allowed(device, dtype):
    x, weight = randn(6, 200, dtype=dtype, device=device), make_weight(200, dtype, device, False)
    want = gemma_norm.rms_norm(x, weight)
    y, s = gemma_norm.add_rms_norm(x, x, weight, post_residual_addition=x)  # one tensor as three arguments
    assert_same_bits(s, x + (x + x))
    assert_right(y, s, weight)
    assert_same_bits(gemma_norm.rms_norm(x.clone(), weight, out=torch.empty_like(x)), want)
    in_place = x.clone()
    gemma_norm.rms_norm(in_place, weight, out=in_place)
    assert_same_bits(in_place, want)
    residual = randn(6, 200, dtype=dtype, device=device, seed=1)
    in_place, new_residual = x.clone(), residual.clone()
    gemma_norm.fused_add_rms_norm(in_place, new_residual, weight, post_residual_addition=new_residual)
    assert_same_bits(new_residual, x + (residual + residual))


def test_neighbours_in_one_buffer(device, dtype):
    """The rows of x and of the residual take turns in one buffer: their memory is apart, though each spans the
    other's.
    """
    buffer = randn(7, 4, 48, dtype=dtype, device=device)
    x, residual, weight = buffer[:, 0], buffer[:, 1], make_weight(48, dtype, device, False)
    want, want_sum = gemma_norm.add_rms_norm(x.clone(), residual.clone(), weight)
    untouched = buffer[:, 2:].clone()
    gemma_norm.fused_add_rms_norm(x, residual, weight)
    assert_same_bits(x, want)
    assert_same_bits(residual, want_sum)
    gemma_norm.rms_norm(buffer[:, 2], weight, out=buffer[:, 3])
    assert_same_bits(buffer[:, 3], gemma_norm.rms_norm(untouched[:, 0], weight))
    assert_same_bits(buffer[:, 2], untouched[:, 0])


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-6, 1e-2, 1.0, 100.0])
def test_eps(device, dtype, eps):
    x, weight = randn(9, 320, dtype=dtype, device=device) / 50, make_weight(320, dtype, device, False)
    assert_right(gemma_norm.rms_norm(x, weight, eps), x, weight, eps)


def test_defaults_are_those_of_the_schema(device):
    x, weight = randn(4, 32, device=device) / 100, make_weight(32, torch.float32, device, False)
    assert_same_bits(gemma_norm.rms_norm(x, weight), torch.ops.gemma_norm.rms_norm(x, weight, 1e-6, False))
    for a, b in zip(
        gemma_norm.add_rms_norm(x, x, weight),
        torch.ops.gemma_norm.add_rms_norm(x, x, weight, 1e-6, False, None),
        strict=True,
    ):
        assert_same_bits(a, b)


@given(data=st.data())
def test_any_shape_and_stride(data):
    """Hypothesis looks for shapes, dtypes and layouts at which the result is wrong or something else is written."""
    draw = data.draw
    dtype = draw(st.sampled_from(DTYPES))
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 600)))
    inner = shape[2] + draw(st.integers(0, 20))
    outer = shape[1] * inner + draw(st.integers(0, 20))
    values = [randn(*shape, dtype=dtype, seed=draw(st.integers(0, 9))) for _ in range(2)]
    x, residual = (Placed(v, (outer, inner, 1), draw(st.integers(0, 20))) for v in values)
    gemma = draw(st.booleans())
    weight = make_weight(shape[2], draw(st.sampled_from([dtype, torch.float32])), "cpu", gemma)
    gemma_norm.fused_add_rms_norm(x.view, residual.view, weight, 1e-6, gemma)
    assert_same_bits(residual.view, values[0] + values[1])
    assert_right(x.view, residual.view, weight, 1e-6, gemma)
    x.assert_gaps_intact()
    residual.assert_gaps_intact()
