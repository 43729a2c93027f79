"""qk_norm_rope and its fused form: values, memory, positions. Its derivatives and what is refused are in other files.

With round_rotation the operator is rms_norm and what transformers, or with float32 angles PyTorch's promotion of types,
computes after it. So it must have their bits.
"""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

import gemma_norm
from gemma_norm import reference
from rope_support import Arguments, good, rotate_half, rotate_neighbours, rotated, tensors, with_cache
from support import DTYPES, LAYOUTS, assert_same_bits, place, randn

# Full and partial rotation; heads of the models, and some that no vector divides.
SIZES = [(64, 64), (128, 128), (256, 64), (512, 512), (96, 32), (20, 6), (7, 2), (500, 250)]
MODES: dict[str, Arguments] = {"plain": {}, "gemma": {"gemma": True}, "each step rounded": {"round_each_step": True}}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "rotary"), SIZES)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_the_bits_of_the_steps(device, dtype, head_dim, rotary, mode):
    for angles_dtype, interleaved in product((dtype, torch.float32), (False, True)):
        a = tensors((2, 5), (4, 2), head_dim, rotary, dtype, device, "gemma" in mode, angles_dtype)
        got = gemma_norm.qk_norm_rope(**a, **mode, interleaved=interleaved, round_rotation=True)
        for y, x, weight in zip(got, (a["q"], a["k"]), (a["q_weight"], a["k_weight"]), strict=True):
            n = gemma_norm.rms_norm(x, weight, **mode)
            assert_same_bits(y, rotated(n, a["cos"], a["sin"], interleaved).to(dtype))
            assert y.is_contiguous()


def assert_right(y: Tensor, x: Tensor, weight: Tensor | None, a: Arguments, gemma: bool, interleaved: bool) -> None:
    """y is the definition, rounded once: half a unit, and the float32 errors of the norm, two products and a sum."""
    n = reference.oracle(x, weight, 1e-6, gemma)
    cos, sin = a["cos"].double(), a["sin"].double()
    exact = rotated(n, cos, sin, interleaved)
    terms = rotated(n.abs(), cos.abs(), torch.zeros_like(sin), interleaved)
    turn = rotate_neighbours if interleaved else rotate_half
    rotary = cos.shape[-1]
    terms[..., :rotary] += (turn(n[..., :rotary]) * sin.unsqueeze(-2)).abs()
    units = reference.max_ulp_error(torch.float32, x.shape[-1]) + 3
    off = units * torch.finfo(torch.float32).eps * terms
    info = torch.finfo(y.dtype)
    _, exponent = torch.frexp((exact.abs() + off).clamp(info.tiny, info.max))
    half_a_unit = torch.ldexp(torch.full_like(exact, info.eps / 2), exponent - 1)
    assert bool(((y.double() - exact).abs() <= half_a_unit + off).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "rotary"), SIZES)
def test_right_rounded_once(device, dtype, head_dim, rotary):
    for gemma, interleaved, weight_dtype, angles_dtype in (
        (True, False, dtype, dtype),
        (False, True, torch.float32, torch.float32),
        (False, False, None, torch.float32),
        (True, True, torch.float32, dtype),
    ):
        a = tensors((7,), (3, 1), head_dim, rotary, dtype, device, gemma, angles_dtype)
        for name in ("q_weight", "k_weight"):
            a[name] = None if weight_dtype is None else a[name].to(weight_dtype)
        y, z = gemma_norm.qk_norm_rope(**a, gemma=gemma, interleaved=interleaved)
        assert_right(y, a["q"], a["q_weight"], a, gemma, interleaved)
        assert_right(z, a["k"], a["k_weight"], a, gemma, interleaved)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides_read_and_written_in_place(device, layout, dtype):
    a = tensors((6,), (4, 2), 128, 32, dtype, device)
    want = gemma_norm.qk_norm_rope(**a)
    q, k = place(a["q"], layout), place(a["k"], layout)
    for y, w in zip(gemma_norm.qk_norm_rope(**a | {"q": q.view, "k": k.view}), want, strict=True):
        assert_same_bits(y, w)
    gemma_norm.fused_qk_norm_rope(**a | {"q": q.view, "k": k.view})
    for placed, w in ((q, want[0]), (k, want[1])):
        assert_same_bits(placed.view, w)
        placed.assert_gaps_intact()


@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (7, 3), (32, 8), (128, 1), (128, 128)], ids=str)
@pytest.mark.parametrize(("head_dim", "rotary"), [(64, 64), (256, 64), (512, 128)])
def test_any_number_of_heads_in_a_fused_qkv(device, heads, head_dim, rotary):
    """As many heads of v lie behind those of k. In place, v stays as it is."""
    a = tensors((5,), heads, head_dim, rotary, torch.bfloat16, device)
    v = randn(5, heads[1], head_dim, dtype=torch.bfloat16, device=device, seed=4)
    qkv = torch.cat((a["q"], a["k"], v), dim=1)
    q, k, rest = qkv.split([heads[0], heads[1], heads[1]], dim=1)
    got = gemma_norm.qk_norm_rope(**a | {"q": q, "k": k}, round_rotation=True)
    for y, x, weight in zip(got, (a["q"], a["k"]), (a["q_weight"], a["k_weight"]), strict=True):
        assert_same_bits(y, rotated(gemma_norm.rms_norm(x, weight), a["cos"], a["sin"]))
        assert y.is_contiguous()
    gemma_norm.fused_qk_norm_rope(**a | {"q": q, "k": k}, round_rotation=True)
    for y, want in zip((q, k, rest), (*got, v), strict=True):
        assert_same_bits(y, want)


@pytest.mark.parametrize("tokens", [(), (1,), (0,), (2, 3), (2, 3, 2, 2), (300,)], ids=str)
def test_any_number_of_tokens_and_their_broadcasting(device, tokens):
    a = tensors(tokens, (3, 2), 64, 32, torch.bfloat16, device)
    want = reference.qk_norm_rope(**a)
    got = gemma_norm.qk_norm_rope(**a)
    torch.testing.assert_close(got, want, rtol=0.01, atol=0.01)
    if tokens == (2, 3, 2, 2):  # more dimensions than a kernel takes, by strides that cannot be merged
        turned = {n: a[n].transpose(0, 3).contiguous().transpose(0, 3) for n in ("q", "cos")}
        for y, w in zip(gemma_norm.qk_norm_rope(**a | turned), got, strict=True):
            assert_same_bits(y, w)
    if tokens == (2, 3):  # what transformers passes for a batch
        one = {"cos": a["cos"][:1], "sin": a["sin"][:1]}
        full = {n: t.expand(2, 3, -1).contiguous() for n, t in one.items()}
        want = gemma_norm.qk_norm_rope(**a | full)
        for angles in (one, {n: t[0] for n, t in one.items()}):
            for y, w in zip(gemma_norm.qk_norm_rope(**a | angles), want, strict=True):
                assert_same_bits(y, w)


@pytest.mark.parametrize("tokens", [(0,), (3, 0)], ids=str)
@pytest.mark.parametrize("axes", [(), (3,)], ids=["one position", "three positions"])
@pytest.mark.parametrize("on", ["device", "meta"])
def test_one_position_for_no_tokens(device, tokens, axes, on):
    where = device if on == "device" else "meta"
    q, k = (torch.empty(*tokens, heads, 64, device=where) for heads in (4, 2))
    cache = torch.empty(10, 64, device=where)
    sections = {"mrope_section": [16, 8, 8]} if axes else {}
    for shape in ((), (1,) * len(tokens)):
        positions = torch.zeros((*axes, *shape), dtype=torch.int64, device=where)
        y, z = gemma_norm.qk_norm_rope(q, k, None, None, cos_sin_cache=cache, positions=positions, **sections)
        assert (y.shape, z.shape) == (q.shape, k.shape)
        gemma_norm.fused_qk_norm_rope(q, k, None, None, cos_sin_cache=cache, positions=positions, **sections)


SECTIONS: dict[str, Arguments] = {
    "one position": {},
    "sections": {"mrope_section": [3, 4, 5]},
    "Qwen3-VL": {"mrope_section": [4, 4, 4], "mrope_interleaved": True},
    "Qwen3.5": {"mrope_section": [6, 3, 3], "mrope_interleaved": True},
}


def vllm_mrope(rows: Tensor, mrope_section: list[int], mrope_interleaved: bool = False) -> Tensor:
    """What vLLM's MRotaryEmbedding makes of the cosines, or the sines, of three positions."""
    if not mrope_interleaved:
        return torch.cat([m[i] for i, m in enumerate(rows.split(mrope_section, dim=-1))], dim=-1)
    result = rows[0].clone()
    result[..., 1 : mrope_section[1] * 3 : 3] = rows[1, ..., 1 : mrope_section[1] * 3 : 3]
    result[..., 2 : mrope_section[2] * 3 : 3] = rows[2, ..., 2 : mrope_section[2] * 3 : 3]
    return result


@pytest.mark.parametrize("sections", SECTIONS.values(), ids=SECTIONS)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_a_cache_with_positions(device, sections, index):
    """The cosines and sines of the engines' caches, gathered, give the same bits."""
    for dtype, angles_dtype, tokens in (
        (torch.bfloat16, torch.float32, (9,)),
        (torch.float32, torch.float32, (2, 4)),
        (torch.float16, torch.float16, (3,)),
    ):
        a = tensors(tokens, (4, 2), 64, 24, dtype, device)
        cache = randn(13, 24 + 5, dtype=angles_dtype, device=device, seed=7)[:, :24]
        generator = torch.Generator().manual_seed(1)
        shape = (3, *tokens) if sections else tokens
        positions = torch.randint(0, 13, shape, generator=generator, dtype=index).to(device)
        rows = cache[positions.long()]
        cos, sin = rows.chunk(2, dim=-1)
        if sections:
            cos, sin = vllm_mrope(cos, **sections), vllm_mrope(sin, **sections)
        for interleaved in (False, True):
            both = [t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), dim=-1) for t in (cos, sin)]
            want = gemma_norm.qk_norm_rope(**a | {"cos": both[0], "sin": both[1]}, interleaved=interleaved)
            arguments = with_cache(a, cache, positions)
            for y, w in zip(
                gemma_norm.qk_norm_rope(**arguments, **sections, interleaved=interleaved), want, strict=True
            ):
                assert_same_bits(y, w)
            torch.testing.assert_close(
                reference.qk_norm_rope(**arguments, **sections, interleaved=interleaved), want, rtol=0.02, atol=0.02
            )


def test_a_position_that_the_cache_lacks(device):
    a = tensors((4,), device=device)
    cache = randn(5, 64, device=device)
    for bad in (-1, 5, 2**40):
        positions = torch.tensor([0, 4, bad, 1], device=device)
        arguments = with_cache(a, cache, positions)
        if device == "cpu":
            rule = r"positions must be at least 0 and less than cos_sin_cache's 5 rows"
            before = a["q"].clone()
            with pytest.raises(RuntimeError, match=f"^fused_qk_norm_rope: {rule}, got {bad}$"):
                gemma_norm.fused_qk_norm_rope(**arguments)
            assert_same_bits(a["q"], before)
        else:
            want = gemma_norm.qk_norm_rope(**arguments | {"positions": positions.clamp(0, 4)})
            for y, w in zip(gemma_norm.qk_norm_rope(**arguments), want, strict=True):
                assert_same_bits(y, w)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_stay_in_their_head(device, dtype, value):
    a = tensors((3,), (2, 2), 64, 32, dtype, device)
    want = gemma_norm.qk_norm_rope(**a)[0]
    a["q"][1, 1, 5] = value
    got = gemma_norm.qk_norm_rope(**a)[0]
    torch.testing.assert_close(got, reference.qk_norm_rope(**a)[0], equal_nan=True, rtol=0.01, atol=0.01)
    assert bool(got[1, 1, 5].isnan())
    got[1, 1] = want[1, 1]
    assert_same_bits(got, want)
    a["q"][1, 1, 5] = 1
    payload = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32).to(device)  # lost if cut to 16 bits
    for name in ("cos", "q_weight"):
        changed = {n: t.float() if n != "q" and n != "k" else t for n, t in a.items()}
        changed[name] = changed[name].clone()
        changed[name][..., 3] = payload
        assert bool(gemma_norm.qk_norm_rope(**changed)[0][..., 3].isnan().all())


def test_the_function_takes_no_detour_in_inference():
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gemma_norm.qk_norm_rope(**good())
    assert [e.name for e in profile.events() if e.name.startswith("gemma_norm")] == ["gemma_norm::_qk_norm_rope"]
