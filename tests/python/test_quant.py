"""The values of the operators that quantise: whatever the shape and the layout, every bit is that of the definition.

What is compared with what: quant_support.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gemma_norm
from gemma_norm import reference
from quant_support import FLOAT4, FORMATS, OVERLOADS, SCHEMES, arguments, assert_quantised, function_of, on_device
from support import LAYOUTS, assert_same_bits, bits, make_weight, place, randn

# A row of each kind of kernel: on lanes of a wave, in a block, and with groups that begin in the middle of a thread's.
SHAPES = [(3, 128), (2, 3, 1024), (5, 2560), (1, 4096), (2, 5376), (1, 8320), (1, 16384)]


@pytest.fixture(params=SCHEMES.values(), ids=SCHEMES)
def scheme(request: pytest.FixtureRequest, device: str) -> dict[str, Any]:
    return on_device(request.param, device)


def place_last(values: Tensor) -> Tensor:
    """The same values, and gaps of 13 elements between rows, so that rows are not aligned, unless there is one."""
    return torch.nn.functional.pad(values, (0, 13))[..., : values.shape[-1]]


def test_every_bit(device, dtype, gemma, scheme):
    for shape in SHAPES:
        x, weight = randn(*shape, dtype=dtype, device=device), make_weight(shape[-1], dtype, device, gemma)
        y = gemma_norm.rms_norm(x, weight, gemma=gemma)
        for format in FORMATS:
            q, scale = gemma_norm.rms_norm_quant(x, weight, gemma=gemma, dtype=format, round_first=True, **scheme)
            assert_quantised(y, q, scale, format, scheme)


@pytest.mark.parametrize("scheme", FLOAT4.values(), ids=FLOAT4)
def test_every_bit_of_float4(device, dtype, scheme):
    scheme, format = on_device(scheme, device), torch.float4_e2m1fn_x2
    for shape in [(3, 384), (2, 3, 768), (4, 1536), (2, 5376), (1, 9216), (1, 24576), (0, 384), (384,), (1, 147456)]:
        x, residual = (place_last(randn(*shape, dtype=dtype, device=device, seed=n)) for n in range(2))
        weight = make_weight(shape[-1], torch.float32, device, True)
        q, scale = gemma_norm.rms_norm_quant(x, weight, gemma=True, dtype=format, round_first=True, **scheme)
        assert q.shape == (*shape[:-1], shape[-1] // 2)
        if shape[-1] < 2**16 or device == "cpu":  # longer sums are in another order (docs/contract.md, C12.6)
            assert_quantised(gemma_norm.rms_norm(x, weight, gemma=True), q, scale, format, scheme)
            y, _ = gemma_norm.add_rms_norm(x, residual, weight)
            q, scale, _ = gemma_norm.add_rms_norm_quant(x, residual, weight, dtype=format, round_first=True, **scheme)
            assert_quantised(y, q, scale, format, scheme)


@pytest.mark.parametrize("float32_residual", [False, True])
def test_every_bit_of_a_sum(device, dtype, scheme, float32_residual):
    shape = (4, 1536)
    x, residual = randn(*shape, dtype=dtype, device=device), randn(*shape, dtype=dtype, device=device, seed=1)
    residual = residual.float() if float32_residual else residual
    weight = make_weight(shape[-1], torch.float32, device, True)
    y, s = gemma_norm.add_rms_norm(x, residual, weight, gemma=True)
    q, scale, total = gemma_norm.add_rms_norm_quant(x, residual, weight, gemma=True, round_first=True, **scheme)
    assert_quantised(y, q, scale, torch.float8_e4m3fn, scheme)
    assert_same_bits(total, s)
    x_before, in_place = x.clone(), residual.clone()
    q2, scale2 = gemma_norm.fused_add_rms_norm_quant(x, in_place, weight, gemma=True, round_first=True, **scheme)
    assert torch.equal(bits(q2), bits(q))
    assert_same_bits(scale2, scale)
    assert_same_bits(in_place, s)
    assert_same_bits(x, x_before)


GATED = {
    "silu": {},
    "sigmoid": {"sigmoid": True},
    "gated input": {"norm_before_gate": False},
    "no gate": {"gate": None},
    "each step": {"round_each_step": True},
}


@pytest.mark.parametrize("options", GATED.values(), ids=GATED)
def test_every_bit_of_a_gated_norm(device, dtype, scheme, options):
    for shape in [(7, 128), (2, 3, 1024), (2, 2560), (1, 8192), (1, 20000)]:
        if shape[-1] % (scheme.get("scale_group_size") or 1):
            continue
        x, gate = randn(*shape, dtype=dtype, device=device), randn(*shape, dtype=dtype, device=device, seed=1)
        given = {"x": x, "gate": gate, "weight": make_weight(shape[-1], dtype, device, False), **options}
        y = gemma_norm.gated_rms_norm(**given)
        q, scale = gemma_norm.gated_rms_norm_quant(**given, round_first=True, **scheme)
        assert_quantised(y, q, scale, torch.float8_e4m3fn, scheme)


@pytest.mark.parametrize("group", [128, 64, 32, 16])
@pytest.mark.parametrize("column_major_scale", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "heads before tokens"])
def test_every_bit_of_norms_of_groups(device, dtype, group, column_major_scale, layout):
    """Rows of four norms. Each has a scale of its own, or several."""
    x, gate = (place(randn(3, 5, 512, dtype=dtype, device=device, seed=n), layout).view for n in range(2))
    weight, options = make_weight(512, dtype, device, False), {"group_size": 128}
    y = gemma_norm.gated_rms_norm(x, gate, weight, **options)
    scheme = {"scale_group_size": group, "column_major_scale": column_major_scale}
    q, scale = gemma_norm.gated_rms_norm_quant(x, gate, weight, **options, round_first=True, **scheme)
    assert_quantised(y, q, scale, torch.float8_e4m3fn, scheme)
    given = torch.full((), 0.01, device=device)
    q, scale = gemma_norm.gated_rms_norm_quant(x, gate, weight, given, **options, round_first=True)
    assert_quantised(y, q, scale, torch.float8_e4m3fn, {"scale": given})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [96, 127, 128])
def test_any_layout(device, dtype, layout, size):
    x = place(randn(5, 6, size, dtype=dtype, device=device), layout).view
    for group in (None, size, 32 if size % 32 == 0 else 1):
        q, scale = gemma_norm.rms_norm_quant(x, scale_group_size=group, round_first=True)
        scheme = {"scale_group_size": group}
        assert_quantised(gemma_norm.rms_norm(x), q, scale, torch.float8_e4m3fn, scheme)


@pytest.mark.parametrize("hidden", [1, 5, 8, 16, 33, 20000, 70000, 140000])
@pytest.mark.parametrize("group", [None, 1, 5])
def test_any_hidden_size(device, dtype, hidden, group):
    if group and hidden % group:
        group = hidden
    x = randn(2, hidden, dtype=dtype, device=device)
    q, scale = gemma_norm.rms_norm_quant(x, scale_group_size=group, round_first=True, dtype=torch.int8)
    if device == "cpu" or hidden * dtype.itemsize <= 2**17:
        assert_quantised(gemma_norm.rms_norm(x), q, scale, torch.int8, {"scale_group_size": group})
    else:  # the sum is in another order (docs/contract.md, C12.6)
        want, want_scale = reference.rms_norm_quant(x, scale_group_size=group, round_first=True, dtype=torch.int8)
        torch.testing.assert_close(scale, want_scale, rtol=2e-2 if dtype is torch.bfloat16 else 2e-3, atol=0)
        assert (q.int() - want.int()).abs().max() <= 1


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 128), (64,)], ids=str)
def test_no_rows_and_one(device, shape, scheme):
    q, scale = gemma_norm.rms_norm_quant(
        randn(*shape, device=device), **{**scheme, "scale_group_size": None} if "scale" not in scheme else scheme
    )
    assert q.shape == shape
    assert "scale" in scheme or scale.shape == (*shape[:-1], 1)


def test_each_step_rounded(device, scheme):
    x, weight = randn(3, 1024, dtype=torch.bfloat16, device=device), randn(1024, dtype=torch.bfloat16, device=device)
    options = {"round_each_step": True, "round_first": True}
    q, scale = gemma_norm.rms_norm_quant(x, weight, **options, **scheme)
    y = gemma_norm.rms_norm(x, weight, round_each_step=True)
    assert_quantised(y, q, scale, torch.float8_e4m3fn, scheme)


def test_each_step_rounded_where_nothing_follows(device, scheme):
    """Without a weight y is s * rstd, and without a gate its product with the weight: numbers that are rounded."""
    x, weight = randn(3, 1024, dtype=torch.bfloat16, device=device), randn(1024, dtype=torch.bfloat16, device=device)
    q, scale = gemma_norm.rms_norm_quant(x, round_each_step=True, **scheme)
    assert_quantised(gemma_norm.rms_norm(x), q, scale, torch.float8_e4m3fn, scheme)
    q, scale = gemma_norm.gated_rms_norm_quant(x, None, weight, round_each_step=True, **scheme)
    y = gemma_norm.gated_rms_norm(x, None, weight, round_each_step=True)
    assert_quantised(y, q, scale, torch.float8_e4m3fn, scheme)


@pytest.mark.parametrize("overload", [o for o in OVERLOADS.values() if o[0].endswith("_y")], ids=".".join)
def test_y_as_well(device, dtype, overload):
    for shape in [(4, 64), (3, 1280), (2, 4096), (2, 5376), (1, 8192), (3, 127), (1, 20000)]:
        given = {k: v for k, v in arguments(*overload, device).items() if k in ("scale", "return_y")}
        given["x"], given["weight"] = randn(*shape, dtype=dtype, device=device), randn(shape[-1], device=device)
        if "add" in overload[0]:
            given["residual"] = randn(*shape, dtype=dtype, device=device, seed=1)
        if "gated" in overload[0]:
            given["gate"] = randn(*shape, dtype=dtype, device=device, seed=2)
        copies = [{k: v.clone() if isinstance(v, Tensor) else v for k, v in given.items()} for _ in range(3)]
        q, scale, y, *sums = function_of(overload[0])(**copies[0])
        want = function_of(overload[0])(**{**copies[1], "return_y": False})
        for a, b in zip((q, scale, *sums), want, strict=True):
            assert torch.equal(bits(a.contiguous()), bits(b.contiguous()))
        norm = overload[0].removeprefix("fused_").removesuffix("_quant_y")
        y_alone = getattr(gemma_norm, norm)(**{k: v for k, v in copies[2].items() if k not in ("scale", "return_y")})
        y_alone = y_alone[0] if isinstance(y_alone, tuple) else y_alone
        assert_same_bits(y, y_alone)
        assert y.is_contiguous()
