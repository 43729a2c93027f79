"""What the tests of the benchmark share: small measurements, and a file of earlier results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gemma_norm import reference
from gemma_norm.benchmark import norms, results
from gemma_norm.benchmark.cases import NORM_ADD_NORM, RMS_NORM, Point, post_weight
from gemma_norm.benchmark.formula import EPS
from gemma_norm.benchmark.providers import Provider
from gemma_norm.benchmark.results import Result
from gemma_norm.benchmark.run import run
from gemma_norm.benchmark.timing import Effort, Timing

BRIEF = Effort(rounds=2, warm_up=0.0, seconds=0.001)
TINY = ["--suite", "cpu", "--quick", "--rows", "2,8", "--hidden", "64"]
HERE = ["--providers", "ours,copy_,eager,F.rms_norm"]


def point(op: str = RMS_NORM, rows: int = 8, hidden: int = 64, dtype: torch.dtype = torch.bfloat16) -> Point:
    return Point("cpu", op, rows, hidden, dtype, "cpu", threads=1)


def measure(at: Point, *measured: Provider) -> dict[str, Result]:
    ((*found,),) = run([at], measured, BRIEF, gemma=True)
    return {r.provider: r for r in found}


def correct(op: str, weight: torch.Tensor, gemma: bool) -> norms.Call:
    if op == RMS_NORM:
        return lambda x: reference.rms_norm(x, weight, EPS, gemma)
    if op == NORM_ADD_NORM:
        post = post_weight(weight)
        return lambda x, residual: reference.rms_norm_add_rms_norm(x, residual, post, weight, EPS, gemma)
    return lambda x, residual: reference.add_rms_norm(x, residual, weight, EPS, gemma)


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with ok.csv: two providers of a suite, in bfloat16 alone."""
    monkeypatch.chdir(tmp_path)
    made = [results.make(point(rows=2), name, "gemma", Timing(1, 2, 3), None) for name in ("ours", "eager")]
    results.write_csv(tmp_path / "ok.csv", {"cpu": "some"}, made)
    return tmp_path / "ok.csv"
