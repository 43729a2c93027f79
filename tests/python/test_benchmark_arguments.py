"""The benchmark's arguments and the files that it reads and writes."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmark_support import TINY
from gemma_norm.benchmark import __main__ as command
from gemma_norm.benchmark import arguments, environment, results

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
def test_bad_arguments_are_refused_before_anything_is_measured(
    line: str, earlier: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message is one line, the exit status is 2, and no file is made or changed."""
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


def test_a_suite_of_heads_has_only_some_sizes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        arguments.parse(["--suite", "decode,qk", "--hidden", "64,100"])
    assert "argument --hidden: qk has no size 100: choose from 64, 128, 256" in capsys.readouterr().err


def test_a_folder_for_plots_that_cannot_be_written_is_refused(
    earlier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    for folder in ("ok.csv", "ok.csv/plots", "/proc/plots"):
        with pytest.raises(SystemExit) as stopped:
            command.main(["--load", "ok.csv", "--plot", folder])
        assert stopped.value.code == 2 and f"cannot write '{folder}'" in capsys.readouterr().err
    assert os.listdir() == ["ok.csv"]


def test_files_are_left_alone_until_there_is_a_result(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is interrupted before its first result neither overwrites an earlier file nor makes an empty one."""
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


def test_a_full_disk_is_reported_and_the_results_are_shown(earlier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--load", "ok.csv", "--csv", "/dev/full"]) == 1
    screen = capsys.readouterr()
    assert screen.err == "cannot write /dev/full: No space left on device\n" and "eager" in screen.out


@dataclass(frozen=True)
class BadFile:
    """A file that is no result of the benchmark, made of the heading and of one line of a file that is."""

    what: str
    make: Callable[[str, str], str]
    message: str

    def __str__(self) -> str:
        return self.what


BAD_FILES = [
    BadFile("empty", lambda heading, line: "", "it has no heading"),
    BadFile("not text", lambda heading, line: "\udcff", "it is not text"),
    BadFile("another table", lambda heading, line: "a,b\n1,2\n", "it lacks the column 'suite'"),
    BadFile(
        "an older version",
        lambda heading, line: heading.replace(",of_copy", "") + line,
        "it lacks the column 'of_copy'",
    ),
    BadFile("a newer version", lambda heading, line: f"energy,{heading}1,{line}", "it has an unknown column 'energy'"),
    BadFile("no results", lambda heading, line: heading, "has no results"),
    BadFile("a short line", lambda heading, line: heading + "cpu,rms_norm\n", "line 2: expected 17 cells, got 2"),
    BadFile("a long line", lambda heading, line: f"# a: b\n{heading}x,{line}", "line 3: expected 17 cells, got 18"),
    BadFile(
        "a word for a number",
        lambda heading, line: heading + line.replace(",64,", ",x,"),
        "line 2: hidden is 'x', which",
    ),
    BadFile(
        "an unknown suite",
        lambda heading, line: heading + line.replace("cpu,", "warp,", 1),
        "unknown suite 'warp'",
    ),
    BadFile("no CSV", lambda heading, line: heading + '"' + "x" * 200_000, "field larger than field limit"),
]


@pytest.mark.parametrize("option", ["--load", "--compare"])
@pytest.mark.parametrize("case", BAD_FILES, ids=str)
def test_a_file_that_is_no_result_is_refused(
    case: BadFile, option: str, earlier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, heading, line, _ = earlier.read_text().splitlines(keepends=True)
    Path("bad.csv").write_text(case.make(heading, line), errors="surrogateescape")
    with pytest.raises(SystemExit) as stopped:
        command.main([option, "bad.csv"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert f"error: argument {option}: bad.csv" in error and case.message in error
