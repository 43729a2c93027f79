"""The derivatives of qk_norm_rope, and what programs do with it: torch.func, torch.compile, meta tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_with_gradients_of_the_angles(device, cached, reentrant):
    """Without reentry, what is saved can be unpacked once."""
    a = tensors((4,), (2, 1), 16, 8, device=device)
    if cached:
        a = with_cache(a, randn(5, 8, device=device), torch.arange(4, device=device))
    angle = "cos_sin_cache" if cached else "cos"

    def run(t: Tensor) -> Tensor:
        return loss(*gemma_norm.qk_norm_rope(**a | {angle: t}))

    leaf = a[angle].requires_grad_()
    (want,) = torch.autograd.grad(run(leaf), leaf)
    checkpoint(run, leaf, use_reentrant=reentrant).backward()
    assert torch.equal(leaf.grad, want)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("turns", [None, False, True])
def test_gradients_of_a_cache(device, interleaved, turns):
    """Each element of the cache gets the sum over the tokens and heads that it rotates; some rows rotate none."""
    a = tensors((6,), (2, 1), 16, 8, torch.float64, device)
    cache = randn(9, 8, dtype=torch.float64, device=device).requires_grad_()
    shape = (6,) if turns is None else (3, 6)
    positions = torch.randint(0, 7, shape, generator=torch.Generator().manual_seed(0)).to(device)
    options = {"interleaved": interleaved}
    if turns is not None:
        options |= {"mrope_section": [2, 1, 1], "mrope_interleaved": turns}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        y = loss(*reference.qk_norm_rope(**with_cache(a, cache, positions), **options))
        (want,) = torch.autograd.grad(y, cache)
    a, cache = {n: t.float() for n, t in a.items()}, cache.detach().float().requires_grad_()
    (got,) = torch.autograd.grad(loss(*gemma_norm.qk_norm_rope(**with_cache(a, cache, positions), **options)), cache)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    assert not got[7:].any()


POSITIONS_INSIDE: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "vmap": lambda f, q: torch.func.vmap(f)(q[None]),
    "grad": lambda f, q: torch.func.grad(lambda q: f(q).sum())(q),
    "jvp": lambda f, q: torch.func.jvp(f, (q,), (q,)),
    "functionalize": lambda f, q: torch.func.functionalize(f)(q),
    "a dual tensor": lambda f, q: dual(f, q),
}


def dual(f: Callable[[Tensor], Tensor], q: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        return f(torch.autograd.forward_ad.make_dual(q, q))


@pytest.mark.parametrize("name", POSITIONS_INSIDE)
def test_positions_outside_the_cache_are_refused_inside_transforms(name):
    q, cache = randn(4, 2, 16), randn(8, 8)

    def run(q: Tensor) -> Tensor:
        return gemma_norm.qk_norm_rope(q, q, None, None, cos_sin_cache=cache, positions=positions)[0]

    positions = torch.tensor([0, 100, 1, 7])
    with pytest.raises(
        RuntimeError, match="positions must be at least 0 and less than cos_sin_cache's 8 rows, got 100"
    ):
        POSITIONS_INSIDE[name](run, q)
    positions = torch.tensor([0, 3, 1, 7])
    POSITIONS_INSIDE[name](run, q)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_batch_of_caches(device, dim):
    """Its rows are those that the function sees, wherever the hidden dimension is."""
    q, cache = randn(5, 2, 8, device=device), randn(4, 16, 8, device=device)
    positions = torch.tensor([0, 3, 9, 14, 15], device=device)

    def run(cache: Tensor) -> Tensor:
        return gemma_norm.qk_norm_rope(q, q, None, None, cos_sin_cache=cache, positions=positions)[0]

    got = torch.func.vmap(run, in_dims=dim)(cache.movedim(0, dim))
    torch.testing.assert_close(got, torch.stack([run(c) for c in cache]), rtol=1e-6, atol=1e-6)
    if device == "cpu":
        with pytest.raises(RuntimeError, match="less than cos_sin_cache's 14 rows, got 15"):
            torch.func.vmap(run, in_dims=dim)(cache[:, :14].movedim(0, dim))


def test_positions_written_through_a_view_inside_functionalize():
    q, cache = randn(5, 2, 8), randn(16, 8)

    def run(q: Tensor, positions: Tensor) -> Tensor:
        positions = positions.clone()
        view = positions[:]
        positions.add_(100)
        view.sub_(100)
        return gemma_norm.qk_norm_rope(q, q, None, None, cos_sin_cache=cache, positions=positions)[0]

    got = torch.func.functionalize(run)(q, torch.arange(5))
    torch.testing.assert_close(got, run(q, torch.arange(5)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 1), (1,), (3,), (1, 3), ()], ids=str)
def test_positions_broadcast(device, shape):
    """A dimension of 1, or none, stands for any number of tokens."""
    a = tensors((4, 3), (2, 1), 16, 8, device=device)
    cache, positions = randn(12, 8, device=device), torch.arange(math.prod(shape), device=device).view(shape)
    got = gemma_norm.qk_norm_rope(**with_cache(a, cache, positions))
    want = gemma_norm.qk_norm_rope(**with_cache(a, cache, positions.expand(4, 3).contiguous()))
    assert all(map(torch.equal, got, want))


def test_a_number_of_tokens_that_is_not_known(device):
    """As of a selection by a mask. One row of angles serves all of them."""
    a = tensors((5,), (2, 1), 16, 8, device=device)

    def run(mask: Tensor) -> tuple[Tensor, Tensor]:
        chosen = a | {"q": a["q"][mask], "k": a["k"][mask], "cos": a["cos"][:1], "sin": a["sin"][:1]}
        return gemma_norm.qk_norm_rope(**chosen)

    mask = torch.tensor([True, False, True, True, False], device=device)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        got = torch.compile(run, backend="aot_eager", fullgraph=True)(mask)
    assert all(map(torch.equal, got, run(mask)))


def test_compiled_autograd_with_gradients_of_the_angles(device):
    """All of the backward pass is in one graph."""
    a = tensors((4,), (2, 1), 16, 8, device=device)
    cos = a["cos"].requires_grad_()
    (want,) = torch.autograd.grad(loss(*gemma_norm.qk_norm_rope(**a)), cos)
    y = loss(*gemma_norm.qk_norm_rope(**a))
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        y.backward()
    assert torch.equal(cos.grad, want)


def test_gradients_of_a_cache_for_one_token_without_a_dimension(device):
    a = tensors((), (2, 1), 16, 8, device=device)
    cache = randn(5, 8, device=device).requires_grad_()
    a = with_cache(a, cache, torch.tensor(3, device=device))
    (got,) = torch.autograd.grad(loss(*gemma_norm.qk_norm_rope(**a)), cache)
    (want,) = torch.autograd.grad(loss(*reference.qk_norm_rope(**a)), cache)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rotary", [8, 16])
def test_gradients_in_a_batch(device, rotary):
    """Of several directions at once, in PyTorch's older way."""
    a = tensors((4,), (2, 1), 16, rotary, device=device)
    a = with_cache(a, randn(5, rotary, device=device), torch.arange(4, device=device))
    leaves = [a[n].requires_grad_() for n in ("q", "k", "q_weight", "k_weight", "cos_sin_cache")]
    y, z = gemma_norm.qk_norm_rope(**a)
    directions = [randn(3, *t.shape, device=device, seed=7 + i) for i, t in enumerate((y, z))]
    got = torch.autograd.grad((y, z), leaves, directions, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        want = torch.autograd.grad((y, z), leaves, [d[i] for d in directions], retain_graph=True)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g[i], w, rtol=1e-4, atol=1e-5)
