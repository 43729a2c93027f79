"""What compare.py measured as CSV, after lines of facts, as the benchmark writes its own."""

from __future__ import annotations

import csv
import datetime
import io
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import comparison_report
from published import TIMINGS
from toolchain import ROOT, TARGETS

COUNTS = ["vector", "packed", "transcendental", "scalar", "scalar load", "lds", "barrier", "load 128", "load 64"]
COUNTS += ["load 32", "load 16", "store 128", "store 64", "store 32", "store 16"]
COUNTS += [f"wait for {kind}" for kind in comparison_report.WAITS]
COUNTS += ["bytes loaded", "bytes loaded again", "bytes stored"]


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def facts(targets: list[str], packages: list[str]) -> dict[str, str]:
    changed = subprocess.run(["git", "-C", ROOT, "diff", "--quiet", "HEAD", "--", "csrc"]).returncode != 0
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "suites": "compare-amdgpu: machine code in an emulator, times by a model; no GPU was measured",
        "commit": _git(ROOT, "rev-parse", "HEAD") + (" with changes" if changed else ""),
        "compilers": ", ".join(f"{target}: {TARGETS[target].compiler}" for target in targets),
        "peers": ", ".join(packages),
        "emulator": f"tinygrad {_git(Path(os.environ.get('TINYGRAD', '.')), 'rev-parse', 'HEAD')}",
    }


def _times(results: list[dict]) -> Iterator[list]:
    yield ["gpu", "target", "op", "dtype", "hidden", "rows", "implementation", "us", "memory_us"]
    for r in results:
        if "error" in r:
            continue
        for timing in TIMINGS[r["arch"]]:
            for rows in comparison_report.row_counts(r):
                us = comparison_report.predicted_us(r, timing, rows)
                memory = comparison_report.row_bytes(r) * rows / timing.share(1) / 1e3
                key = [timing.gpu.name, r["arch"], r["op"], r["dtype"], r["hidden"], rows, r["implementation"]]
                yield [*key, f"{us:.3f}", f"{memory:.3f}"]


def _counts(results: list[dict]) -> Iterator[list]:
    """Of a row, in wave instructions, and the largest error of each result: in units of the last place, of int8 in
    codes.
    """
    head = ["target", "op", "dtype", "hidden", "implementation", "errors", "rounds", "threads", "registers"]
    yield [*head, *(name.replace(" ", "_") for name in COUNTS)]
    for r in results:
        key = [r["arch"], r["op"], r["dtype"], r["hidden"], r["implementation"]]
        if "error" in r:
            yield [*key, f"did not run: {r['error'][:80]}"]
            continue
        first, n = (r.get("looping") or r["launches"])[0], comparison_report.per_row(r)
        errors = " ".join(f"{name} {error:g}" for name, error in r["errors"].items())
        yield [*key, errors, r["rounds"], first["threads"], first["registers"], *(f"{n.get(c, 0):.4g}" for c in COUNTS)]


def write(folder: Path, results: list[dict], packages: list[str]) -> None:
    """Writes amd-model-times.csv and amd-model-counts.csv."""
    known = facts(list(dict.fromkeys(r["arch"] for r in results)), packages)
    for name, rows in {"times": _times(results), "counts": _counts(results)}.items():
        text = io.StringIO()
        text.writelines(f"# {key}: {value}\n" for key, value in known.items())
        csv.writer(text, lineterminator="\n").writerows(rows)
        (folder / f"amd-model-{name}.csv").write_text(text.getvalue())
