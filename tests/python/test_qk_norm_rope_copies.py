"""qk_norm_rope with a gate, v or both, which the same kernel copies."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, ones

import gemma_norm
from gemma_norm import _registry, reference
from rope_support import Arguments, good, in_turn, tensors
from support import DTYPES, LAYOUTS, assert_same_bits, place, randn

OP = torch.ops.gemma_norm.qk_norm_rope.copies
BOTH = ("gate", "v")
GIVEN = [("gate",), ("v",), BOTH]


def fused(tokens: tuple[int, ...], heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: str) -> Arguments:
    """q, gate, k and v as slices of what one projection gives: a gate beside each head of q."""
    width = (2 * heads[0] + 2 * heads[1]) * head_dim
    qkv = randn(*tokens, width, dtype=dtype, device=device)
    bits = qkv.view(torch.int32 if dtype == torch.float32 else torch.int16)
    bits[..., -3] = -1  # a NaN with a payload, in v
    bits[..., head_dim + 1] = -2  # and in the gate
    q_gate, k, v = qkv.split([2 * heads[0] * head_dim, heads[1] * head_dim, heads[1] * head_dim], dim=-1)
    q, gate = q_gate.unflatten(-1, (heads[0], 2 * head_dim)).chunk(2, dim=-1)
    return {"q": q, "k": k.unflatten(-1, (heads[1], -1)), "gate": gate, "v": v.unflatten(-1, (heads[1], -1))}


def only(arguments: Arguments, given: tuple[str, ...]) -> Arguments:
    return {n: t for n, t in arguments.items() if n not in BOTH or n in given}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", GIVEN, ids="+".join)
@pytest.mark.parametrize(("head_dim", "rotary"), [(256, 64), (128, 128), (96, 32), (20, 6), (7, 2)])
def test_the_copies_beside_the_same_results(device, dtype, given, head_dim, rotary):
    for tokens, heads in product([(), (1,), (9,), (2, 3), (2, 3, 2, 2), (70,), (0,)], [(4, 2), (1, 3)]):
        a = tensors(tokens, heads, head_dim, rotary, dtype, device) | fused(tokens, heads, head_dim, dtype, device)
        want = gemma_norm.qk_norm_rope(**only(a, ()))
        got = gemma_norm.qk_norm_rope(**only(a, given))
        assert len(got) == 2 + len(given)
        for y, w in zip(got, (*want, *(a[name] for name in given)), strict=True):
            assert_same_bits(y, w)
            assert y.is_contiguous()
            assert y.numel() == 0 or y.data_ptr() != w.data_ptr()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_and_any_number_of_heads(device, layout):
    a = tensors((6,), (4, 2), 128, 32, torch.bfloat16, device)
    gate = place(randn(6, 3, 128, dtype=torch.bfloat16, device=device, seed=5), layout)
    v = place(randn(6, 17, 128, dtype=torch.bfloat16, device=device, seed=6), layout)
    got = gemma_norm.qk_norm_rope(**a, gate=gate.view, v=v.view)
    for y, w in zip(got, (*gemma_norm.qk_norm_rope(**a), gate.view, v.view), strict=True):
        assert_same_bits(y, w)
    gate.assert_gaps_intact()
    same = gemma_norm.qk_norm_rope(**a, gate=a["q"], v=a["k"])  # nothing is written that another still reads
    assert_same_bits(same[2], a["q"])
    assert_same_bits(same[3], a["k"])


def definition(**a: Tensor) -> tuple[Tensor, ...]:
    return *reference.qk_norm_rope(**only(a, ())), *(a[name] for name in BOTH if name in a)


def loss(results: tuple[Tensor, ...]) -> Tensor:
    return sum(((i + 1.5) * y).sin().sum() for i, y in enumerate(results))


@pytest.mark.parametrize("given", GIVEN, ids="+".join)
@pytest.mark.parametrize("graded", [("q", "k", *BOTH), ("q",), BOTH, ("q_weight", "gate")], ids="+".join)
def test_gradients_of_what_is_copied_pass(device, given, graded):
    a = tensors((3,), (4, 2), 16, 8, device=device) | fused((3,), (4, 2), 16, torch.float32, device)
    a = {n: t.nan_to_num(0.5).requires_grad_(n in graded) for n, t in only(a, given).items()}
    leaves = [t for t in a.values() if t.requires_grad]
    if not leaves:
        return
    wanted = [loss(f(**a)) for f in (gemma_norm.qk_norm_rope, definition)]
    first = [torch.autograd.grad(w, leaves, create_graph=True) for w in wanted]
    torch.testing.assert_close(*first)
    second = [torch.autograd.grad(sum(g.square().sum() for g in f), leaves) for f in first]
    torch.testing.assert_close(*second, rtol=1e-3, atol=1e-4)
    results = gemma_norm.qk_norm_rope(**a)
    if "gate" in given and "gate" in graded:  # of the copy alone
        (alone,) = torch.autograd.grad(results[2], a["gate"], torch.full_like(a["gate"], 3))
        assert_same_bits(alone, torch.full_like(a["gate"], 3))


def test_transforms(device):
    a = tensors((3, 2), (2, 1), 16, 8, device=device)
    gate = randn(3, 2, 2, 16, device=device, seed=8)

    def of(function):
        rest = {n: t[0] if n in ("cos", "sin") else t for n, t in a.items() if n not in ("q", "k")}
        return lambda q, k, gate: loss(function(q=q, k=k, gate=gate, **rest))

    inputs = (a["q"], a["k"], gate)
    for transform in (
        lambda f: torch.func.grad(f, argnums=(0, 1, 2))(*(t[0] for t in inputs)),
        lambda f: torch.func.jvp(f, tuple(t[0] for t in inputs), tuple(t[1] for t in inputs)),
        lambda f: torch.func.vmap(torch.func.grad(f, argnums=2))(*inputs),
    ):
        torch.testing.assert_close(transform(of(gemma_norm.qk_norm_rope)), transform(of(definition)))


@pytest.mark.parametrize("given", GIVEN, ids="+".join)
def test_opcheck(device, given):
    a = tensors((4,), (3, 2), 32, 16, device=device) | fused((4,), (3, 2), 32, torch.float32, device)
    a = {n: t.nan_to_num(0.5) for n, t in only(a, given).items()}
    torch.library.opcheck(OP, (), a)
    torch.library.opcheck(OP, (), {n: t.clone().requires_grad_() for n, t in a.items()})


@pytest.mark.parametrize("given", GIVEN, ids="+".join)
def test_torch_compile(device, given):
    a = tensors((5,), (3, 2), 32, 16, device=device) | fused((5,), (3, 2), 32, torch.float32, device)
    a = {n: t.nan_to_num(0.5).requires_grad_() for n, t in only(a, given).items()}

    def step(*inputs: Tensor) -> Tensor:
        return loss(gemma_norm.qk_norm_rope(**dict(zip(a, inputs, strict=True)), gemma=True))

    leaves = [a[name] for name in ("q", *given)]
    want = torch.autograd.grad(step(*in_turn(a)), leaves)
    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*in_turn(a)), leaves)
    torch.testing.assert_close(got, want)


class Module(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, weight: Tensor, angles: Tensor, gate: Tensor) -> Tensor:
        y, z, copy = gemma_norm.qk_norm_rope(q, k, weight, weight, angles, angles, gate=gate)
        return (y * copy).sum() + z.sum()


def test_traced_exported_and_of_meta_tensors():
    inputs = (*(randn(3, 2, 16, seed=i) for i in range(2)), ones(16), randn(3, 8), randn(3, 2, 16, seed=3))
    module = Module()
    for program in (torch.fx.symbolic_trace(module), torch.export.export(module, inputs).module()):
        assert_same_bits(program(*inputs), module(*inputs))
    results = gemma_norm.qk_norm_rope(
        *(t.to("meta") for t in (*inputs[:3], inputs[2], inputs[3], inputs[3])), v=inputs[4].to("meta")
    )
    assert [t.shape for t in results] == [(3, 2, 16)] * 3


NOT_LIKE = "must have q's shape [3, 4, 16], but for the number of heads, got"
BAD = {
    "tokens": (f"{NOT_LIKE} [2, 4, 16]", lambda: ones(2, 4, 16)),
    "elements": (f"{NOT_LIKE} [3, 4, 8]", lambda: ones(3, 4, 8)),
    "flat": (f"{NOT_LIKE} [3, 64]", lambda: ones(3, 64)),
    "no head": ("must have at least one head, got shape [3, 0, 16]", lambda: ones(3, 0, 16)),
    "dtype": ("must have q's dtype float32, got float16", lambda: ones(3, 4, 16).half()),
    "strided": ("must have a contiguous last dimension (stride 1), got stride 2", lambda: ones(3, 4, 32)[..., ::2]),
}


@pytest.mark.parametrize(("expected", "make"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", BOTH)
def test_a_bad_argument_is_named_alike_by_every_implementation(device, name, expected, make):
    kernels = (gemma_norm.qk_norm_rope, OP, _registry.OPERATORS["qk_norm_rope.copies"].plain)
    for kind, kernel in ((device, kernels[0]), (device, kernels[1]), (device, kernels[2]), ("meta", kernels[0])):
        arguments = {n: t.to(kind) for n, t in (good() | {name: make()}).items()}
        if kind == "cpu" or "stride 2" not in expected:  # a copy to another device is contiguous
            with pytest.raises(RuntimeError) as caught:
                kernel(**arguments)
            assert str(caught.value).partition("\n")[0] == f"qk_norm_rope: {name} {expected}"


def test_what_is_of_the_wrong_type_is_named():
    for name in BOTH:
        with pytest.raises(RuntimeError, match=f"^qk_norm_rope: {name} must be a tensor, got 2$"):
            gemma_norm.qk_norm_rope(**good(), **{name: 2})


def test_the_function_takes_no_detour_in_inference():
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gemma_norm.qk_norm_rope(**good(), gate=ones(3, 4, 16))
    assert [e.name for e in profile.events() if e.name.startswith("gemma_norm")] == ["gemma_norm::_qk_norm_rope"]
