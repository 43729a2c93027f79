"""The benchmark measures what it says, refuses wrong results, and says what it could not measure."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gemma_norm import reference
from gemma_norm.benchmark import __main__ as command
from gemma_norm.benchmark import arguments, environment, plot, providers, report, results, timing
from gemma_norm.benchmark.cases import ADD_RMS_NORM, EPS, GATED_RMS_NORM, OPS, RMS_NORM, Inputs, Point
from gemma_norm.benchmark.providers import PROVIDERS, Provider
from gemma_norm.benchmark.results import Result
from gemma_norm.benchmark.run import run
from gemma_norm.benchmark.suites import FORWARD_HIDDEN, SUITES, Choice
from gemma_norm.benchmark.timing import Effort, Timing
from support import on_a_terminal, shown

BRIEF = Effort(rounds=2, warm_up=0.0, seconds=0.001)
TINY = ["--suite", "cpu", "--quick", "--rows", "2,8", "--hidden", "64"]
HERE = ["--providers", "ours,copy_,eager,F.rms_norm"]


def point(op: str = RMS_NORM, rows: int = 8, hidden: int = 64, dtype: torch.dtype = torch.bfloat16) -> Point:
    return Point("cpu", op, rows, hidden, dtype, "cpu", threads=1)


def measure(at: Point, *measured: Provider) -> dict[str, Result]:
    ((*found,),) = run([at], measured, BRIEF, gemma=True)
    return {r.provider: r for r in found}


def correct(op: str, weight: torch.Tensor, gemma: bool) -> providers.Call:
    if op == RMS_NORM:
        return lambda x: reference.rms_norm(x, weight, EPS, gemma)
    return lambda x, residual: reference.add_rms_norm(x, residual, weight, EPS, gemma)


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
@pytest.mark.parametrize("op", OPS)
def test_every_provider_here_is_right(op: str, dtype: torch.dtype) -> None:
    names = ("ours", "copy_", "eager", "F.rms_norm")
    found = measure(point(op, 33, 576, dtype), *(PROVIDERS[n] for n in names))
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
    def no_gate(op: str, weight: torch.Tensor, gemma: bool) -> providers.Call:
        return lambda x, gate: reference.rms_norm(x, weight, EPS, gemma)

    found = measure(point(GATED_RMS_NORM), Provider("wrong", no_gate, (GATED_RMS_NORM,), exact=True))
    assert found["wrong"].p50_us == 0 and "units in the last place" in found["wrong"].note


def unwritten(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Right but for one element, which has what poisoned memory holds. Whether small CPU allocations get such is chance."""
    y = torch.full_like(x, torch.nan)
    y.flatten()[:-1] = reference.rms_norm(x, w, EPS, True).flatten()[:-1]
    return y


WRONG = {
    "output not written": (RMS_NORM, lambda x, w: torch.full_like(x, torch.nan), "has NaN"),
    "last element not written": (RMS_NORM, lambda x, w: unwritten(x, w), "has NaN"),
    "no 1 +": (RMS_NORM, lambda x, w: reference.rms_norm(x, w, EPS), "units in the last place"),
    "nothing done": (RMS_NORM, lambda x, w: x.clone(), "units in the last place"),
    "x written": (RMS_NORM, lambda x, w: x.copy_(reference.rms_norm(x, w, EPS, True)), "not to be written"),
    "other dtype": (RMS_NORM, lambda x, w: reference.rms_norm(x.float(), w, EPS, True), "torch.float32"),
    "transposed": (RMS_NORM, lambda x, w: reference.rms_norm(x, w, EPS, True).T, "[256, 16]"),
    "old residual": (ADD_RMS_NORM, lambda x, r, w: (reference.add_rms_norm(x, r, w, EPS, True)[0], r), "the sum"),
    "no addition": (ADD_RMS_NORM, lambda x, r, w: (reference.rms_norm(x, w, EPS, True), x + r), "the result"),
    "fails": (RMS_NORM, lambda x, w: x @ w[1:], "RuntimeError"),
    "too large": (RMS_NORM, lambda x, w: x.new_empty(2**55), "out of memory"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_provider_is_noted_and_not_timed(what: str) -> None:
    op, function, note = WRONG[what]
    wrong = Provider("wrong", lambda op, weight, gemma: lambda *tensors: function(*tensors, weight), exact=True)
    found = measure(point(op, 16, 256), wrong, Provider("right", correct), PROVIDERS["copy_"])
    assert found["wrong"].p50_us == 0 and note in found["wrong"].note, found["wrong"]
    assert found["right"].p50_us > 0 and found["right"].of_copy > 0 and not found["right"].note
    table = report.table("cpu", list(found.values()))
    assert "[1]" in table and f"[1] wrong: {found['wrong'].note}" in table


def test_only_other_roundings_are_forgiven() -> None:
    """Rounding ``1 + w`` to bfloat16 passes for others, not for ours; a weight off by more passes for none."""
    rounded = lambda op, w, gemma: lambda x: reference.rms_norm(x, 1 + w, EPS)  # noqa: E731
    far = lambda op, w, gemma: lambda x: reference.rms_norm(x, (1 + w.float()) * 1.05, EPS)  # noqa: E731
    made = [Provider("peer", rounded), Provider("ours", rounded, exact=True), Provider("far", far)]
    found = measure(point(), *made)
    assert not found["peer"].note
    assert "units in the last place" in found["ours"].note and "units in the last place" in found["far"].note


def test_a_missing_operator_and_a_failure_while_timed_are_noted() -> None:
    calls = []

    def tires(op: str, weight: torch.Tensor, gemma: bool) -> providers.Call:
        def call(x: torch.Tensor) -> torch.Tensor:
            calls.append(x)
            if len(calls) > 5:  # one to check, four to learn how long a call takes
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


def test_compare_tells_noise_from_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def file(name: str, *medians: float) -> str:
        timings = [Timing(m * 0.9, m, m * 1.1) for m in medians]
        made = [results.make(point(rows=i + 1), "ours", "gemma", t, None) for i, t in enumerate(timings)]
        results.write_csv(tmp_path / name, {"gpu": "a, b: c"}, made)
        return str(tmp_path / name)

    old, new = file("old.csv", 10, 10, 10, 10), file("new.csv", 10.5, 20, 5)
    moved, pairs = results.compare(results.read_csv(Path(old))[1], results.read_csv(Path(new))[1])
    assert [(m.new.rows, m.factor) for m in moved] == [(2, 2.0), (3, 0.5)] and pairs == 3
    assert command.main(["--load", new, "--compare", old]) == 0
    out = capsys.readouterr().out
    assert "2 of 3 figures moved" in out and "gpu  a, b: c" in out


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    made = []
    points = [p for name in ("decode", "host") for p in SUITES[name].points(Choice(quick=True))]
    for p, provider in product(points, ("ours", "ours:module", "copy_", "liger")):
        made.append(results.make(p, provider, "gemma", Timing(1, 2, 3), Timing(1, 2, 3)))
    results.write_csv(tmp_path / "r.csv", {"gpu": "some"}, made)
    assert command.main(["--load", str(tmp_path / "r.csv"), "--plot", str(tmp_path / "plots")]) == 0
    written = {path.name: path.read_bytes() for path in (tmp_path / "plots").iterdir()}
    assert set(written) == {"decode-bfloat16.png", "host-bfloat16.png"}
    assert all(data.startswith(b"\x89PNG") for data in written.values())


def test_a_plots_floor_leaves_out_sizes_at_which_copy_takes_a_slower_path() -> None:
    """Where the floor followed copy_ there, whatever is measured beside it would seem faster than memory."""
    one = results.make(point(), "copy_", "none", Timing(1, 1, 1), None)
    copies = [replace(one, gb_per_s=bandwidth) for bandwidth in (4000.0, 4100.0, 2700.0)]
    ours = replace(one, provider="ours", gb_per_s=5000.0)
    assert plot.copy_bandwidth([*copies, ours]) == 4050.0
    assert plot.copy_bandwidth([ours]) == 0.0


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with ok.csv: two providers of a suite, in bfloat16 alone."""
    monkeypatch.chdir(tmp_path)
    made = [results.make(point(rows=2), name, "gemma", Timing(1, 2, 3), None) for name in ("ours", "eager")]
    results.write_csv(tmp_path / "ok.csv", {"cpu": "some"}, made)
    return tmp_path / "ok.csv"


BAD_ARGUMENTS = {
    "--suite nonesuch": "unknown name 'nonesuch': choose from forward",
    "--suite ,": "expected names with commas between them, got ','",
    "--suite ''": "expected names with commas between them, got ''",
    "--suite cpu,": "expected names with commas between them",
    "--suite cpu,host,cpu": "cpu is named twice",
    "--suite decode": "no GPU is available",
    "--dtype float64": "unknown name 'float64': choose from bfloat16",
    "--dtype ,": "expected names with commas between them",
    "--providers ours,nonesuch": "choose from ours, copy_",
    "--providers ours,ours": "ours is named twice",
    "--providers aiter": "none of aiter can be used: ModuleNotFoundError",
    "--rows 0": "expected whole numbers from 1",
    "--rows=-1": "expected whole numbers from 1",
    "--rows abc": "expected whole numbers from 1 to 2147483647, got 'abc'",
    "--rows 2,2": "2 is named twice",
    "--rows ,": "expected sizes with commas between them",
    "--hidden 1e3": "expected whole numbers from 1",
    "--hidden 9999999999999999999999": "expected whole numbers from 1",
    "--csv /nonesuch/new.csv": "/nonesuch is not a folder",
    "--csv ok.csv/new.csv": "ok.csv is not a folder",
    "--csv .": "Is a directory",
    "--csv ''": "the name is empty",
    "--csv /proc/new.csv": "cannot write '/proc/new.csv'",
    "--json /proc/new.json": "cannot write '/proc/new.json'",
    "--csv new.csv --json new.csv": "new.csv is given to --csv too",
    "--plot there": "pip install matplotlib",
    "--load nonesuch.csv": "cannot read 'nonesuch.csv': No such file",
    "--load .": "cannot read '.': Is a directory",
    "--compare nonesuch.csv": "cannot read 'nonesuch.csv': No such file",
    "--load ok.csv --suite cpu,qk": "ok.csv has no results of suite qk: choose from cpu",
    "--load ok.csv --dtype float16": "ok.csv has no results of dtype float16: choose from bfloat16",
    "--load ok.csv --providers liger": "ok.csv has no results of provider liger: choose from ours, eager",
    "--load ok.csv --rows 2": "--rows: not allowed with argument --load",
    "--load ok.csv --hidden 64": "--hidden: not allowed with argument --load",
    "--load ok.csv --quick": "--quick: not allowed with argument --load",
    "--load ok.csv --plain": "--plain: not allowed with argument --load",
    "--load ok.csv --csv ./ok.csv": "--csv: ok.csv is given to --load too",
    "--load ok.csv --json ok.csv": "--json: ok.csv is given to --load too",
}


@pytest.mark.parametrize("line", BAD_ARGUMENTS)
def test_bad_arguments(
    line: str, earlier: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line of one kind, status 2, before anything is measured; no file is made or changed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command, "_measure", lambda *_: pytest.fail("measured"))
    for absent in ("matplotlib", "aiter"):
        monkeypatch.setitem(sys.modules, absent, None)
    before = earlier.read_bytes()
    with pytest.raises(SystemExit) as stopped:
        command.main(shlex.split(line))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert BAD_ARGUMENTS[line] in error
    assert re.fullmatch(r"python -m gemma_norm\.benchmark: error: argument --[a-z]+: .+\n", error)
    assert os.listdir() == ["ok.csv"] and earlier.read_bytes() == before


def test_heads_come_in_some_sizes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        arguments.parse(["--suite", "decode,qk", "--hidden", "64,100"])
    assert "argument --hidden: qk has no size 100: choose from 64, 128, 256" in capsys.readouterr().err


def test_plots_that_cannot_be_written(earlier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    for folder in ("ok.csv", "ok.csv/plots", "/proc/plots"):
        with pytest.raises(SystemExit) as stopped:
            command.main(["--load", "ok.csv", "--plot", folder])
        assert stopped.value.code == 2 and f"cannot write '{folder}'" in capsys.readouterr().err
    assert os.listdir() == ["ok.csv"]


def test_what_can_be_written_is_left_as_it_is(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is interrupted before its first result costs no earlier file and makes no empty one."""
    monkeypatch.setattr(environment, "describe", lambda *_: signal.raise_signal(signal.SIGINT))
    Path("kept.json").write_text("kept")
    Path("link.csv").symlink_to("nowhere.csv")
    for options in (
        ["--csv", "ok.csv", "--json", "kept.json"],
        ["--csv", "new.csv", "--plot", "a/b"],
        ["--csv", "link.csv"],
    ):
        before = {path.name: path.is_symlink() or path.read_bytes() for path in Path().iterdir()}
        with pytest.raises(KeyboardInterrupt):
            command.main([*TINY, *options])
        assert {path.name: path.is_symlink() or path.read_bytes() for path in Path().iterdir()} == before


def test_a_loaded_run_is_selected_from_and_written(earlier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--load", "ok.csv", "--csv", "new.csv", "--json", "new.json", "--providers", "ours"]) == 0
    facts, found = results.read_csv(Path("new.csv"))
    assert facts == {"cpu": "some"} and [r.provider for r in found] == ["ours"]
    assert len(json.loads(Path("new.json").read_text())["results"]) == 1
    out = capsys.readouterr().out
    assert "ours" in out and "eager" not in out
    assert command.main(["--load", "ok.csv", "--suite", "cpu", "--dtype", "bfloat16"]) == 0
    assert "eager" in capsys.readouterr().out


def test_a_full_disk_is_reported(earlier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The results are shown all the same."""
    assert command.main(["--load", "ok.csv", "--csv", "/dev/full"]) == 1
    screen = capsys.readouterr()
    assert screen.err == "cannot write /dev/full: No space left on device\n" and "eager" in screen.out


BAD_FILES = {
    "empty": (lambda heading, line: "", "it has no heading"),
    "not text": (lambda heading, line: "\udcff", "it is not text"),
    "another table": (lambda heading, line: "a,b\n1,2\n", "it lacks the column 'suite'"),
    "an older version": (lambda heading, line: heading.replace(",of_copy", "") + line, "it lacks the column 'of_copy'"),
    "a newer version": (lambda heading, line: f"energy,{heading}1,{line}", "it has an unknown column 'energy'"),
    "no results": (lambda heading, line: heading, "has no results"),
    "a short line": (lambda heading, line: heading + "cpu,rms_norm\n", "line 2: expected 17 cells, got 2"),
    "a long line": (lambda heading, line: f"# a: b\n{heading}x,{line}", "line 3: expected 17 cells, got 18"),
    "a word for a number": (
        lambda heading, line: heading + line.replace(",64,", ",x,"),
        "line 2: hidden is 'x', which",
    ),
    "an unknown suite": (lambda heading, line: heading + line.replace("cpu,", "warp,", 1), "unknown suite 'warp'"),
    "no CSV": (lambda heading, line: heading + '"' + "x" * 200_000, "field larger than field limit"),
}


@pytest.mark.parametrize("option", ["--load", "--compare"])
@pytest.mark.parametrize("what", BAD_FILES)
def test_another_file_is_no_result(what: str, option: str, earlier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, message = BAD_FILES[what]
    _, heading, line, _ = earlier.read_text().splitlines(keepends=True)
    Path("bad.csv").write_text(make(heading, line), errors="surrogateescape")
    with pytest.raises(SystemExit) as stopped:
        command.main([option, "bad.csv"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert f"error: argument {option}: bad.csv" in error and message in error


@pytest.mark.parametrize("columns", [80, 40])
def test_a_table_in_a_narrow_terminal(
    columns: int, earlier: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "columns", lambda stream: columns)
    assert command.main(["--load", "ok.csv", "--compare", "ok.csv"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= columns, text
    assert all(word in text for word in ("ours", "eager", "of copy_", "next best", "0 of 2 figures moved"))


def test_ctrl_c_on_a_terminal(tmp_path: Path) -> None:
    """130, what was measured until then, no traceback, no progress line left over."""
    csv = tmp_path / "new.csv"
    command_line = [
        "-m",
        "gemma_norm.benchmark",
        *TINY,
        *HERE,
        "--rows",
        "512",
        "--hidden",
        "64,5120",
        "--csv",
        str(csv),
    ]
    status, text = on_a_terminal(*command_line, columns=60, interrupt_at="1/8")
    assert status == 130
    assert "Traceback" not in text and "KeyboardInterrupt" not in text
    (stopped,) = [line for line in shown(text) if "points" in line]
    assert re.fullmatch(r"stopped after [1-7] of 8 points: interrupted", stopped)
    assert "median us a call" in text and results.read_csv(csv)[1]


def test_a_reader_that_stops(earlier: Path) -> None:
    """As ``| head -1`` does. The files are written all the same."""
    reader, writer = os.pipe()
    os.close(reader)
    line = [sys.executable, "-m", "gemma_norm.benchmark", "--load", "ok.csv", "--json", "new.json"]
    process = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert process.returncode == 141 and process.stderr == ""
    assert json.loads(Path("new.json").read_text())["environment"] == {"cpu": "some"}


def test_absent_peers_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(PROVIDERS, "liger", replace(PROVIDERS["liger"], module="no_such_module"))
    monkeypatch.setitem(PROVIDERS, "aiter", replace(PROVIDERS["aiter"], module="json"))
    assert command.main([*TINY, "--rows", "1", "--providers", "ours,liger,aiter"]) == 0
    out = capsys.readouterr().out
    assert "No module named 'no_such_module'" in out
    assert "the installed json has no rmsnorm2d_fwd_with_add" in out


def test_an_interrupted_run_keeps_what_it_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(op: str, weight: torch.Tensor, gemma: bool) -> providers.Call:
        if op == ADD_RMS_NORM:
            raise KeyboardInterrupt
        return correct(op, weight, gemma)

    monkeypatch.setitem(PROVIDERS, "eager", replace(PROVIDERS["eager"], make=interrupt))
    assert command.main([*TINY, "--rows", "1", "--providers", "eager"]) == 130
    screen = capsys.readouterr()
    assert "interrupted" in screen.err and "rms_norm" in screen.out


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

    def graph(graph: Graph, capture_error_mode: str) -> contextlib.AbstractContextManager[None]:
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
    assert captured == [0, 1, 2] * 17 and timed.calls == 51, "500 us of 10 us calls, whole rotations"
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
@pytest.mark.parametrize("suite", ["forward", "decode", "qk", "host"])
def test_on_a_gpu(suite: str, tmp_path: Path) -> None:
    csv = tmp_path / "gpu.csv"
    assert command.main(["--suite", suite, "--quick", "--hidden", "64", *HERE, "--csv", str(csv)]) == 0
    found = results.read_csv(csv)[1]
    assert found and all(r.p50_us > 0 and not r.note for r in found)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for stream in (io.StringIO(), Terminal()):
        progress = report.Progress(40, stream)
        for i in range(40):
            progress.show(f"point {i}")
            progress.advance()
        progress.close()
        text = stream.getvalue()
        if stream.isatty():
            assert text.endswith("\r\x1b[K") and "[############............] 20/40" in text and "\n" not in text
        else:
            assert text.splitlines() == [f"{i}/40 point {i}" for i in range(0, 40, 4)]
