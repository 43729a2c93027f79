"""Checks of modules and of their training, which test_distributed.py runs in each process of a group.

Each compares with the same model in one process, on the whole batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import gemma_norm
from distributed_tensors import HIDDEN, SHAPE, assert_close, assert_raises, line, put, tensors
from gemma_norm.parallel import NormSequenceParallel
from support import assert_same_bits, randn


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
    for bad, rule in (("sequence_dim", "an integer"), ("use_local_output", "a bool")):
        message = rf"^NormSequenceParallel: {bad} must be {rule}, got 'no'$"
        assert_raises(partial(NormSequenceParallel, **{bad: "no"}), message, ValueError)
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
