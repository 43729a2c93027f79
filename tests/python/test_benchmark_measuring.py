"""The benchmark measures what it says, refuses wrong results, and notes what it could not measure."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmark_support import BRIEF, HERE, TINY, correct, measure, point
from gemma_norm import reference
from gemma_norm.benchmark import __main__ as command
from gemma_norm.benchmark import norms, providers, report, results, timing
from gemma_norm.benchmark.cases import (
    ADD_RMS_NORM,
    GATED_RMS_NORM,
    NORM_ADD_NORM,
    OPS,
    RMS_NORM,
    Inputs,
    post_weight,
)
from gemma_norm.benchmark.formula import EPS
from gemma_norm.benchmark.providers import PROVIDERS, Provider
from gemma_norm.benchmark.results import Result
from gemma_norm.benchmark.suites import FORWARD_HIDDEN, SUITES, Choice


@pytest.mark.parametrize("suite", ["cpu", "host"])
def test_a_run_from_the_command_line(suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv, json_ = tmp_path / "new.csv", tmp_path / "new.json"
    arguments = [*TINY, *HERE, "--suite", suite, "--csv", str(csv), "--json", str(json_)]
    assert command.main(arguments) == 0
    facts, found = results.read_csv(csv)
    written = json.loads(json_.read_text())
    assert written["environment"] == facts
    assert [Result(**r) for r in written["results"]] == found
    assert {"date", "cpu", "torch", "commit", "gemma_norm", "peers"} <= set(facts)
    assert all(r.p20_us > 0 and r.p20_us <= r.p50_us <= r.p80_us and not r.note for r in found)
    weights = {"copy_": "none", "F.rms_norm": "plain"}
    assert all(r.weight == weights.get(r.provider, "gemma") for r in found)
    assert {(r.op, r.rows) for r in found} == set(product(OPS, (2, 8)))
    screen = capsys.readouterr()
    assert f"{suite}: " in screen.out and "F.rms_norm*" in screen.out and "next best" in screen.out
    assert "0/" in screen.err
    if suite == "cpu":
        assert all(r.of_copy == 1 for r in found if r.provider == "copy_")
        assert {r.bytes for r in found if r.rows == 8} == {(2 * 8 + 1) * 64 * 2, (4 * 8 + 1) * 64 * 2}
    else:
        assert {"ours", "ours:torch.ops", "ours:module"} <= {r.provider for r in found}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op", [*OPS, NORM_ADD_NORM])
def test_every_provider_here_is_right(op: str, dtype: torch.dtype) -> None:
    names = ("ours", "copy_", "eager", "F.rms_norm", *(["ours:two calls"] if op == NORM_ADD_NORM else []))
    suite = "norm-add" if op == NORM_ADD_NORM else "cpu"
    found = measure(replace(point(op, 33, 576, dtype), suite=suite), *(PROVIDERS[n] for n in names))
    assert {n: r.note for n, r in found.items()} == dict.fromkeys(names, "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_gated_norm_here_is_right(dtype: torch.dtype) -> None:
    names = ("ours", "copy_", "eager")
    at = replace(point(GATED_RMS_NORM, 33, 576, dtype), suite="gated")
    found = measure(at, *(PROVIDERS[n] for n in names), PROVIDERS["fla"])
    assert {n: found[n].note for n in names} == dict.fromkeys(names, "")
    assert [found[n].weight for n in names] == ["plain", "none", "plain"]
    assert {found[n].bytes for n in names} == {(3 * 33 + 1) * 576 * dtype.itemsize} and found["fla"].note


def test_a_gated_norm_without_its_gate_is_not_timed() -> None:
    def no_gate(op: str, weight: torch.Tensor, gemma: bool) -> norms.Call:
        return lambda x, gate: reference.rms_norm(x, weight, EPS, gemma)

    found = measure(point(GATED_RMS_NORM), Provider("wrong", no_gate, (GATED_RMS_NORM,), exact=True))
    assert found["wrong"].p50_us == 0 and "units in the last place" in found["wrong"].note


def unwritten(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The right result except for its last element, which is NaN: what the benchmark fills memory with before a call.

    A provider that leaves an element unwritten need not leave NaN there, as small allocations on CPUs may get other
    memory. So it is written here.
    """
    y = torch.full_like(x, torch.nan)
    y.flatten()[:-1] = reference.rms_norm(x, w, EPS, True).flatten()[:-1]
    return y


@dataclass(frozen=True)
class Wrong:
    """A provider whose result must not be timed."""

    what: str
    function: Callable[..., object]  # of the operator's tensors, the weight last
    note: str  # part of what the benchmark says of it
    op: str = RMS_NORM

    def __str__(self) -> str:
        return self.what


WRONG = [
    Wrong("output not written", lambda x, w: torch.full_like(x, torch.nan), "has NaN"),
    Wrong("last element not written", lambda x, w: unwritten(x, w), "has NaN"),
    Wrong("no 1 +", lambda x, w: reference.rms_norm(x, w, EPS), "units in the last place"),
    Wrong("nothing done", lambda x, w: x.clone(), "units in the last place"),
    Wrong("x written", lambda x, w: x.copy_(reference.rms_norm(x, w, EPS, True)), "not to be written"),
    Wrong("other dtype", lambda x, w: reference.rms_norm(x.float(), w, EPS, True), "torch.float32"),
    Wrong("transposed", lambda x, w: reference.rms_norm(x, w, EPS, True).T, "[256, 16]"),
    Wrong("old residual", lambda x, r, w: (reference.add_rms_norm(x, r, w, EPS, True)[0], r), "the sum", ADD_RMS_NORM),
    Wrong("no addition", lambda x, r, w: (reference.rms_norm(x, w, EPS, True), x + r), "the result", ADD_RMS_NORM),
    Wrong("x not normalised", lambda x, r, w: reference.add_rms_norm(x, r, w, EPS, True), "the sum is", NORM_ADD_NORM),
    Wrong(
        "one weight for both norms",
        lambda x, r, w: reference.rms_norm_add_rms_norm(x, r, w, w, EPS, True),
        "the sum is",
        NORM_ADD_NORM,
    ),
    Wrong(
        "the sum not normalised",
        lambda x, r, w: (reference.rms_norm_add_rms_norm(x, r, post_weight(w), w, EPS, True)[1],) * 2,
        "the result is",
        NORM_ADD_NORM,
    ),
    Wrong("fails", lambda x, w: x @ w[1:], "RuntimeError"),
    Wrong("too large", lambda x, w: x.new_empty(2**55), "out of memory"),
]


@pytest.mark.parametrize("case", WRONG, ids=str)
def test_a_wrong_provider_is_noted_and_not_timed(case: Wrong) -> None:
    wrong = Provider(
        "wrong", lambda op, weight, gemma: lambda *tensors: case.function(*tensors, weight), providers.ALL, exact=True
    )
    found = measure(point(case.op, 16, 256), wrong, Provider("right", correct, providers.ALL), PROVIDERS["copy_"])
    assert found["wrong"].p50_us == 0 and case.note in found["wrong"].note, found["wrong"]
    assert found["right"].p50_us > 0 and found["right"].of_copy > 0 and not found["right"].note
    table = report.table("cpu", list(found.values()))
    assert "[1]" in table and f"[1] wrong: {found['wrong'].note}" in table


def test_only_other_roundings_are_forgiven() -> None:
    """A peer may round ``1 + w`` to bfloat16, our own provider may not. A weight that is off by more is refused to
    both.
    """
    rounded = lambda op, w, gemma: lambda x: reference.rms_norm(x, 1 + w, EPS)  # noqa: E731
    far = lambda op, w, gemma: lambda x: reference.rms_norm(x, (1 + w.float()) * 1.05, EPS)  # noqa: E731
    made = [Provider("peer", rounded), Provider("ours", rounded, exact=True), Provider("far", far)]
    found = measure(point(), *made)
    assert not found["peer"].note
    assert "units in the last place" in found["ours"].note and "units in the last place" in found["far"].note


def test_a_missing_operator_and_a_failure_while_timed_are_noted() -> None:
    calls = []

    def tires(op: str, weight: torch.Tensor, gemma: bool) -> norms.Call:
        def call(x: torch.Tensor) -> torch.Tensor:
            calls.append(x)
            if len(calls) > 5:  # One call checks the result, and four tell how long a call takes.
                raise RuntimeError("tired")
            return reference.rms_norm(x, weight, EPS, gemma)

        return call

    found = measure(point(), Provider("none", correct, ops=()), Provider("tires", tires), Provider("right", correct))
    assert "none has no rms_norm" in found["none"].note
    assert found["right"].p50_us > 0
    assert found["tires"].p50_us == 0 and "RuntimeError: tired" in found["tires"].note


def test_the_points_of_the_suites() -> None:
    points = {name: list(suite.points(Choice())) for name, suite in SUITES.items()}
    assert {(p.op, p.hidden) for p in points["forward"]} == set(product(OPS, FORWARD_HIDDEN))
    assert all(p.cache == "cold" and p.rows * p.hidden * 2 >= 64 * 2**20 for p in points["forward"])
    assert len(points["decode"]) == 2 * 9 * 4 and {p.cache for p in points["decode"]} == {"hot"}
    assert {p.hidden for p in points["qk"]} == {64, 128, 256}
    threads = {1, torch.get_num_threads()}
    assert len(points["cpu"]) == 2 * 2 * (5 * 7 + 1) * len(threads)
    for name, suite in SUITES.items():
        assert 0 < len(list(suite.points(Choice(quick=True)))) < len(points[name])
        assert len(set(points[name])) == len(points[name])
    picked = list(SUITES["decode"].points(Choice((torch.float16,), (3,), (40, 50))))
    assert [(p.op, p.rows, p.hidden, p.dtype) for p in picked] == [
        (op, 3, hidden, torch.float16) for op, hidden in product(OPS, (40, 50))
    ]


def test_the_heads_of_a_fused_buffer_are_apart_and_inside_it() -> None:
    for p in SUITES["qk"].points(Choice(rows=(3,))):
        x = Inputs(replace(p, device="cpu"), 1).sets[0][0]
        assert x.shape == (3, p.heads.count, p.hidden) and x.stride(-1) == 1
        last = x.storage_offset() + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        assert p.heads.step >= p.hidden and last < 3 * p.heads.row == x.untyped_storage().nbytes() // 2
        found = measure(replace(p, device="cpu", suite="cpu", threads=1), PROVIDERS["ours"], PROVIDERS["copy_"])
        assert all(r.p50_us > 0 for r in found.values()), found


def test_graphs_rotate_restore_and_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's timing on a stand-in for torch.cuda whose every call takes 10 us."""
    captured: list[int] = []
    replays: list[bool] = []

    class Graph:
        def replay(self) -> None:
            self.calls = len(captured)
            replays.append(all(torch.equal(x, inputs.original[0]) for x, _ in inputs.sets))

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...
        def record(self) -> None: ...
        def synchronize(self) -> None: ...
        def elapsed_time(self, other: Event) -> float:
            return len(captured) * 0.01

    def graph(graph: Graph, stream: object, capture_error_mode: str) -> contextlib.AbstractContextManager[None]:
        captured.clear()
        return contextlib.nullcontext()

    fake = SimpleNamespace(
        CUDAGraph=Graph,
        Event=Event,
        graph=graph,
        synchronize=lambda: None,
        current_stream=lambda: None,
        stream=contextlib.nullcontext,
    )
    monkeypatch.setattr(timing, "cuda", fake)
    inputs = Inputs(point(ADD_RMS_NORM), sets=3)

    def call(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        captured.append(next(i for i, s in enumerate(inputs.sets) if s[0] is x))
        return x.add_(1)

    timed = timing.GraphTimed(call, inputs, BRIEF)
    assert captured == [0, 1, 2] * 17 and timed.calls == 51, "500 us of 10 us calls, in whole rotations over 3 sets"
    for x, _ in inputs.sets:
        x.fill_(1)
    replays.clear()
    assert timed.sample() == pytest.approx(10.0)
    assert replays == [False, True], "the timed replay starts from restored values"

    def refuses(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if len(captured) > 3:
            raise RuntimeError("operation not permitted when stream is capturing")
        return call(x, residual)

    captured.clear()
    with pytest.raises(timing.NotCaptured, match="no CUDA graph of it: RuntimeError: operation not permitted"):
        timing.GraphTimed(refuses, inputs, BRIEF)


def test_cold_sets_outgrow_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(L2_cache_size=60 * 2**20)
    monkeypatch.setattr(timing, "cuda", SimpleNamespace(get_device_properties=lambda device: properties))
    for name, quick in product(("forward", "decode", "qk"), (False, True)):
        for p in SUITES[name].points(Choice(quick=quick)):
            sets = timing.sets_for(p)
            assert sets == 1 if p.cache == "hot" else sets >= 2 and sets * p.bytes >= 6 * properties.L2_cache_size


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("suite", ["forward", "decode", "qk", "norm-add", "host"])
def test_on_a_gpu(suite: str, tmp_path: Path) -> None:
    csv = tmp_path / "gpu.csv"
    assert command.main(["--suite", suite, "--quick", "--hidden", "64", *HERE, "--csv", str(csv)]) == 0
    found = results.read_csv(csv)[1]
    assert found and all(r.p50_us > 0 and not r.note for r in found)
