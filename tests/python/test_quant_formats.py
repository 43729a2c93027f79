"""What operators quantise to, and the scales: every number of a format, ties, what is not finite, what scales are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gemma_norm
from gemma_norm import reference
from quant_support import FORMATS, assert_quantised
from support import bits, make_weight, randn


@pytest.fixture(params=FORMATS, ids=lambda dtype: str(dtype)[6:])
def format(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def all_values(format: torch.dtype) -> Tensor:
    """Every number of the format, and what lies between it and the next: the middle, and the floats around that."""
    codes = torch.arange(256, dtype=torch.uint8).view(format).float()
    codes = codes[codes.isfinite()].unique().double()
    middles = (codes[1:] + codes[:-1]) / 2
    near = [codes, middles, middles * (1 + 2**-23), middles * (1 - 2**-23), codes * 1.01, codes * 0.99]
    values = torch.cat([*near, torch.tensor([0.0, -0.0, 1e30, -1e30, 1e-30, -1e-30])]).float()
    return torch.nn.functional.pad(values, (0, 2048 - len(values)))  # a power of two, so that the mean of ones is 1


def test_every_code_and_every_tie(device, format):
    """With x = 1 and eps = 0, y is the weight, so any number can be quantised."""
    y = all_values(format).to(device)
    largest = reference.QUANTIZED_LARGEST[format]
    q, _ = gemma_norm.rms_norm_quant(
        torch.ones(1, len(y), device=device), y, torch.ones((), device=device), eps=0.0, dtype=format
    )
    limited = y.round().clamp(-128, 127) if format is torch.int8 else y.clamp(-largest, largest)
    want = limited.to(format)
    assert torch.equal(bits(q[0]), bits(want))
    finite = torch.arange(256, dtype=torch.uint8).view(format).float().isfinite().sum().item()
    assert len(bits(q).unique()) == finite


def test_every_code_and_every_tie_of_float4(device):
    """With x = 1 and eps = 0, y is the weight. A group whose largest element is 6 has the scale 1."""
    codes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    middles = (codes[1:] + codes[:-1]) / 2
    y = torch.cat([codes, middles, middles * (1 + 2**-23), middles * (1 - 2**-23), torch.tensor([1e-30, 5.9, 0.24])])
    y = torch.cat([y, -y]).unflatten(0, (-1, 4))
    y = torch.nn.functional.pad(y, (0, 12), value=6.0).flatten()
    y = torch.nn.functional.pad(y, (0, 512 - len(y)))
    q, scale = gemma_norm.rms_norm_quant(
        torch.ones(1, 512, device=device), y.to(device), eps=0.0, dtype=torch.float4_e2m1fn_x2, scale_group_size=16
    )
    largest = y.unflatten(0, (-1, 16)).amax(-1) == 6
    assert (scale[0].cpu()[largest] == 1).all()
    nibbles = torch.stack([bits(q)[0] & 15, bits(q)[0] >> 4], -1).flatten().cpu()
    values = torch.cat([codes, -codes])[nibbles.long()]
    # Of two numbers that are as near, the one with the even code.
    distance = (y.abs()[:, None] - codes).abs()
    nearest = distance == distance.amin(-1, keepdim=True)
    even = nearest & (torch.arange(8) % 2 == 0)
    want = torch.where(even.any(-1, keepdim=True), even, nearest).float().argmax(-1)
    assert torch.equal(values.abs(), codes[want])
    assert torch.equal(nibbles[: len(y)] >> 3, y.signbit().to(torch.uint8))
    assert len(nibbles.unique()) == 16


def test_zeros_and_what_is_not_finite(device, format):
    x = randn(6, 256, device=device)
    x[0] = 0
    x[1, 7] = torch.nan
    x[2, 3] = torch.inf
    weight = torch.ones(256, device=device)
    q, scale = gemma_norm.rms_norm_quant(x, weight, dtype=format, scale_group_size=64)
    largest = reference.QUANTIZED_LARGEST[format]
    assert (q[0].float() == 0).all()
    torch.testing.assert_close(scale[0], torch.full_like(scale[0], 1e-10 / largest), rtol=1e-6, atol=0)
    assert scale[1].isnan().all()
    assert scale[2].isnan().any()  # Inf / Inf
    if format is not torch.int8:
        assert q[1].float().isnan().all()
    assert (q[3:].float() * scale[3:].repeat_interleave(64, -1)).isfinite().all()
    weight[5] = torch.nan  # one element alone
    q, scale = gemma_norm.rms_norm_quant(x, weight, dtype=format, scale_group_size=64)
    assert scale[3].isnan().tolist() == [True, False, False, False]


def test_float4_without_nan(device):
    """A NaN is 6, and the scale tells. A scale that is rounded to 0 makes zeros."""
    x = torch.ones(2, 64, device=device)
    weight = torch.ones(64, device=device)
    weight[3], weight[16:32] = torch.nan, 1e-9
    for dtype in (torch.float8_e4m3fn, torch.float8_e8m0fnu, None):
        options = {"dtype": torch.float4_e2m1fn_x2, "scale_group_size": 16, "scale_dtype": dtype}
        q, scale = gemma_norm.rms_norm_quant(x, weight, **options)
        assert bits(q)[0, 1].item() >> 4 == 7
        assert scale.float()[0].isnan().tolist() == [True, False, False, False]
    q, scale = gemma_norm.rms_norm_quant(
        x, weight, dtype=torch.float4_e2m1fn_x2, scale_group_size=16, scale_dtype=torch.float8_e4m3fn
    )
    assert scale.float()[0, 1] == 0
    assert (bits(q)[0, 8:16] == 0).all()


def test_the_error_is_that_of_the_format(device, format):
    """q * scale is within half a unit of the format, at its largest, of the exact norm."""
    x, weight = randn(32, 4096, dtype=torch.bfloat16, device=device), make_weight(4096, torch.bfloat16, device, True)
    exact = reference.oracle(x, weight, gemma=True)
    unit = {torch.int8: 1 / 127, torch.float8_e5m2: 2**-2}.get(format, 2**-3)  # of the largest number of a group
    for group in (None, 128):
        q, scale = gemma_norm.rms_norm_quant(x, weight, gemma=True, dtype=format, scale_group_size=group)
        back = q.float() * scale.repeat_interleave(4096 // scale.shape[-1], -1)
        limit = exact.abs().unflatten(-1, (*scale.shape[-1:], -1)).amax(-1, keepdim=True) * unit / 2 * (1 + 1e-5)
        assert ((back.double() - exact).unflatten(-1, (*scale.shape[-1:], -1)).abs() <= limit).all()


def test_the_product_is_not_rounded_before(device, format):
    """Of a 16-bit x, what is quantised is y in float32: that of the same numbers in float32, up to its own rounding."""
    x, weight = randn(64, 512, dtype=torch.bfloat16, device=device), make_weight(512, torch.bfloat16, device, True)
    q, scale = gemma_norm.rms_norm_quant(x, weight, gemma=True, dtype=format)
    want, want_scale = gemma_norm.rms_norm_quant(x.float(), weight.float(), gemma=True, dtype=format)
    rounded, _ = gemma_norm.rms_norm_quant(x, weight, gemma=True, dtype=format, round_first=True)
    torch.testing.assert_close(scale, want_scale, rtol=1e-6, atol=0)
    different = (bits(q) != bits(want)).sum().item()
    assert different < 1e-4 * q.numel()
    assert (bits(rounded) != bits(want)).sum().item() > 10 * max(different, 1)


@pytest.mark.parametrize("global_scale", [0.02, -0.02, 0.0, -0.0, 1e-30, 1e30, torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.float4_e2m1fn_x2, torch.float8_e4m3fn])
def test_any_global_scale(device, dtype, global_scale):
    x = randn(3, 64, device=device)
    scheme = {"scale_group_size": 16, "scale_dtype": torch.float8_e4m3fn}
    scheme["global_scale"] = torch.tensor(global_scale, device=device)
    q, scale = gemma_norm.rms_norm_quant(x, dtype=dtype, **scheme)
    want, want_scale = reference.quantize(gemma_norm.rms_norm(x), None, dtype, **scheme)
    assert_equal_or_nan(scale.float(), want_scale.float())
    if dtype is torch.float8_e4m3fn:
        assert_equal_or_nan(q.float(), want.float())
    else:
        assert torch.equal(bits(q), bits(want))


def assert_equal_or_nan(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bound", [1.0, 0.0, -0.0, -1.0, -torch.inf, torch.inf, torch.nan, -torch.nan])
def test_any_bound(device, bound):
    x, bound = randn(3, 256, device=device), torch.tensor(bound, device=device)
    q, scale = gemma_norm.rms_norm_quant(x, scale_ub=bound)
    assert_quantised(gemma_norm.rms_norm(x), q, scale, torch.float8_e4m3fn, {"scale_ub": bound})


@pytest.mark.parametrize("shape", [(3, 128), (5, 3, 768), (128,), (0, 768), (2, 0, 768), (1, 1, 64)], ids=str)
def test_packed_scales_have_columns_at_multiples_of_16_bytes(device, shape):
    x, options = randn(*shape, device=device), {"scale_group_size": 32, "scale_dtype": torch.int32}
    _, scale = gemma_norm.rms_norm_quant(x, **options)
    rows = max(1, x[..., 0].numel())
    assert scale.stride(-1) == rows + -rows % 4
    _, of_definition = reference.rms_norm_quant(x, **options)
    _, on_meta = gemma_norm.rms_norm_quant(x.to("meta"), **options)
    assert scale.stride() == of_definition.stride() == on_meta.stride()
    assert torch.equal(scale, of_definition)
