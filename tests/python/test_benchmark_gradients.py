"""The suites that time derivatives: every provider is checked before, and a wrong gradient is refused."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmark_support import BRIEF, HERE, measure
from gemma_norm import reference
from gemma_norm.benchmark import __main__ as command
from gemma_norm.benchmark import check_gradients, gradients, results, run, timing
from gemma_norm.benchmark.cases import ADD_RMS_NORM, BACKWARD, BOTH, GATED_RMS_NORM, RMS_NORM, Point
from gemma_norm.benchmark.check import WrongResult
from gemma_norm.benchmark.formula import EPS
from gemma_norm.benchmark.providers import PROVIDERS, Provider
from gemma_norm.benchmark.suites import SUITES, Choice

DERIVED_OPS = (RMS_NORM, ADD_RMS_NORM, GATED_RMS_NORM)
NAMES = {RMS_NORM: "rms_norm", ADD_RMS_NORM: "add_rms_norm", GATED_RMS_NORM: "gated_rms_norm"}


def point(op: str = RMS_NORM, rows: int = 40, hidden: int = 256, dtype: torch.dtype = torch.bfloat16) -> Point:
    return Point("backward-cpu", op, rows, hidden, dtype, "cpu", threads=1, work=BACKWARD)


@pytest.mark.parametrize("suite", ["backward-cpu", "train-host"])
def test_a_run_from_the_command_line(suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv = tmp_path / "new.csv"
    line = ["--suite", suite, "--quick", "--rows", "3", "--hidden", "64", *HERE[:1], HERE[1] + ",torch.add"]
    assert command.main([*line, "--csv", str(csv)]) == 0
    found = results.read_csv(csv)[1]
    assert all(r.p50_us > 0 or "has no gated_rms_norm" in r.note for r in found)
    host = suite == "train-host"
    assert {r.op for r in found} == set(list(NAMES.values())[: 2 if host else 3])
    assert {r.provider for r in found} == {"ours", "eager", "F.rms_norm", *(() if host else ("copy_", "torch.add"))}
    if not host:
        wanted = {"rms_norm": 3 * 3 + 2, "add_rms_norm": 4 * 3 + 2, "gated_rms_norm": 5 * 3 + 2}
        assert {(r.op, r.bytes) for r in found if r.p50_us} == {(op, n * 64 * 2) for op, n in wanted.items()}
    screen = capsys.readouterr().out
    assert "next best" in screen and "F.rms_norm*" in screen and "ours*" not in screen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op", DERIVED_OPS)
@pytest.mark.parametrize("work", [BACKWARD, BOTH])
def test_every_gradient_here_is_right(op: str, dtype: torch.dtype, work: str) -> None:
    at = replace(point(op, 33, 576, dtype), work=work)
    found = measure(at, *(PROVIDERS[n] for n in ("ours", "eager", "F.rms_norm")))
    notes = {n: r.note for n, r in found.items()}
    if op == GATED_RMS_NORM:
        assert "has no gated_rms_norm" in notes.pop("F.rms_norm")
    assert set(notes.values()) == {""} and found["ours"].op == NAMES[op]


def test_of_a_large_tensor_some_rows_are_checked_and_all_rows_of_the_weights_sum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(check_gradients.MOST, "cpu", 5 * 256)
    found = measure(point(rows=41), PROVIDERS["ours"], derived("half", lambda dx, dw: (dx, dw * 0.9)))
    assert not found["ours"].note and "the gradient of weight is off by" in found["half"].note


Change = Callable[..., tuple[Tensor, ...]]


class Changed(torch.autograd.Function):
    """The identity, whose gradients are replaced by what ``change`` makes of the right ones."""

    @staticmethod
    def forward(ctx, change: Change, outputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.change, ctx.outputs = change, outputs
        ctx.save_for_backward(*tensors)
        with torch.enable_grad():
            ctx.graph = [t.detach().requires_grad_() for t in tensors]
            ctx.results = formula(*ctx.graph)
        return tuple(r.detach() for r in ctx.results)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            right = torch.autograd.grad(ctx.results, ctx.graph, gradients, retain_graph=True)
        return None, None, *ctx.change(*right)


def formula(*tensors: Tensor) -> tuple[Tensor, ...]:
    *inputs, weight = tensors
    if len(inputs) == 1:
        return (reference.rms_norm(*inputs, weight, EPS, True),)
    return reference.add_rms_norm(*inputs, weight, EPS, True)


def derived(name: str, change: Change) -> Provider:
    """A provider whose gradients are right, but for ``change``."""

    def make(op: str, weight: Tensor, gemma: bool) -> gradients.Function:
        return lambda *leaves: Changed.apply(change, len(leaves), *leaves, weight)

    return Provider(name, make, DERIVED_OPS, gradient=make)


@dataclass(frozen=True)
class Wrong:
    what: str
    change: Change
    note: str
    op: str = RMS_NORM

    def __str__(self) -> str:
        return self.what


def without_last_rows(dx: Tensor, dw: Tensor) -> tuple[Tensor, ...]:
    return dx, dw * 0.95


def holed(dx: Tensor, dw: Tensor) -> tuple[Tensor, ...]:
    dx = dx.clone()
    dx[-1, -1] = torch.nan
    return dx, dw


WRONG = [
    Wrong("x scaled", lambda dx, dw: (dx * 1.2, dw), "the gradient of x is off by"),
    Wrong("rows missing from the weight's", without_last_rows, "the gradient of weight is off by"),
    Wrong("not written", holed, "the gradient of x has NaN"),
    Wrong("rows mixed up", lambda dx, dw: (dx.flip(0), dw), "the gradient of x is off by"),
    Wrong("residual's lost", lambda dx, dr, dw: (dx, dr * 0, dw), "the gradient of the residual is off", ADD_RMS_NORM),
    Wrong("the sum's lost", lambda dx, dr, dw: (dx - dr / 2, dr, dw), "the gradient of x is off", ADD_RMS_NORM),
]


@pytest.mark.parametrize("case", WRONG, ids=str)
def test_a_wrong_gradient_is_noted_and_not_timed(case: Wrong) -> None:
    right = derived("right", lambda *gradients: gradients)
    found = measure(point(case.op), derived("wrong", case.change), right, PROVIDERS["copy_"])
    assert found["wrong"].p50_us == 0 and case.note in found["wrong"].note
    assert found["right"].p50_us > 0 and found["right"].of_copy > 0 and not found["right"].note


def test_an_incoming_gradient_of_0_hides_no_error() -> None:
    """There the gate's gradient is exactly 0, and so is what it may be off by."""
    inputs = gradients.GradientInputs(point(GATED_RMS_NORM), 1)
    inputs.original[0][3, 5] = 0
    call = gradients.call_of(gradients.ours(GATED_RMS_NORM, inputs.weight, False), inputs)
    check_gradients.check(PROVIDERS["ours"], call, inputs, False)

    def wrong(*arguments: object) -> tuple[Tensor, ...]:
        dx, dgate, dw = call(*arguments)
        return dx, dgate * 1.5, dw

    with pytest.raises(WrongResult, match="the gradient of the gate is off by"):
        check_gradients.check(PROVIDERS["ours"], wrong, inputs, False)


def test_the_term_of_the_mean_is_not_lost_in_noise() -> None:
    """Without it, the gradient of x would be that of a product with a constant."""

    class Constant(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return reference.rms_norm(x, weight, EPS, True)

        @staticmethod
        def backward(ctx, dy: Tensor) -> tuple[Tensor, ...]:
            x, weight = (t.float() for t in ctx.saved_tensors)
            n = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
            rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
            return (dy * rstd * (1 + weight)).to(dy.dtype), (dy * n).sum(0).to(dy.dtype)

    make = lambda op, weight, gemma: lambda x: Constant.apply(x, weight)  # noqa: E731
    found = measure(point(hidden=4096, rows=8), Provider("wrong", make, gradient=make))
    assert "the gradient of x is off by" in found["wrong"].note


def test_only_a_provider_that_says_so_may_write_into_the_incoming_gradient() -> None:
    class InPlace(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return reference.rms_norm(x, weight, EPS, True)

        @staticmethod
        def backward(ctx, dy: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                graph = [t.detach().requires_grad_() for t in ctx.saved_tensors]
                dx, dw = torch.autograd.grad(reference.rms_norm(*graph, EPS, True), graph, dy)
            return dy.copy_(dx), dw

    make = lambda op, weight, gemma: lambda x: InPlace.apply(x, weight)  # noqa: E731
    honest = Provider("honest", make, gradient=make, writes_gradient=True)
    found = measure(point(), Provider("wrong", make, gradient=make), honest, PROVIDERS["ours"])
    assert "an incoming gradient was written" in found["wrong"].note
    assert not found["honest"].note and not found["ours"].note


def test_gradients_are_new_and_the_backward_pass_can_be_repeated() -> None:
    inputs = gradients.GradientInputs(point(), 3)
    call = gradients.call_of(gradients.ours(RMS_NORM, inputs.weight, True), inputs)
    first, again = call(*inputs.sets[2]), call(*inputs.sets[2])
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in zip(first, again, strict=True))
    assert inputs.weight.grad is None and all(t.grad is None for leaves in inputs.leaves for t in leaves)


def test_only_providers_with_a_derivative_are_measured() -> None:
    fit = [name for name, p in PROVIDERS.items() if p.fits(point())]
    wanted = ["ours", "copy_", "torch.add", "eager", "F.rms_norm", "torch.compile"]
    assert fit == [*wanted, "liger", "liger:in_place", "quack", "fla"]
    both = replace(point(), suite="train-host", work=BOTH)
    assert [n for n in fit if not PROVIDERS[n].fits(both)] == ["copy_", "torch.add"]
    forward = Point("forward", RMS_NORM, 8, 64, torch.bfloat16, "cpu")
    assert not any(PROVIDERS[n].fits(forward) for n in ("torch.add", "liger:in_place", "ours:module"))


class Liger:
    """Stand-ins with the signatures of Liger 0.8.5, whose second function is called with the residual after x."""

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
            assert (eps, offset, casting_mode) == (EPS, 1.0, "gemma")
            ctx.in_place = in_place
            ctx.save_for_backward(X, W)
            return reference.rms_norm(X, W, eps, True)

        @staticmethod
        def backward(ctx, dY):
            with torch.enable_grad():
                graph = [t.detach().requires_grad_() for t in ctx.saved_tensors]
                dX, dW = torch.autograd.grad(reference.rms_norm(*graph, EPS, True), graph, dY)
            return dY.copy_(dX) if ctx.in_place else dX, dW, None, None, None, None, None

    class AddNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, X, R, W, eps, offset=0.0, casting_mode="llama", in_place=False):
            assert (eps, offset, casting_mode) == (EPS, 1.0, "gemma")
            ctx.in_place = in_place
            y, s = reference.add_rms_norm(X, R, W, eps, True)
            ctx.save_for_backward(s, W)
            return y, s

        @staticmethod
        def backward(ctx, dY, dS):
            with torch.enable_grad():
                graph = [t.detach().requires_grad_() for t in ctx.saved_tensors]
                dX, dW = torch.autograd.grad(reference.rms_norm(*graph, EPS, True), graph, dY)
            dX = dY.copy_(dX + dS) if ctx.in_place else dX + dS
            return dX, dX, dW, None, None, None, None


def quack(x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6, prenorm=False,
          weight_offset=0.0):  # fmt: skip
    """A stand-in with the signature of QuACK 0.6.5."""
    assert weight_offset == 1.0 and prenorm is (residual is not None)
    if residual is None:
        return reference.rms_norm(x, weight, eps, True)
    return reference.add_rms_norm(x, residual, weight, eps, True)


@pytest.mark.parametrize("op", [RMS_NORM, ADD_RMS_NORM])
@pytest.mark.parametrize("work", [BACKWARD, BOTH])
def test_peers_are_called_as_they_are_published(op: str, work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = SimpleNamespace(LigerRMSNormFunction=Liger.Norm, LigerFusedAddRMSNormFunction=Liger.AddNorm)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", ops)
    monkeypatch.setitem(sys.modules, "quack", SimpleNamespace(rmsnorm=quack))
    names = ("liger", "liger:in_place", "quack", "ours")
    found = measure(replace(point(op), work=work), *(PROVIDERS[name] for name in names))
    assert {name: r.note for name, r in found.items()} == dict.fromkeys(names, "")


def test_the_points_of_the_suites() -> None:
    points = list(SUITES["backward"].points(Choice()))
    shapes = {*product((4096, 16384, 32768), (1024, 2048, 4096, 5120, 8192)), (65536, 256)}
    assert {(p.op, p.rows, p.hidden) for p in points} == {(op, *shape) for op in DERIVED_OPS for shape in shapes}
    assert {(p.cache, p.device, p.work) for p in points} == {("cold", "cuda", BACKWARD)}
    few = list(SUITES["backward-few"].points(Choice()))
    assert len(few) == 3 * 4 * 3 and {timing.sets_for(p) for p in few} == {16}
    cpu = {(p.rows, p.hidden) for p in SUITES["backward-cpu"].points(Choice())}
    assert {(8192, 4096), (65536, 256), (1024, 4096), (1, 4096)} <= cpu


def test_graphs_are_captured_on_the_stream_of_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for torch.cuda. Autograd runs the backward pass on that stream, whatever the current one is."""
    current: list[object] = [None]
    used: list[object] = []
    synchronized: list[object] = []

    @contextlib.contextmanager
    def stream(new: object):
        current.append(new)
        yield
        current.pop()

    def graph(graph: object, stream: object, capture_error_mode: str) -> contextlib.AbstractContextManager[None]:
        used.append(stream)
        return contextlib.nullcontext()

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...
        def record(self) -> None: ...
        def synchronize(self) -> None: ...
        def elapsed_time(self, other: Event) -> float:
            return 1.0

    fake = SimpleNamespace(
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: None),
        Event=Event,
        graph=graph,
        synchronize=lambda: synchronized.append(current[-1]),
        current_stream=lambda: current[-1],
        stream=stream,
        Stream=lambda: "its own stream",
    )
    monkeypatch.setattr(timing, "cuda", fake)
    monkeypatch.setattr(run, "cuda", fake)
    run._stream.cache_clear()
    forward: list[object] = []

    def make(op: str, weight: Tensor, gemma: bool) -> gradients.Function:
        def norm(x: Tensor) -> Tensor:
            forward.append(current[-1])
            return reference.rms_norm(x, weight, EPS, gemma)

        return norm

    inputs = gradients.GradientInputs(point(), 3)
    inputs.point = replace(inputs.point, device="cuda", suite="backward")
    run._prepare_gradient(Provider("some", make, gradient=make), inputs, BRIEF, True)
    run._stream.cache_clear()
    assert forward == ["its own stream"] * 3 and set(used) == {"its own stream"} and current == [None]
    assert "its own stream" in synchronized


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("suite", ["backward", "backward-few", "train-host"])
def test_on_a_gpu(suite: str, tmp_path: Path) -> None:
    csv = tmp_path / "gpu.csv"
    line = ["--suite", suite, "--quick", "--rows", "8,64", "--hidden", "64", "--csv", str(csv)]
    assert command.main([*line, "--providers", "ours,copy_,torch.add,eager,F.rms_norm,torch.compile"]) == 0
    found = results.read_csv(csv)[1]
    assert found and all(r.p50_us > 0 or "has no gated_rms_norm" in r.note for r in found)
