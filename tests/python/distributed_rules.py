"""Checks of the operators with DTensors, which test_distributed.py runs in each process of a group.

Each computes the same on whole, plain tensors, which every process has, and compares.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.experimental import implicit_replication, local_map
from torch.distributed.tensor.parallel import parallelize_module

import gemma_norm
from distributed_tensors import HIDDEN, LIKE_X, SHAPE, assert_close, assert_raises, line, put, tensors
from gemma_norm import _sharding
from gemma_norm._checks import WEIGHT, Extent, X
from gemma_norm.parallel import NormSequenceParallel
from support import assert_same_bits, randn

OPS = torch.ops.gemma_norm
CALLS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "rms_norm": (lambda x, weight: gemma_norm.rms_norm(x, weight, 1e-6, True), ("x", "weight")),
    "rms_norm, no weight": (lambda x: gemma_norm.rms_norm(x), ("x",)),
    "add_rms_norm": (gemma_norm.add_rms_norm, ("x", "residual", "weight")),
    "add_rms_norm, post_residual_addition": (
        lambda x, residual, weight, post: gemma_norm.add_rms_norm(x, residual, weight, 1e-6, True, post),
        ("x", "residual", "weight", "post"),
    ),
    "gated_rms_norm": (gemma_norm.gated_rms_norm, ("x", "gate", "weight")),
    "gated_rms_norm, groups": (
        lambda x, gate, weight: gemma_norm.gated_rms_norm(x, gate, weight, norm_before_gate=False, group_size=8),
        ("x", "gate", "weight"),
    ),
    "gated_rms_norm, no gate": (lambda x, weight: gemma_norm.gated_rms_norm(x, None, weight), ("x", "weight")),
    "rms_norm_add_rms_norm": (
        gemma_norm.rms_norm_add_rms_norm,
        ("x", "residual", "post_weight", "weight"),
    ),
    "torch.ops rms_norm": (lambda x, weight: OPS.rms_norm(x, weight=weight), ("x", "weight")),
    "torch.ops add_rms_norm": (OPS.add_rms_norm, ("x", "residual", "weight")),
    "torch.ops rms_norm_add_rms_norm": (OPS.rms_norm_add_rms_norm, ("x", "residual", "post_weight", "weight")),
    "torch.ops gated_rms_norm": (lambda x, gate, weight: OPS.gated_rms_norm(x, gate, weight), ("x", "gate", "weight")),
}


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def watched(call: Callable[..., Any]) -> Any:
    """Counts what is communicated. torch.compile does not compile what such a mode looks at."""
    return contextlib.nullcontext(CommDebugMode()) if hasattr(call, "_torchdynamo_orig_callable") else CommDebugMode()


def compare(
    call: Callable[..., Any], plain: dict[str, Tensor], placements: dict[str, Placement]
) -> tuple[list[DTensor], list[DTensor], CommDebugMode]:
    """Results, gradients, and what was communicated for them. They are compared with those of plain tensors."""
    leaves = [t.clone().requires_grad_() for t in plain.values()]
    want = as_tuple(call(**dict(zip(plain, leaves, strict=True))))
    upstream = [randn(*t.shape, device=t.device.type, seed=9 + i) for i, t in enumerate(want)]
    want_gradients = torch.autograd.grad(want, leaves, upstream)
    placed = {name: put(t, placements[name]).requires_grad_() for name, t in plain.items()}
    with watched(call) as forward:
        got = as_tuple(call(**placed))
    placed_upstream = [put(t, *y.placements) for t, y in zip(upstream, got, strict=True)]
    with watched(call) as backward:
        gradients = torch.autograd.grad(got, list(placed.values()), placed_upstream)
    forward.comm_counts.update(backward.comm_counts)
    for g, w in zip(got, want, strict=True):
        exact = not any(
            isinstance(p, Partial) for p in placements.values()
        )  # halves are added again: not the same bits
        assert_same_bits(g.full_tensor(), w) if exact else assert_close(g.full_tensor(), w)
    for g, w in zip(gradients, want_gradients, strict=True):
        assert_close(g.full_tensor(), w)
    with torch.inference_mode():
        for g, w in zip(as_tuple(call(**placed)), got, strict=True):
            assert_same_bits(g.to_local(), w.to_local())
            assert g.placements == w.placements
    return list(got), list(gradients), forward


def rows_are_sharded(device: str, name: str) -> None:
    """Rows sharded alike, weight replicated: nothing is communicated, and the weight's gradient is partial."""
    call, names = CALLS[name]
    for shape in (SHAPE, SHAPE[1:], (7, 3, HIDDEN), (2, 5, 2, HIDDEN)):
        for dim in range(len(shape) - 1):
            placements = {n: Shard(dim) if n in LIKE_X else Replicate() for n in names}
            got, gradients, communication = compare(call, tensors(device, names, shape), placements)
            assert communication.get_total_counts() == 0
            assert all(y.placements == (Shard(dim),) for y in got)
            for n, gradient in zip(names, gradients, strict=True):
                assert gradient.placements == ((Shard(dim),) if n in LIKE_X else (Partial(),)), n


def all_is_replicated(device: str, name: str) -> None:
    call, names = CALLS[name]
    got, gradients, communication = compare(call, tensors(device, names), dict.fromkeys(names, Replicate()))
    assert communication.get_total_counts() == 0
    assert all(t.placements == (Replicate(),) for t in (*got, *gradients))


def other_placements(device: str, name: str) -> None:
    """The inputs are redistributed: the hidden dimension is gathered, and so is a weight that is sharded."""
    call, names = CALLS[name]
    for x in (Shard(2), Shard(0), Shard(1), Replicate(), Partial()):
        for others in (Shard(0), Shard(2), Replicate(), Partial()):
            for weight in (Replicate(), Shard(0)):
                placements = {n: others if n in LIKE_X else weight for n in names} | {"x": x}
                got, _, _ = compare(call, tensors(device, names), placements)
                assert all(y.placements[0] in (Shard(0), Shard(1), Replicate()) for y in got)


def empty_shards(device: str, name: str) -> None:
    """Fewer rows than ranks, and no rows. (PyTorch's DTensor cannot view a tensor without rows in groups.)"""
    call, names = CALLS[name]
    for rows in (1,) if "groups" in name else (1, 0):
        placements = {n: Shard(0) if n in LIKE_X else Replicate() for n in names}
        compare(call, tensors(device, names, (rows, HIDDEN)), placements)


def one_result_is_used(device: str) -> None:
    """The other one's gradient is absent. A plain tensor of zeros in its place could not be added to a DTensor."""
    plain = tensors(device, ("x", "residual", "weight"))
    for used in (0, 1):
        leaves = [t.clone().requires_grad_() for t in plain.values()]
        gemma_norm.add_rms_norm(*leaves)[used].sin().sum().backward()
        for placement in (Shard(0), Shard(1), Replicate()):
            placed = [put(t, placement if n in LIKE_X else Replicate()).requires_grad_() for n, t in plain.items()]
            gemma_norm.add_rms_norm(*placed)[used].sin().sum().backward()
            for g, w in zip(placed, leaves, strict=True):
                assert_close(g.grad.full_tensor(), w.grad)
        assert bool(leaves[2].grad.any()) is (used == 0)  # s does not depend on the weight: its gradient is zero


def bfloat16(device: str) -> None:
    for name, (call, names) in CALLS.items():
        plain = {n: t.bfloat16() for n, t in tensors(device, names).items()}
        compare(call, plain, {n: Shard(1) if n in LIKE_X else Replicate() for n in names})
        assert name


def rows_on_a_mesh_of_two_dimensions(device: str, first: int, second: int) -> None:
    mesh = init_device_mesh(device, (first, second))
    plain = tensors(device, ("x", "residual", "weight"))
    leaves = [t.clone().requires_grad_() for t in plain.values()]
    want = gemma_norm.add_rms_norm(*leaves)
    want[0].sin().sum().backward()
    choices = (
        ((Shard(0), Shard(1)), (Shard(0), Shard(1)), (Replicate(), Replicate())),
        ((Shard(0), Shard(0)), (Shard(0), Replicate()), (Replicate(), Shard(0))),
        ((Shard(1), Replicate()), (Replicate(), Shard(0)), (Replicate(), Replicate())),
        ((Shard(2), Shard(0)), (Shard(0), Shard(2)), (Shard(0), Replicate())),
    )
    for placements in choices:
        placed = [
            distribute_tensor(t, mesh, p).requires_grad_() for t, p in zip(plain.values(), placements, strict=True)
        ]
        got = gemma_norm.add_rms_norm(*placed)
        got[0].sin().sum().backward()
        for g, w in zip(got, want, strict=True):
            assert_same_bits(g.full_tensor(), w.detach())
        for g, w in zip(placed, leaves, strict=True):
            assert_close(g.grad.full_tensor(), w.grad)


def what_writes_is_refused(device: str) -> None:
    """PyTorch redistributes an argument into a copy. The operator would write into that (S7)."""
    plain = tensors(device, ("x", "residual", "weight"))
    placements = ((Shard(0), Shard(0)), (Shard(2), Shard(2)), (Shard(1), Replicate()), (Replicate(), Replicate()))
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        for for_x, for_residual in placements:
            with mode():
                x, residual = put(plain["x"], for_x), put(plain["residual"], for_residual)
                weight = put(plain["weight"], Replicate())
                calls = {
                    "x is written .* call gemma_norm.add_rms_norm$": (
                        partial(gemma_norm.fused_add_rms_norm, x, residual, weight),
                        partial(OPS.fused_add_rms_norm, x, residual, weight),
                    ),
                    "residual is written .* call gemma_norm.add_rms_norm_quant$": (
                        partial(gemma_norm.fused_add_rms_norm_quant, x, residual, weight),
                        partial(gemma_norm.fused_add_rms_norm_quant, x, residual, weight, return_y=True),
                    ),
                    "x is written .* call gemma_norm.rms_norm_add_rms_norm$": (
                        partial(gemma_norm.fused_rms_norm_add_rms_norm, x, residual, weight, weight),
                        partial(OPS.fused_rms_norm_add_rms_norm, x, residual, weight, weight),
                    ),
                    "out is written .* call gemma_norm.rms_norm without out$": (
                        partial(gemma_norm.rms_norm, x, weight, out=residual),
                        partial(OPS.rms_norm.out, x, weight, out=residual),
                    ),
                    "out is written .* call gemma_norm.gated_rms_norm without out$": (
                        partial(gemma_norm.gated_rms_norm, x, residual, weight, out=residual),
                    ),
                }
                for message, refused in calls.items():
                    for call in refused:
                        assert_raises(call, message)
                assert_same_bits(x.full_tensor(), plain["x"])
                assert_same_bits(residual.full_tensor(), plain["residual"])


def modules_do_not_write(device: str) -> None:
    """In inference, a module overwrites plain tensors alone."""
    plain = tensors(device, ("x", "residual"))
    norm = gemma_norm.RMSNorm(HIDDEN, device=device).eval()
    with torch.inference_mode():
        want = norm(*(t.clone() for t in plain.values()))
    parallelize_module(norm, line(device), NormSequenceParallel())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            x, residual = (put(t, Shard(1)) for t in plain.values())
            assert not norm.may_overwrite(x, residual, None)  # so the operator that writes is not even tried
            for _ in range(2):
                y, s = norm(x, residual)
                assert y is not x and s is not residual
                assert_same_bits(y.full_tensor(), want[0])
                assert_same_bits(s.full_tensor(), want[1])
            assert_same_bits(x.full_tensor(), plain["x"])
            assert_same_bits(residual.full_tensor(), plain["residual"])


def modules_with_implicit_replication(device: str) -> None:
    """Plain tensors beside a distributed weight: the operator that writes refuses, so the module takes the other."""
    plain = tensors(device, ("x", "residual"))
    norm = gemma_norm.RMSNorm(HIDDEN, device=device).eval()
    want = gemma_norm.add_rms_norm(*plain.values(), norm.weight)
    norm.weight = nn.Parameter(put(norm.weight.detach(), Replicate()))
    with torch.no_grad():
        assert_raises(lambda: norm(*plain.values()), "mixed torch.Tensor and DTensor")
        with implicit_replication():
            got = norm(*plain.values())
    for g, w in zip(got, want, strict=True):
        assert_same_bits(g.full_tensor(), w.detach())


def local_maps(device: str) -> None:
    """A function of local tensors must be told that the weight's gradient is partial (S9)."""
    plain = tensors(device, ("x", "weight"))
    x, weight = (t.clone().requires_grad_() for t in plain.values())
    gemma_norm.rms_norm(x, weight).sin().sum().backward()
    gradients = []
    for in_grad_placements in (([Shard(1)], [Partial()]), None):
        placed, placed_weight = (
            put(plain["x"], Shard(1)).requires_grad_(),
            put(plain["weight"], Replicate()).requires_grad_(),
        )
        norm = local_map(
            gemma_norm.rms_norm,
            out_placements=[Shard(1)],
            in_placements=([Shard(1)], [Replicate()]),
            in_grad_placements=in_grad_placements,
            device_mesh=line(device),
        )
        norm(placed, placed_weight).sin().sum().backward()
        assert_close(placed.grad.full_tensor(), x.grad)
        gradients.append(placed_weight.grad.full_tensor())
    assert_close(gradients[0], weight.grad)
    off = float((gradients[1] - weight.grad).abs().max())
    assert off > 0.1, "local_map needs no in_grad_placements any more: say so in docs/usage.md"


def a_compiled_function(device: str, mode: str) -> None:
    """Functions and operators, in training and in inference, in one graph."""
    torch._dynamo.reset()
    plain = tensors(device, ("x", "residual", "weight", "gate"))

    def program(x: Tensor, residual: Tensor, weight: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        y, s = gemma_norm.add_rms_norm(x, residual, weight, gemma=True)
        return gemma_norm.gated_rms_norm(OPS.rms_norm(y, weight), gate, weight), s

    compiled = torch.compile(program, backend="aot_eager", fullgraph=True)
    for placement in (Shard(0), Shard(1)):
        placements = {n: placement if n in LIKE_X else Replicate() for n in plain} | {"residual": Replicate()}
        if mode == "train":
            compare(compiled, plain, placements)
        else:
            with torch.inference_mode():
                got = compiled(*(put(t, placements[n]) for n, t in plain.items()))
            for g, w in zip(got, program(*plain.values()), strict=True):
                assert g.placements == (placement,)
                assert_same_bits(g.full_tensor(), w)


def rotated_heads(device: str) -> None:
    """Tokens or heads sharded: nothing is communicated. The angles and positions go with the tokens, and each rank has
    all of them where the heads are sharded, as in tensor parallelism.
    """
    q, k = randn(4, 6, 4, 16, device=device), randn(4, 6, 2, 16, device=device, seed=1)
    weights = {n: randn(16, device=device, seed=s) for s, n in ((2, "q_weight"), (3, "k_weight"))}
    angles = {n: randn(4, 6, 8, device=device, seed=s) for s, n in ((4, "cos"), (5, "sin"))}
    gate, v = (randn(4, 6, heads, 16, device=device, seed=s) for heads, s in ((4, 6), (2, 7)))
    for dim, copied in itertools.product((None, 0, 1, 2, 3), ({}, {"gate": gate}, {"gate": gate, "v": v})):
        rows: Placement = Replicate() if dim is None else Shard(dim)
        tokens = rows if dim in (0, 1) else Replicate()
        placements = {"q": rows, "k": rows, **dict.fromkeys(weights, Replicate()), **dict.fromkeys(angles, tokens)}
        placements |= dict.fromkeys(copied, rows)
        got, gradients, communication = compare(
            gemma_norm.qk_norm_rope, {"q": q, "k": k, **weights, **angles, **copied}, placements
        )
        if dim == 3:  # the elements of a head are gathered
            assert all(y.placements[0] != Shard(3) for y in got)
            continue
        assert communication.get_total_counts() == 0
        assert all(y.placements == (rows,) for y in got)
        assert all(g.placements == (rows,) for g in gradients[:2])
        assert all(g.placements == ((Replicate(),) if dim is None else (Partial(),)) for g in gradients[2:4])

    cache, positions = randn(9, 8, device=device), torch.arange(24, device=device).view(4, 6) % 9
    # PyTorch 2.11 cannot flatten positions that are sharded in their last dimension, and says so.
    for dim in (None, 0, 2, *((1,) if torch.__version__ >= "2.13" else ())):
        rows = Replicate() if dim is None else Shard(dim)
        tokens = rows if dim in (0, 1) else Replicate()
        of_tokens = {Tensor: positions, DTensor: put(positions, tokens)}

        def from_cache(q: Tensor, of_tokens: Any = of_tokens, **others: Tensor) -> Any:
            return gemma_norm.qk_norm_rope(q, **others, positions=of_tokens[type(q)])

        placements = {"q": rows, "k": rows, **dict.fromkeys([*weights, "cos_sin_cache"], Replicate())}
        compare(from_cache, {"q": q, "k": k, **weights, "cos_sin_cache": cache}, placements)

    positions = torch.arange(72, device=device).view(3, 4, 6) % 9
    named: dict[str, Any] = {"mrope_section": [2, 1, 1]}
    want = gemma_norm.qk_norm_rope(q, k, *weights.values(), cos_sin_cache=cache, positions=positions, **named)
    for dim in (0, 1, 2):
        at = put(positions, Shard(dim + 1) if dim < 2 else Replicate())
        placed = [put(t, Shard(dim)) for t in (q, k)] + [put(w, Replicate()) for w in weights.values()]
        table = put(cache, Replicate())
        with torch.no_grad(), CommDebugMode() as mode:
            got = gemma_norm.qk_norm_rope(*placed, cos_sin_cache=table, positions=at, **named)
        assert mode.get_total_counts() == 0
        for g, w in zip(got, want, strict=True):
            assert_same_bits(g.full_tensor(), w)
        fused = lambda at=at, placed=placed: gemma_norm.fused_qk_norm_rope(  # noqa: E731
            *placed, cos_sin_cache=put(cache, Replicate()), positions=at, **named
        )
        assert_raises(fused, "fused_qk_norm_rope: q is written and must be a plain tensor", NotImplementedError)


def one_more_operator(device: str) -> None:
    """A rule follows from a description alone: here of an operator whose second result is a weight's gradient."""

    @torch.library.custom_op("gemma_norm_test::backward", mutates_args=())
    def backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        n = F.rms_norm(x, x.shape[-1:], None, eps)
        return dy * weight, (dy * n).flatten(0, -2).sum(0)

    class Backward:
        name = "gemma_norm_test.backward"
        rules = {"dy": X, "x": X, "weight": WEIGHT}  # noqa: RUF012
        written = ()
        results = (Extent.LIKE_X, Extent.HIDDEN)
        overload = torch.ops.gemma_norm_test.backward.default

    @backward.register_fake
    def _(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        _sharding.declare(Backward())
        return torch.empty_like(x), torch.empty_like(weight)

    plain = {"dy": randn(*SHAPE, device=device, seed=5), **tensors(device, ("x", "weight"))}
    want = backward(*plain.values(), 1e-6)
    for dy, x in ((Shard(1), Shard(1)), (Shard(0), Replicate()), (Replicate(), Shard(2)), (Replicate(), Replicate())):
        got = backward(put(plain["dy"], dy), put(plain["x"], x), put(plain["weight"], Replicate()), 1e-6)
        for g, w in zip(got, want, strict=True):
            assert_close(g.full_tensor(), w)
        assert (got[1].placements == (Partial(),)) == isinstance(got[0].placements[0], Shard)
    assert want[1].shape == (HIDDEN,)
