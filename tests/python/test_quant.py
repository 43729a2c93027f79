"""All that is tested of the operators that quantise: bits, scales, special numbers, refusals, transforms.

Their y is that of the operators that do not quantise, bit for bit. In float32, and with round_first in any dtype, that
y can be seen, and the definition (reference.quantize), applied to it, gives every bit of q and of the scales.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext as nothing
from typing import Any

import pytest
import torch
from torch import Tensor

import gemma_norm
from gemma_norm import _registry, reference
from support import LAYOUTS, assert_same_bits, make_weight, place, randn

OPS = torch.ops.gemma_norm
FORMATS = tuple(dtype for dtype in reference.QUANTIZED_LARGEST if dtype is not torch.float4_e2m1fn_x2)
SCHEMES: dict[str, dict[str, Any]] = {
    "token": {},
    "groups of 64": {"scale_group_size": 64},
    "groups of 128, column-major": {"scale_group_size": 128, "column_major_scale": True},
    "groups of 128, powers of two": {"scale_group_size": 128, "scale_ue8m0": True},
    "bounded": {"scale_ub": 1.25},
    "groups of 32, exponents": {"scale_group_size": 32, "scale_dtype": torch.float8_e8m0fnu},
    "groups of 64, four exponents": {"scale_group_size": 64, "scale_dtype": torch.int32},
    "groups of 128, float8": {"scale_group_size": 128, "scale_dtype": torch.float8_e4m3fn, "global_scale": 0.37},
    "given": {"scale": 0.011},
}
FLOAT4 = {
    "MXFP4": {"scale_group_size": 32, "scale_dtype": torch.float8_e8m0fnu},
    "NVFP4": {"scale_group_size": 16, "scale_dtype": torch.float8_e4m3fn, "global_scale": 0.02},
    "NVFP4, no global scale": {"scale_group_size": 16, "scale_dtype": torch.float8_e4m3fn, "column_major_scale": True},
    "large groups": {"scale_group_size": 128},
    "four exponents": {"scale_group_size": 48, "scale_dtype": torch.int32, "scale_ub": 1.5},
}
NUMBERS = ("scale", "scale_ub", "global_scale")
# A row of each kind of kernel: on lanes of a wave, in a block, and with groups that begin in the middle of a thread's.
SHAPES = [(3, 128), (2, 3, 1024), (5, 2560), (1, 4096), (2, 5376), (1, 8320), (1, 16384)]


@pytest.fixture(params=FORMATS, ids=lambda dtype: str(dtype)[6:])
def format(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=SCHEMES.values(), ids=SCHEMES)
def scheme(request: pytest.FixtureRequest, device: str) -> dict[str, Any]:
    return on_device(request.param, device)


def on_device(scheme: dict[str, Any], device: str) -> dict[str, Any]:
    return {k: torch.tensor(v, device=device) if k in NUMBERS else v for k, v in scheme.items()}


def bits(t: Tensor) -> Tensor:
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.dtype.itemsize])


def strides(t: Tensor) -> list[int]:
    """Those that count: a dimension of one element may have any, and so may a tensor of none."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1 and t.numel()]


def assert_quantised(y: Tensor, q: Tensor, scale: Tensor, format: torch.dtype, scheme: dict[str, Any]) -> None:
    """q and scale have every bit of the definition, applied to y in float32."""
    want = reference.quantize(y.float(), scheme.get("scale"), format, *(scheme.get(k, d) for k, d in DEFAULTS.items()))
    assert q.dtype is format
    assert q.is_contiguous()
    assert torch.equal(bits(q), bits(want[0]))
    if "scale" in scheme:
        assert scale is scheme["scale"]
    else:
        assert scale.dtype is want[1].dtype is (scheme.get("scale_dtype") or torch.float32)
        assert scale.shape == want[1].shape
        assert strides(scale) == strides(want[1])
        assert torch.equal(bits(scale), bits(want[1]))


DEFAULTS = {
    "scale_group_size": None,
    "scale_ub": None,
    "scale_ue8m0": False,
    "column_major_scale": False,
    "scale_dtype": None,
    "global_scale": None,
}


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


def place_last(values: Tensor) -> Tensor:
    """The same values, and gaps of 13 elements between rows, so that rows are not aligned, unless there is one."""
    return torch.nn.functional.pad(values, (0, 13))[..., : values.shape[-1]]


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


@pytest.mark.parametrize("size", [None, 256, 96])
def test_a_scale_belongs_to_one_norm(device, size):
    x = randn(3, 768, device=device)
    with pytest.raises(RuntimeError) as error:
        gemma_norm.gated_rms_norm_quant(x, x, x[0].contiguous(), group_size=128, scale_group_size=size)
    assert str(error.value) == f"gated_rms_norm_quant: scale_group_size must divide group_size 128, got {size}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [96, 127, 128])
def test_any_layout(device, dtype, layout, size):
    x = place(randn(5, 6, size, dtype=dtype, device=device), layout).view
    for group in (None, size, 32 if size % 32 == 0 else 1):
        q, scale = gemma_norm.rms_norm_quant(x, scale_group_size=group, round_first=True)
        scheme = {"scale_group_size": group}
        assert_quantised(gemma_norm.rms_norm(x), q, scale, torch.float8_e4m3fn, scheme)


@pytest.mark.parametrize("hidden", [1, 5, 33, 20000, 70000, 140000])
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


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 128), (64,)], ids=str)
def test_no_rows_and_one(device, shape, scheme):
    q, scale = gemma_norm.rms_norm_quant(
        randn(*shape, device=device), **{**scheme, "scale_group_size": None} if "scale" not in scheme else scheme
    )
    assert q.shape == shape
    assert "scale" in scheme or scale.shape == (*shape[:-1], 1)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": (
        {"dtype": torch.float16},
        "dtype must be float8_e4m3fn, float8_e4m3fnuz, float8_e5m2, int8 or float4_e2m1fn_x2, got float16",
    ),
    "scale dtype": (
        {"scale_dtype": torch.int8},
        "scale_dtype must be float32, float8_e8m0fnu, float8_e4m3fn or int32, got int8",
    ),
    "no scale dtype": ({"scale_dtype": 32}, "scale_dtype must be a torch.dtype or None, got 32"),
    "two kinds of scales": (
        {"scale_dtype": torch.float8_e4m3fn, "scale_ue8m0": True},
        "scale_ue8m0 must be False with scale_dtype=float8_e4m3fn, got True",
    ),
    "global scale": (
        {"global_scale": torch.ones(1)},
        "global_scale must be None unless scale_dtype is float8_e4m3fn, got a tensor",
    ),
    "float4 a row": (
        {"dtype": torch.float4_e2m1fn_x2},
        "scale_group_size must be a multiple of 16 with float4_e2m1fn_x2, got None",
    ),
    "float4 in eights": (
        {"dtype": torch.float4_e2m1fn_x2, "scale_group_size": 8},
        "scale_group_size must be a multiple of 16 with float4_e2m1fn_x2, got 8",
    ),
    "float4 with a scale": (
        {"dtype": torch.float4_e2m1fn_x2, "scale": torch.ones(1)},
        "scale must be None with float4_e2m1fn_x2, got a tensor",
    ),
    "return_y": ({"return_y": 1}, "return_y must be a bool, got 1"),
    "no dtype": ({"dtype": "float8"}, "dtype must be a torch.dtype or None, got 'float8'"),
    "group size": ({"scale_group_size": 5}, "scale_group_size must divide x's last dimension 64, got 5"),
    "group of none": ({"scale_group_size": 0}, "scale_group_size must divide x's last dimension 64, got 0"),
    "scale: two": ({"scale": torch.ones(2)}, "scale must have one element, got shape [2]"),
    "scale: float64": ({"scale": torch.ones(1).double()}, "scale must have dtype float32, got float64"),
    "scale: number": ({"scale": 0.5}, "scale must be a tensor, got 0.5"),
    "scale_ub: none": ({"scale_ub": torch.ones(0)}, "scale_ub must have one element, got shape [0]"),
    "two scales": (
        {"scale": torch.ones(1), "scale_group_size": 8},
        "scale_group_size must be None with a scale, got 8",
    ),
    "flag": ({"round_first": "yes"}, "round_first must be a bool, got 'yes'"),
    "weight": ({"weight": torch.ones(63)}, "weight must have shape [64], got [63]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(device, name):
    replaced, message = BAD[name]
    replaced = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in replaced.items()}
    x, residual = randn(4, 64, device=device), randn(4, 64, device=device, seed=1)
    for function, extra in (
        (gemma_norm.rms_norm_quant, {}),
        (gemma_norm.add_rms_norm_quant, {"residual": residual}),
        (gemma_norm.fused_add_rms_norm_quant, {"residual": residual}),
    ):
        before = residual.clone()
        with pytest.raises(RuntimeError) as error:
            function(x, **extra, **replaced)
        assert str(error.value).startswith(f"{function.__name__}: {message}")
        assert torch.equal(residual, before)


OVERLOADS = {
    f"{name}{y}.{overload}": (name + y, overload)
    for name in ("rms_norm_quant", "add_rms_norm_quant", "fused_add_rms_norm_quant", "gated_rms_norm_quant")
    for y in ("", "_y")
    for overload in ("default", "static")
}


def function_of(name: str) -> Callable[..., Any]:
    return getattr(gemma_norm, name.removesuffix("_y"))


def operands(name: str, overload: str, device: str, rows: int = 4) -> dict[str, Any]:
    """Arguments of the overload."""
    given: dict[str, Any] = {"x": randn(rows, 64, dtype=torch.bfloat16, device=device)}
    if "add" in name:
        given["residual"] = randn(rows, 64, device=device, seed=1)
    if "gated" in name:
        given["gate"] = randn(rows, 64, dtype=torch.bfloat16, device=device, seed=2)
    given["weight"] = make_weight(64, torch.bfloat16, device, True)
    if "static" in overload:
        return {**given, "scale": torch.full((1,), 0.02, device=device)}
    return {**given, "scale_group_size": 32, "column_major_scale": True, "dtype": torch.int8}


def arguments(name: str, overload: str, device: str, rows: int = 4) -> dict[str, Any]:
    """Arguments with which the function calls the overload."""
    return {**operands(name, overload, device, rows), "return_y": name.endswith("_y")}


@pytest.fixture(params=OVERLOADS.values(), ids=OVERLOADS)
def overload(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


PLACED = ("x", "residual", "gate")


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


def test_vmap(device):
    x, weight = randn(3, 5, 64, device=device), randn(64, device=device)
    q, scale = torch.func.vmap(lambda x: gemma_norm.rms_norm_quant(x, weight, dtype=torch.int8))(x)
    want, want_scale = gemma_norm.rms_norm_quant(x, weight, dtype=torch.int8)
    assert (q.float() - want.float()).abs().max() <= 1
    torch.testing.assert_close(scale, want_scale)


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


@pytest.mark.parametrize("bound", [1.0, 0.0, -0.0, -1.0, -torch.inf, torch.inf, torch.nan, -torch.nan])
def test_any_bound(device, bound):
    x, bound = randn(3, 256, device=device), torch.tensor(bound, device=device)
    q, scale = gemma_norm.rms_norm_quant(x, scale_ub=bound)
    assert_quantised(gemma_norm.rms_norm(x), q, scale, torch.float8_e4m3fn, {"scale_ub": bound})


def test_meta_tensors(overload):
    given = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments(*overload, "cpu").items()}
    real = function_of(overload[0])(**arguments(*overload, "cpu"))
    for a, b in zip(function_of(overload[0])(**given), real, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())


def test_the_sum_must_not_overlap_x(device):
    x = randn(4, 64, device=device)
    with pytest.raises(RuntimeError, match="overlap"):
        gemma_norm.fused_add_rms_norm_quant(x[:3], x[1:])
