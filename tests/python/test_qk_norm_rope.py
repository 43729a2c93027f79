"""All that is tested of qk_norm_rope and its fused form: values, gradients, transforms, memory, what is refused.

With round_rotation the operator is rms_norm and what transformers computes after it. So it must have their bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, ones

import gemma_norm
from gemma_norm import _registry, reference
from support import DTYPES, LAYOUTS, assert_same_bits, make_weight, place, randn, warnings_are

OPS = torch.ops.gemma_norm
OP, FUSED = OPS.qk_norm_rope.default, OPS.fused_qk_norm_rope.default
Arguments = dict[str, Any]


def rotate_half(x: Tensor) -> Tensor:
    """That of transformers' models."""
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def rotate_neighbours(x: Tensor) -> Tensor:
    """rotate_half of transformers' Cohere."""
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def rotated(n: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """apply_rotary_pos_emb of transformers' Qwen3.5, for n of [..., heads, head_dim]."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    turned, rest = n[..., : cos.shape[-1]], n[..., cos.shape[-1] :]
    turn = rotate_neighbours if interleaved else rotate_half
    return torch.cat((turned * cos + turn(turned) * sin, rest), dim=-1)


def tensors(
    tokens: tuple[int, ...] = (5,),
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    rotary: int = 64,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    gemma: bool = False,
    angles_dtype: torch.dtype | None = None,
) -> Arguments:
    """The cosines and sines are those of no angle, and differ between the halves: none can be taken for another."""
    make = functools.partial(randn, device=device)
    return {
        "q": make(*tokens, heads[0], head_dim, dtype=dtype, seed=0),
        "k": make(*tokens, heads[1], head_dim, dtype=dtype, seed=1),
        "q_weight": make_weight(head_dim, dtype, device, gemma),
        "k_weight": make_weight(head_dim, dtype, device, gemma).flip(0),
        "cos": make(*tokens, rotary, dtype=angles_dtype or dtype, seed=2),
        "sin": make(*tokens, rotary, dtype=angles_dtype or dtype, seed=3),
    }


def in_turn(a: Arguments) -> tuple[Tensor, ...]:
    return tuple(a.values())


# Full and partial rotation; heads of the models, and some that no vector divides.
SIZES = [(64, 64), (128, 128), (256, 64), (512, 512), (96, 32), (20, 6), (7, 2), (500, 250)]
MODES: dict[str, Arguments] = {"plain": {}, "gemma": {"gemma": True}, "each step rounded": {"round_each_step": True}}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "rotary"), SIZES)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_the_bits_of_the_steps(device, dtype, head_dim, rotary, mode):
    a = tensors((2, 5), (4, 2), head_dim, rotary, dtype, device, "gemma" in mode)
    for interleaved in (False, True):
        got = gemma_norm.qk_norm_rope(**a, **mode, interleaved=interleaved, round_rotation=True)
        for y, x, weight in zip(got, (a["q"], a["k"]), (a["q_weight"], a["k_weight"]), strict=True):
            n = gemma_norm.rms_norm(x, weight, **mode)
            assert_same_bits(y, rotated(n, a["cos"], a["sin"], interleaved))
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


def with_cache(a: Arguments, cache: Tensor, positions: Tensor) -> Arguments:
    return {n: t for n, t in a.items() if n not in ("cos", "sin")} | {"cos_sin_cache": cache, "positions": positions}


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


def loss(y: Tensor, z: Tensor) -> Tensor:
    return (y.sin().sum() * z.cos().sum()).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_gradients(device, dtype, interleaved, cached):
    """Beside those of the definition in float64."""
    a = tensors((3, 4), (4, 2), 64, 24, dtype, device, gemma=True)
    if cached:
        a = with_cache(a, randn(9, 24, dtype=dtype, device=device), torch.arange(12, device=device).view(3, 4) % 9)
    options = {"gemma": True, "interleaved": interleaved}
    floats = [n for n, t in a.items() if t.is_floating_point()]
    exact = {n: t.double().requires_grad_() if n in floats else t for n, t in a.items()}
    dy = [randn(*a[n].shape, dtype=dtype, device=device, seed=5) for n in ("q", "k")]
    with pytest.MonkeyPatch.context() as patch:  # the definition in float64
        patch.setattr(Tensor, "float", Tensor.double)
        results = reference.qk_norm_rope(**exact, **options)
    want = torch.autograd.grad(results, [exact[n] for n in floats], [d.double() for d in dy])
    leaves = {n: t.clone().requires_grad_() if n in floats else t for n, t in a.items()}
    got = torch.autograd.grad(gemma_norm.qk_norm_rope(**leaves, **options), [leaves[n] for n in floats], dy)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for name, g, w in zip(floats, got, want, strict=True):
        assert g.dtype == a[name].dtype and g.shape == a[name].shape
        torch.testing.assert_close(g.double(), w, rtol=tolerance, atol=tolerance * float(w.abs().max()))
    # One at a time, and of one result alone.
    for i, name in enumerate(floats):
        alone = a | {name: a[name].clone().requires_grad_()}
        (one,) = torch.autograd.grad(gemma_norm.qk_norm_rope(**alone, **options), alone[name], dy)
        torch.testing.assert_close(one, got[i], rtol=tolerance, atol=tolerance * float(want[i].abs().max()))
    y, _ = gemma_norm.qk_norm_rope(**leaves, **options)
    assert torch.autograd.grad(y.sum(), leaves["k"], allow_unused=True) == (None,)


def test_double_backward(device):
    a = {n: t.requires_grad_() for n, t in tensors((2,), (2, 1), 16, 8, device=device).items()}

    def second(function: Callable[..., Any]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(loss(*function(**a)), in_turn(a), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), in_turn(a))

    torch.testing.assert_close(second(gemma_norm.qk_norm_rope), second(reference.qk_norm_rope), rtol=1e-3, atol=1e-3)


def test_transforms(device):
    a = tensors((3, 2), (2, 1), 16, 8, device=device)

    def of(function: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda q, k: loss(*function(q, k, a["q_weight"], a["k_weight"], a["cos"][0], a["sin"][0]))

    q, k = a["q"], a["k"]
    for transform in (
        lambda f: torch.func.grad(f, argnums=(0, 1))(q[0], k[0]),
        lambda f: torch.func.jvp(f, (q[0], k[0]), (q[1], k[1])),
        lambda f: torch.func.vmap(torch.func.grad(f))(q, k),
    ):
        torch.testing.assert_close(transform(of(gemma_norm.qk_norm_rope)), transform(of(reference.qk_norm_rope)))


@pytest.mark.parametrize("cached", [False, True])
def test_opcheck(device, cached):
    a = tensors((4,), (3, 2), 32, 16, device=device)
    options: Arguments = {"gemma": True}
    if cached:
        a = with_cache(a, randn(6, 16, device=device), torch.ones(3, 4, dtype=torch.long, device=device))
        options |= {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
    torch.library.opcheck(OP, (), {**a, **options})
    graded = {n: t.clone().requires_grad_() if n in ("q", "k", "q_weight", "k_weight") else t for n, t in a.items()}
    torch.library.opcheck(OP, (), {**graded, **options})
    torch.library.opcheck(FUSED, (), {**{n: t.clone() for n, t in a.items()}, **options})


def test_torch_compile(device):
    a = {n: t.requires_grad_() for n, t in tensors((5,), (3, 2), 32, 16, device=device).items()}

    def step(q: Tensor, k: Tensor, *rest: Tensor) -> Tensor:
        y, z = gemma_norm.qk_norm_rope(q * 2, k, *rest, gemma=True)
        with torch.no_grad():
            u, v = y.clone(), z.clone()
            gemma_norm.fused_qk_norm_rope(u, v, *rest, gemma=True)
        return (y.sin() * u).sum() + (z * v).sum()

    leaves = in_turn(a)[:4]
    want = torch.autograd.grad(step(*in_turn(a)), leaves)
    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*in_turn(a)), leaves)
    torch.testing.assert_close(got, want)


def test_meta_tensors_have_the_shapes_of_q_and_k():
    a = {n: t.to("meta") for n, t in tensors((4,), (3, 2), 48, 16, torch.float16).items()}
    for result, name in zip(gemma_norm.qk_norm_rope(**a), ("q", "k"), strict=True):
        assert (result.shape, result.dtype, result.device.type) == (a[name].shape, torch.float16, "meta")


def good() -> Arguments:
    return {
        "q": ones(3, 4, 16),
        "k": ones(3, 2, 16),
        "q_weight": ones(16),
        "k_weight": ones(16),
        "cos": ones(3, 8),
        "sin": ones(3, 8),
    }


def positions_of(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def cache(positions: Callable[[], Tensor] = lambda: positions_of(3), **more: Any) -> Callable[[], Arguments]:
    return lambda: {"cos": None, "sin": None, "cos_sin_cache": ones(5, 8), "positions": positions(), **more}


EVEN = "must have a last dimension that is even and from 2 to q's 16, got shape"
EITHER = "either cos and sin or cos_sin_cache and positions must be given, got"
SECTION = "mrope_section must be three sizes that add up to half of cos_sin_cache's last dimension, 4, got"
BAD: dict[str, tuple[str, Callable[[], Arguments]]] = {
    "q: one dimension": (
        "q must have at least two dimensions, heads and their elements, got shape [16]",
        lambda: {"q": ones(16)},
    ),
    "q: long": (
        "q must have a last dimension of 1 to 512, got shape [3, 4, 513]",
        lambda: {"q": ones(3, 4, 513)},
    ),
    "q: dtype": (
        "q must have dtype float32, float16 or bfloat16, got int64",
        lambda: {"q": ones(3, 4, 16, dtype=torch.int64)},
    ),
    "q: no head": ("q must have at least one head, got shape [3, 0, 16]", lambda: {"q": ones(3, 0, 16)}),
    "q: strided": (
        "q must have a contiguous last dimension (stride 1), got stride 2",
        lambda: {"q": ones(3, 4, 32)[..., ::2]},
    ),
    "q_weight: dtype": (
        "q_weight must have dtype float32, float16 or bfloat16, got float64",
        lambda: {"q_weight": ones(16).double()},
    ),
    "q_weight: shape": ("q_weight must have shape [16], got [8]", lambda: {"q_weight": ones(8)}),
    "k: tokens": (
        "k must have q's shape [3, 4, 16], but for the number of heads, got [2, 2, 16]",
        lambda: {"k": ones(2, 2, 16)},
    ),
    "k: head_dim": (
        "k must have q's shape [3, 4, 16], but for the number of heads, got [3, 2, 8]",
        lambda: {"k": ones(3, 2, 8)},
    ),
    "k: dtype": ("k must have q's dtype float32, got float16", lambda: {"k": ones(3, 2, 16).half()}),
    "k: no head": ("k must have at least one head, got shape [3, 0, 16]", lambda: {"k": ones(3, 0, 16)}),
    "k_weight: dtype": (
        "k_weight must have q_weight's dtype float32, got float16",
        lambda: {"k_weight": ones(16).half()},
    ),
    "one weight": (
        "q_weight and k_weight must both be given or both be None, got one of them",
        lambda: {"k_weight": None},
    ),
    "the other weight": (
        "q_weight and k_weight must both be given or both be None, got one of them",
        lambda: {"q_weight": None},
    ),
    "cos: tokens": ("cos must have shape [3, rotary], got [4, 8]", lambda: {"cos": ones(4, 8)}),
    "cos: heads": ("cos must have shape [3, rotary], got [3, 1, 8]", lambda: {"cos": ones(3, 1, 8)}),
    "cos: odd": (f"cos {EVEN} [3, 7]", lambda: {"cos": ones(3, 7)}),
    "cos: wide": (f"cos {EVEN} [3, 18]", lambda: {"cos": ones(3, 18)}),
    "cos: none": (f"cos {EVEN} [3, 0]", lambda: {"cos": ones(3, 0)}),
    "cos: dtype": ("cos must have dtype float32, got float16", lambda: {"cos": ones(3, 8).half()}),
    "sin: shape": ("sin must have cos's shape [3, 8], got [3, 6]", lambda: {"sin": ones(3, 6)}),
    "sin: dtype": (
        "sin must have cos's dtype float32, got float16",
        lambda: {"sin": ones(3, 8).half()},
    ),
    "no sin": (f"{EITHER} cos", lambda: {"sin": None}),
    "no angles": (f"{EITHER} none", lambda: {"cos": None, "sin": None}),
    "both": (f"{EITHER} cos and sin and cos_sin_cache", lambda: {"cos_sin_cache": ones(5, 8)}),
    "cache: shape": (
        "cos_sin_cache must have shape [positions, rotary], got [5, 1, 8]",
        cache(cos_sin_cache=ones(5, 1, 8)),
    ),
    "cache: empty": (
        "cos_sin_cache must have at least one row, got shape [0, 8]",
        cache(cos_sin_cache=ones(0, 8)),
    ),
    "cache: odd": (f"cos_sin_cache {EVEN} [5, 7]", cache(cos_sin_cache=ones(5, 7))),
    "positions: dtype": (
        "positions must have dtype int32 or int64, got float32",
        cache(lambda: ones(3)),
    ),
    "positions: shape": ("positions must have shape [3], got [4]", cache(lambda: positions_of(4))),
    "positions: no axes": (
        "positions must have shape [3, 3], got [3]",
        cache(mrope_section=[2, 1, 1]),
    ),
    "mrope_section: two": (
        f"{SECTION} [2, 2]",
        cache(lambda: positions_of(3, 3), mrope_section=[2, 2]),
    ),
    "mrope_section: sum": (
        f"{SECTION} [2, 2, 2]",
        cache(lambda: positions_of(3, 3), mrope_section=[2, 2, 2]),
    ),
    "mrope_section: negative": (
        f"{SECTION} [5, -1, 0]",
        cache(lambda: positions_of(3, 3), mrope_section=[5, -1, 0]),
    ),
    "mrope_section without positions": (
        "mrope_section must be None without positions, got [2, 1, 1]",
        lambda: {"mrope_section": [2, 1, 1]},
    ),
    "mrope_interleaved alone": (
        "mrope_interleaved must be False without mrope_section, got True",
        cache(mrope_interleaved=True),
    ),
    "eps": ("eps must be finite in float32 and at least 0, got -1", lambda: {"eps": -1.0}),
    "gemma without weights": (
        "gemma must be False without a weight, got True",
        lambda: {"q_weight": None, "k_weight": None, "gemma": True},
    ),
    "round_each_step alone": (
        "round_rotation must be True with round_each_step=True, got False",
        lambda: {"round_each_step": True},
    ),
    "round_rotation of float32 angles": (
        "cos must have q's dtype float16 with round_rotation=True, got float32",
        lambda: {"q": ones(3, 4, 16).half(), "k": ones(3, 2, 16).half(), "round_rotation": True},
    ),
}


def message(kernel: Callable[..., Any], arguments: Arguments) -> str:
    kept = {n: t.clone() for n, t in arguments.items() if isinstance(t, Tensor)}
    with pytest.raises(RuntimeError) as caught, warnings_are("ignore"):
        kernel(**arguments)
    if all(t.device.type != "meta" for t in kept.values()):
        assert all(torch.equal(t, arguments[n]) for n, t in kept.items()), "something was written"
    return str(caught.value).partition("\n")[0]


@pytest.mark.parametrize(("expected", "replace"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", ["qk_norm_rope", "fused_qk_norm_rope"])
def test_a_bad_argument_is_named_alike_by_every_implementation(device, name, expected, replace):
    native = getattr(OPS, name).default
    for kind, kernel in ((device, native), (device, _registry.OPERATORS[name].plain), ("meta", native)):
        arguments = good() | replace()
        arguments = {n: t.to(kind) if isinstance(t, Tensor) else t for n, t in arguments.items()}
        if kind == "cpu" or "stride 2" not in expected:  # a copy to another device is contiguous
            assert message(kernel, arguments) == f"{name}: {expected}"


def test_memory_that_must_not_overlap(device):
    qkv = randn(3, 6, 16, device=device)
    cases: list[tuple[str, Arguments]] = [
        (
            "k must not overlap q, which is also written, got overlapping memory",
            {"q": qkv[:, :4], "k": qkv[:, 3:5]},
        ),
        (
            "q is written and must not overlap itself, got a tensor with shared elements",
            {"q": qkv[:1, :4].expand(3, 4, 16)},
        ),
        (
            "q is written and must not overlap q_weight, got overlapping memory",
            {"q": qkv[:, :4], "q_weight": qkv[1, 2]},
        ),
        ("k is written and must not overlap cos, got overlapping memory", {"k": qkv[:, :2], "cos": qkv[:, 1, :8]}),
    ]
    for expected, replace in cases:
        arguments = {n: t.to(device) for n, t in good().items()} | replace
        for kernel in (FUSED, _registry.OPERATORS["fused_qk_norm_rope"].plain):
            assert message(kernel, arguments) == f"fused_qk_norm_rope: {expected}"
    view = qkv.clone()
    arguments = {n: t.to(device) for n, t in good().items()} | {"q": view[:, :4], "k": view[:, 4:]}
    want = gemma_norm.qk_norm_rope(**arguments)
    gemma_norm.fused_qk_norm_rope(**arguments)
    assert_same_bits(view[:, :4], want[0])
    assert_same_bits(view[:, 4:], want[1])


@pytest.mark.parametrize("name", ["q", "k", "q_weight", "k_weight", "cos", "sin"])
def test_gradients_are_not_lost_in_silence(name):
    arguments = good()
    arguments[name].requires_grad_()
    expected = f"fused_qk_norm_rope: {name} must not require grad while grad mode is enabled"
    assert message(FUSED, arguments).startswith(expected)
    with pytest.raises(RuntimeError, match="fused_qk_norm_rope: writing into an argument is not available"):
        torch.func.vmap(lambda q: gemma_norm.fused_qk_norm_rope(q, *in_turn(good())[1:]))(ones(2, 3, 4, 16))


def test_what_is_of_the_wrong_type_is_named():
    for replace, expected in (
        ({"q": None}, "q must be a tensor, got None"),
        ({"k": 1.0}, "k must be a tensor, got 1.0"),
        ({"positions": 3}, "positions must be a tensor, got 3"),
        ({"interleaved": "yes"}, "interleaved must be a bool, got 'yes'"),
        ({"mrope_section": 3}, "mrope_section must be a list of three integers or None, got 3"),
    ):
        with pytest.raises(RuntimeError, match=f"^qk_norm_rope: {expected}$"):
            gemma_norm.qk_norm_rope(**good() | replace)


def test_the_function_takes_no_detour_in_inference():
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gemma_norm.qk_norm_rope(**good())
    assert [e.name for e in profile.events() if e.name.startswith("gemma_norm")] == ["gemma_norm::_qk_norm_rope"]
