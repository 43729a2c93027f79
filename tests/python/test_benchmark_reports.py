"""What the benchmark shows: tables, comparisons, plots, progress, and the end of a run that is stopped."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from benchmark_support import HERE, TINY, correct, point
from gemma_norm.benchmark import __main__ as command
from gemma_norm.benchmark import norms, plot, report, results
from gemma_norm.benchmark.cases import ADD_RMS_NORM, BACKWARD, RMS_NORM, Point
from gemma_norm.benchmark.providers import PROVIDERS
from gemma_norm.benchmark.suites import SUITES, Choice
from gemma_norm.benchmark.timing import Timing
from support import on_a_terminal, shown


def test_a_comparison_tells_noise_from_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_plots_are_written_for_each_suite(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("columns", [80, 40])
def test_tables_fit_into_narrow_terminals(
    columns: int, earlier: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "columns", lambda stream: columns)
    assert command.main(["--load", "ok.csv", "--compare", "ok.csv"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= columns, text
    assert all(word in text for word in ("ours", "eager", "of copy_", "next best", "0 of 2 figures moved"))


def test_ctrl_c_shows_what_was_measured(tmp_path: Path) -> None:
    """The exit status is 130. There is neither a traceback nor a progress line left over."""
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


def test_a_reader_that_stops_ends_the_program_after_the_files_are_written(earlier: Path) -> None:
    """As with ``| head -1``, whose exit status shells report as 141."""
    reader, writer = os.pipe()
    os.close(reader)
    line = [sys.executable, "-m", "gemma_norm.benchmark", "--load", "ok.csv", "--json", "new.json"]
    process = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert process.returncode == 141 and process.stderr == ""
    assert json.loads(Path("new.json").read_text())["environment"] == {"cpu": "some"}


def test_peers_that_are_absent_are_listed_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PROVIDERS, "liger", replace(PROVIDERS["liger"], module="no_such_module"))
    monkeypatch.setitem(PROVIDERS, "aiter", replace(PROVIDERS["aiter"], module="json"))
    assert command.main([*TINY, "--rows", "1", "--providers", "ours,liger,aiter"]) == 0
    out = capsys.readouterr().out
    assert "No module named 'no_such_module'" in out
    assert "the installed json has no rmsnorm2d_fwd_with_add" in out


def test_an_interrupted_run_keeps_what_it_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(op: str, weight: torch.Tensor, gemma: bool) -> norms.Call:
        if op == ADD_RMS_NORM:
            raise KeyboardInterrupt
        return correct(op, weight, gemma)

    monkeypatch.setitem(PROVIDERS, "eager", replace(PROVIDERS["eager"], make=interrupt))
    assert command.main([*TINY, "--rows", "1", "--providers", "eager"]) == 130
    screen = capsys.readouterr()
    assert "interrupted" in screen.err and "rms_norm" in screen.out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_line_on_a_terminal_and_every_tenth_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
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


def of_a_gpu(op: str, rows: int, hidden: int, provider: str, weight: str, us: float) -> results.Result:
    at = Point("backward", op, rows, hidden, torch.bfloat16, "cuda", "cold", work=BACKWARD)
    return results.make(at, provider, weight, Timing(us, us, us), Timing(us, us, us))


def test_a_table_of_derivatives_shows_the_floor_of_each_point() -> None:
    shapes = ((16384, 4096, 100.0), (4096, 64, 5.0))  # the second is so small that copy_ takes the time of a launch
    found = [
        of_a_gpu(RMS_NORM, rows, hidden, provider, weight, us * factor)
        for rows, hidden, us in shapes
        for provider, weight, factor in (("ours", "gemma", 1.25), ("copy_", "none", 1.0), ("torch.add", "none", 0.5))
    ]
    text = report.table("backward", found)
    assert "floor: the bytes over 4.03 TB/s" in text and "0.800" in text and "next best" in text
    assert "x torch.add" not in text, "it computes no derivative"
    points = [line for line in text.splitlines() if "|" in line and line.split()[0].isdigit()]
    large, small = (float(line.split("|")[1].split()[0]) for line in points)
    assert large == pytest.approx(100.0, 0.01) and small < 1


def test_a_plot_of_derivatives_has_a_panel_for_each_number_of_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    made = []
    for suite in ("backward", "backward-few", "backward-cpu", "train-host"):
        for p, provider in product(SUITES[suite].points(Choice(quick=suite != "backward")), ("ours", "copy_", "liger")):
            weight = "none" if provider == "copy_" else "gemma"
            made.append(results.make(p, provider, weight, Timing(1, 2, 3), Timing(1, 2, 3)))
    results.write_csv(tmp_path / "r.csv", {"gpu": "some", "cpu": "some"}, made)
    assert command.main(["--load", str(tmp_path / "r.csv"), "--plot", str(tmp_path / "plots")]) == 0
    assert {p.name.partition("-bfloat16")[0] for p in (tmp_path / "plots").iterdir() if "float32" not in p.name} == {
        "backward",
        "backward-few",
        "backward-cpu",
        "train-host",
    }
