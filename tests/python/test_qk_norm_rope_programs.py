"""The derivatives of qk_norm_rope, and what programs do with it: torch.func, torch.compile, meta tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gemma_norm
from gemma_norm import reference
from rope_support import Arguments, in_turn, tensors, with_cache
from support import randn

OPS = torch.ops.gemma_norm
OP, FUSED = OPS.qk_norm_rope.default, OPS.fused_qk_norm_rope.default


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
