"""What test_distributed.py runs in each process of a group. Every function that it names takes the device first.

Each check computes the same on whole, plain tensors, which every process has, and compares.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.experimental import implicit_replication, local_map
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import gemma_norm
from gemma_norm import _sharding
from gemma_norm._checks import WEIGHT, Extent, X
from gemma_norm.parallel import NormSequenceParallel
from support import assert_same_bits, randn

OPS = torch.ops.gemma_norm
SHAPE = (4, 6, 32)
HIDDEN = SHAPE[-1]
LIKE_X = ("x", "residual", "post", "gate")
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
    "torch.ops rms_norm": (lambda x, weight: OPS.rms_norm(x, weight=weight), ("x", "weight")),
    "torch.ops add_rms_norm": (OPS.add_rms_norm, ("x", "residual", "weight")),
    "torch.ops gated_rms_norm": (lambda x, gate, weight: OPS.gated_rms_norm(x, gate, weight), ("x", "gate", "weight")),
}


@functools.cache
def line(device: str) -> DeviceMesh:
    """All ranks in a row."""
    return init_device_mesh(device, (dist.get_world_size(),))


def put(t: Tensor, placement: Placement) -> DTensor:
    mesh = line(t.device.type)
    if isinstance(placement, Partial):
        return DTensor.from_local(t / mesh.size(), mesh, [placement])
    return distribute_tensor(t, mesh, [placement])


def tensors(device: str, names: tuple[str, ...], shape: tuple[int, ...] = SHAPE) -> dict[str, Tensor]:
    shapes = {name: shape if name in LIKE_X else shape[-1:] for name in names}
    return {name: randn(*shapes[name], device=device, seed=seed) for seed, name in enumerate(names)}


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def assert_close(got: Tensor, want: Tensor, terms: int = SHAPE[0] * SHAPE[1]) -> None:
    """Equal but for the rounding of sums of so many terms, which were added in another order."""
    unit = torch.finfo(want.dtype).eps
    limit = 4 * unit * terms**0.5 * max(1.0, float(want.abs().max()) if want.numel() else 0.0)
    torch.testing.assert_close(got, want, rtol=0, atol=limit)


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


def bfloat16(device: str) -> None:
    for name, (call, names) in CALLS.items():
        plain = {n: t.bfloat16() for n, t in tensors(device, names).items()}
        compare(call, plain, {n: Shard(1) if n in LIKE_X else Replicate() for n in names})
        assert name


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
                        lambda: gemma_norm.fused_add_rms_norm(x, residual, weight),  # noqa: B023
                        lambda: OPS.fused_add_rms_norm(x, residual, weight),  # noqa: B023
                    ),
                    "out is written .* call gemma_norm.rms_norm without out$": (
                        lambda: gemma_norm.rms_norm(x, weight, out=residual),  # noqa: B023
                        lambda: OPS.rms_norm.out(x, weight, out=residual),  # noqa: B023
                    ),
                    "out is written .* call gemma_norm.gated_rms_norm without out$": (
                        lambda: gemma_norm.gated_rms_norm(x, residual, weight, out=residual),  # noqa: B023
                    ),
                }
                for message, refused in calls.items():
                    for call in refused:
                        assert_raises(call, message)
                assert_same_bits(x.full_tensor(), plain["x"])
                assert_same_bits(residual.full_tensor(), plain["residual"])


def assert_raises(call: Callable[[], Any], message: str, kind: type[Exception] = RuntimeError) -> None:
    import pytest

    with pytest.raises(kind, match=message):
        call()


def modules_do_not_write(device: str) -> None:
    """In inference a module overwrites plain tensors alone."""
    plain = tensors(device, ("x", "residual"))
    norm = gemma_norm.RMSNorm(HIDDEN, device=device).eval()
    with torch.inference_mode():
        want = norm(*(t.clone() for t in plain.values()))
    parallelize_module(norm, line(device), NormSequenceParallel())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            x, residual = (put(t, Shard(1)) for t in plain.values())
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


def sequence_parallel_norms(device: str, compiled: bool) -> None:
    """All inputs are taken, however they are given and placed (S8)."""
    plain = tensors(device, ("x", "residual"))
    mesh = line(device)
    rank, size = mesh.get_local_rank(), mesh.size()

    def part(t: Tensor) -> Tensor:
        return t.detach().chunk(size, 1)[rank]

    def local(t: Tensor) -> Tensor:
        return t.to_local() if isinstance(t, DTensor) else t

    whole = gemma_norm.GemmaRMSNorm(HIDDEN, device=device)
    nn.init.normal_(whole.weight, std=0.1)
    leaves = [t.clone().requires_grad_() for t in plain.values()]
    want = whole(*leaves)
    (want[0].sin().sum() + want[1].cos().sum()).backward()
    for use_local_output in (False, True):
        norm = gemma_norm.GemmaRMSNorm(HIDDEN, device=device)
        if rank == 0:  # the style gives every rank the weight of the first
            norm.load_state_dict(whole.state_dict())
        parallelize_module(norm, mesh, NormSequenceParallel(use_local_output=use_local_output))
        for placement in (None, Shard(1), Shard(0), Shard(2), Replicate()):
            torch._dynamo.reset()
            call = torch.compile(lambda *a, **k: norm(*a, **k), backend="aot_eager", fullgraph=True)  # noqa: B023
            call = call if compiled else norm
            if placement is None:
                x, residual = (part(t).clone().requires_grad_() for t in plain.values())
            else:
                x, residual = (put(t, placement).requires_grad_() for t in plain.values())
            results = call(x, residual)
            for got in (results, call(x, residual=residual)):
                for g, w in zip(got, want, strict=True):
                    assert isinstance(g, DTensor) is not use_local_output
                    assert use_local_output or g.placements == (Shard(1),)
                    assert_same_bits(local(g), part(w))
            norm.zero_grad()
            (local(results[0]).sin().sum() + local(results[1]).cos().sum()).backward()
            assert norm.weight.grad.placements == (Replicate(),)
            assert_close(norm.weight.grad.full_tensor(), whole.weight.grad)
            for g, w in zip((x.grad, residual.grad), leaves, strict=True):
                assert_close(*((g, part(w.grad)) if placement is None else (g.full_tensor(), w.grad)))
        assert_same_bits(local(norm(put(plain["x"], Shard(1)), None)), part(whole(plain["x"])))
        few = put(plain["x"][:, :1], Shard(1))  # PyTorch gathers what has fewer rows than there are ranks
        assert_same_bits(local(norm(few)), part(whole(plain["x"][:, :1])) if rank == 0 else few.to_local())


def sequence_parallel_refusals(device: str) -> None:
    mesh = line(device)
    norm = parallelize_module(gemma_norm.RMSNorm(HIDDEN, device=device), mesh, NormSequenceParallel(sequence_dim=-1))
    rule = r"^NormSequenceParallel: sequence_dim must be a dimension of the inputs before the last"
    assert_raises(lambda: norm(randn(*SHAPE, device=device)), rf"{rule}.* got -1 and a tensor", ValueError)
    norm = parallelize_module(gemma_norm.RMSNorm(HIDDEN, device=device), mesh, NormSequenceParallel())
    assert_raises(
        lambda: norm(randn(6, HIDDEN, device=device)), rf"{rule}.* got 1 and a tensor of shape \[6, 32\]", ValueError
    )
    square = init_device_mesh(device, (1, mesh.size()))
    made = gemma_norm.RMSNorm(HIDDEN, device=device)
    message = r"^NormSequenceParallel: device_mesh must have one dimension, got a mesh of shape \(1, 2\)$"
    assert_raises(lambda: NormSequenceParallel()._apply(made, square), message, ValueError)
    frozen = gemma_norm.GatedRMSNorm(HIDDEN, device=device).requires_grad_(False)
    parallelize_module(frozen, mesh, NormSequenceParallel(sequence_dim=-2))
    assert not frozen.weight.requires_grad and frozen.weight.placements == (Replicate(),)
    y = frozen(*(put(t, Shard(1)) for t in tensors(device, ("x", "gate")).values()))
    want = gemma_norm.gated_rms_norm(*tensors(device, ("x", "gate")).values(), torch.ones(HIDDEN, device=device))
    assert_same_bits(y.full_tensor(), want)


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


class Block(nn.Module):
    """A layer with a residual stream: two norms called ``norm(x, residual)``, a gated one, and linear layers."""

    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.first = gemma_norm.GemmaRMSNorm(hidden)
        self.up = nn.Linear(hidden, 2 * hidden, bias=False)
        self.down = nn.Linear(2 * hidden, hidden, bias=False)
        self.second = gemma_norm.RMSNorm(hidden)
        self.gated = gemma_norm.GatedRMSNorm(hidden)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y, s = self.first(x, residual)
        y, s = self.second(self.down(F.silu(self.up(y))), s)
        return self.gated(y, s), s


class Model(nn.Module):
    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(2))
        self.narrow = nn.Linear(hidden, 1)
        self.scalar = gemma_norm.RMSNorm(1, eps=1.0)  # of its weight, one rank alone has a part

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        for block in self.blocks:
            x, residual = block(x, residual)
        return x * self.scalar(self.narrow(residual))


def make(kind: Callable[..., nn.Module], device: str, *args: Any) -> Any:
    """The same in every process."""
    torch.manual_seed(1)
    module = kind(*args)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.to(device)


STEPS = 3


def loss_of(results: tuple[Tensor, Tensor]) -> Tensor:
    """Of both results, of this rank's part of them."""
    parts = [t.to_local() if isinstance(t, DTensor) else t for t in results]
    return parts[0].square().mean() + parts[1].square().mean()


def optimizer(module: nn.Module) -> torch.optim.Optimizer:
    # eps bounds how much AdamW amplifies a gradient's rounding error: by at most lr / eps
    return torch.optim.AdamW(module.parameters(), lr=1e-2, eps=1e-4)


CLIP = 0.05


def train(module: nn.Module, loss_at: Callable[[int], Tensor]) -> list[Tensor]:
    """Train for some steps, with clipping. Return the losses and the norms of the gradients."""
    steps = optimizer(module)
    seen = []
    for step in range(STEPS):
        loss = loss_at(step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        assert float(norm) > CLIP, "nothing is clipped"
        steps.step()
        steps.zero_grad()
        seen += [loss.detach(), norm.detach()]
    return seen


def assert_same_parameters(got: nn.Module, want: nn.Module, start: nn.Module) -> None:
    assert dict(got.named_parameters()).keys() == dict(want.named_parameters()).keys()
    for (name, g), w, s in zip(got.named_parameters(), want.parameters(), start.parameters(), strict=True):
        g, w, s = (t.full_tensor().detach() if isinstance(t, DTensor) else t.detach() for t in (g, w, s))
        assert float((w - s).abs().max()) > 3e-4, f"{name} was not trained"
        torch.testing.assert_close(g, w, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def fsdp(device: str, way: str) -> None:
    """fully_shard with shards that are uneven and empty, against one process that sees the whole batch."""
    torch._dynamo.reset()
    mesh, hidden = line(device), 33
    rank, size = mesh.get_local_rank(), mesh.size()
    start = make(Model, device, hidden)
    batches = [[randn(4, 5, hidden, device=device, seed=10 * i + j) for j in range(2)] for i in range(STEPS)]
    whole = copy.deepcopy(start)
    want = train(whole, lambda i: whole(*batches[i]).square().mean())
    sharded = copy.deepcopy(start)
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    call = torch.compile(sharded, backend="aot_eager") if way == "compiled" else sharded
    got = train(sharded, lambda i: call(*(t.chunk(size)[rank] for t in batches[i])).square().mean())
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        if i % 2 == 0:  # a loss, of this rank's part
            dist.all_reduce(g)
            g = g / size
        torch.testing.assert_close(g, w, rtol=1e-5, atol=0)
    assert_same_parameters(sharded, whole, start)
    with torch.no_grad():  # the first norm then overwrites what it is given
        got, want = (m.eval()(*(t.clone() for t in batches[0])) for m in (sharded, whole))
    assert_close(got, want, 1000)


def fsdp_mixed_precision(device: str) -> None:
    """Parameters in bfloat16 for the computation and float32 for the optimizer."""
    mesh = line(device)
    sharded = make(Model, device)
    norm = sharded.blocks[0].first
    fully_shard(sharded, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    seen = []
    norm.register_forward_hook(lambda module, args, results: seen.append((module.weight.dtype, results[0].dtype)))
    x, residual = (randn(*SHAPE, device=device, seed=i) for i in range(2))
    before = [p.full_tensor().clone() for p in sharded.parameters()]
    train(sharded, lambda i: 10 * sharded(x, residual).float().square().mean())
    assert seen == [(torch.bfloat16, torch.bfloat16)] * STEPS
    for b, p in zip(before, sharded.parameters(), strict=True):
        assert p.dtype == torch.float32 and not torch.equal(b, p.full_tensor())


PLAN = {
    "first": NormSequenceParallel(),
    "up": ColwiseParallel(input_layouts=Shard(1)),
    "down": RowwiseParallel(output_layouts=Shard(1)),  # returns a plain tensor; the residual beside it is a DTensor
    "second": NormSequenceParallel(),
    "gated": NormSequenceParallel(use_local_output=True),
}


def tensor_parallel(device: str, compiled: bool) -> None:
    """A block with its sequence sharded between linear layers, trained."""
    torch._dynamo.reset()
    mesh = line(device)
    rank, size = mesh.get_local_rank(), mesh.size()
    start = make(Block, device)
    batches = [[randn(*SHAPE, device=device, seed=10 * i + j) for j in range(2)] for i in range(STEPS)]
    whole = copy.deepcopy(start)
    want = train(whole, lambda i: loss_of(whole(*batches[i])))
    sharded = parallelize_module(copy.deepcopy(start), mesh, PLAN)
    call = torch.compile(sharded, backend="aot_eager", fullgraph=True) if compiled else sharded
    # each rank's part of the mean: the sum over the ranks is the loss
    got = train(sharded, lambda i: loss_of(call(*(t.chunk(size, 1)[rank] for t in batches[i]))) / size)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        if i % 2 == 0:
            dist.all_reduce(g)
        torch.testing.assert_close(g, w, rtol=1e-5, atol=0)
    assert_same_parameters(sharded, whole, start)


def mesh_of_two_dimensions(device: str, data: int, tensor: int) -> None:
    """fully_shard over the data dimension of a block that is tensor-parallel over the other."""
    mesh = init_device_mesh(device, (data, tensor), mesh_dim_names=("data", "tensor"))
    start = make(Block, device)
    batches = [[randn(*SHAPE, device=device, seed=10 * i + j) for j in range(2)] for i in range(STEPS)]
    whole = copy.deepcopy(start)
    want = train(whole, lambda i: loss_of(whole(*batches[i])))
    sharded = parallelize_module(copy.deepcopy(start), mesh["tensor"], PLAN)
    fully_shard(sharded, mesh=mesh["data"])
    row, column = mesh.get_coordinate()

    def part(t: Tensor) -> Tensor:
        return t.chunk(data)[row].chunk(tensor, 1)[column]

    got = train(sharded, lambda i: loss_of(sharded(*map(part, batches[i]))) / tensor)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        if i % 2 == 0:
            dist.all_reduce(g)
            g = g / data
        torch.testing.assert_close(g, w, rtol=1e-5, atol=0)
    assert_same_parameters(sharded, whole, start)


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


class Stages(nn.Module):
    """Two blocks in a row, with one result."""

    def __init__(self) -> None:
        super().__init__()
        self.lower, self.upper = Block(), Block()

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.upper(*self.lower(x, residual))[0]


def a_pipeline(device: str) -> None:
    """A model that the tracer of torch.distributed.pipelining has split, a stage in each process."""
    from torch.distributed.pipelining import ScheduleGPipe, SplitPoint, pipeline

    model = make(Stages, device)
    batch = [randn(*SHAPE, device=device, seed=i) for i in range(2)]
    target = randn(*SHAPE, device=device, seed=2)
    want = model(*batch)
    F.mse_loss(want, target).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    micro = tuple(t.chunk(2)[0] for t in batch)
    pipe = pipeline(model, mb_args=micro, split_spec={"upper": SplitPoint.BEGINNING})
    rank = dist.get_rank()
    stage = pipe.build_stage(rank, torch.device(device, rank) if device == "cuda" else torch.device(device))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=F.mse_loss)
    if rank == 0:
        schedule.step(*batch)
    else:
        assert_close(schedule.step(target=target), want.detach(), 100)
    parameters = dict(stage.submod.named_parameters())
    assert parameters and all(name.startswith(("lower", "upper")[rank]) for name in parameters)
    for name, parameter in parameters.items():
        assert_close(parameter.grad, gradients[name], 100)


def data_parallel(device: str) -> None:
    model = make(Block, device)
    batch = [randn(*SHAPE, device=device, seed=i) for i in range(2)]
    model(*batch)[0].square().mean().backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    rank, size = dist.get_rank(), dist.get_world_size()
    parallel = nn.parallel.DistributedDataParallel(model)
    parallel(*(t.chunk(size)[rank] for t in batch))[0].square().mean().backward()
    for p, w in zip(model.parameters(), want, strict=True):
        assert_close(p.grad, w, 1000)
