"""A result, files of results, and the comparison of two runs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import mean
from typing import Any

from .cases import Point
from .suites import SUITES
from .timing import Timing

DETOUR = 0.9
"""Below this share of its best bandwidth, copy_ has taken a slower path, and its time says nothing about the memory."""
LARGE = 50e6


@dataclass(frozen=True)
class Result:
    """The result of one provider at one point. If there is no figure, ``p50_us`` is 0, and ``note`` says why."""

    suite: str
    op: str
    dtype: str
    rows: int
    hidden: int
    layout: str
    cache: str
    threads: int
    provider: str
    weight: str
    p20_us: float = 0.0
    p50_us: float = 0.0
    p80_us: float = 0.0
    bytes: int = 0
    gb_per_s: float = 0.0
    of_copy: float = 0.0
    """copy_'s time divided by this one's, which is the share of copy_'s bandwidth that is reached."""
    note: str = ""

    @property
    def point(self) -> tuple[object, ...]:
        return self.suite, self.op, self.dtype, self.rows, self.hidden, self.layout, self.cache, self.threads

    @property
    def key(self) -> tuple[object, ...]:
        return (*self.point, self.provider, self.weight)


def make(point: Point, provider: str, weight: str, outcome: Timing | Exception, copy: Timing | None) -> Result:
    result = Result(
        point.suite, point.name, str(point.dtype).removeprefix("torch."), point.rows, point.hidden,
        point.layout, point.cache, point.threads, provider, weight,
    )  # fmt: skip
    if isinstance(outcome, Exception):
        return replace(result, note=describe(outcome))
    p20, p50, p80 = (round(t, 4) for t in (outcome.p20, outcome.p50, outcome.p80))
    result = replace(result, p20_us=p20, p50_us=p50, p80_us=p80)
    if SUITES[point.suite].host:
        return result
    of_copy = round(copy.p50 / p50, 4) if copy else 0.0
    return replace(result, bytes=point.bytes, gb_per_s=round(point.bytes / p50 * 1e-3, 2), of_copy=of_copy)


def copy_bandwidth(results: Iterable[Result]) -> float:
    """The bandwidth in GB/s at which the machine copies large tensors; 0 if ``copy_`` was not measured.

    It is the mean over the points, except those at which PyTorch's ``copy_`` is slower by a third because it takes
    another path. The least possible time of a point is its bytes divided by this bandwidth. A point is too small to
    count if it moves less than ``LARGE`` bytes, which takes not much longer than starting a kernel.
    """
    measured = [r for r in results if r.provider == "copy_" and r.gb_per_s]
    large = [r for r in measured if r.cache == "cold" and r.bytes >= LARGE] or measured
    bandwidths = [r.gb_per_s for r in large]
    return mean(b for b in bandwidths if b >= DETOUR * max(bandwidths)) if bandwidths else 0.0


def describe(error: Exception) -> str:
    text = str(error).strip()
    if "out of memory" in text or "DefaultCPUAllocator" in text:
        return "out of memory"
    line = " ".join(text.partition("\n")[0].split())
    return f"{type(error).__name__}: {line}"[:160]


def write_csv(path: Path, environment: Mapping[str, str], results: Iterable[Result]) -> None:
    """Write the environment in lines ``# name: value``, then the results as a table."""
    text = io.StringIO()
    text.writelines(f"# {name}: {value}\n" for name, value in environment.items())
    writer = csv.DictWriter(text, [f.name for f in fields(Result)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(r) for r in results)
    path.write_text(text.getvalue(), encoding="utf-8")  # in one call, so that an interrupt leaves no partial file


def read_csv(path: Path) -> tuple[dict[str, str], list[Result]]:
    """Return the environment and the results.

    Raises OSError if the file cannot be read, ValueError if it was not written by :func:`write_csv`.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        comments = [line[2:].partition(": ") for line in lines if line.startswith("# ")]
        numbered = [(n, line) for n, line in enumerate(lines, 1) if not line.startswith("#")]
        heading, *rows = csv.reader(line for _, line in numbered)
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a CSV file of this benchmark: it is not text") from None
    except csv.Error as error:
        raise ValueError(f"{path} is not a CSV file of this benchmark: {error}") from None
    except ValueError:
        raise ValueError(f"{path} is not a CSV file of this benchmark: it has no heading") from None
    columns = [f.name for f in fields(Result)]
    for names, others, what in ((columns, heading, "lacks the column"), (heading, columns, "has an unknown column")):
        if odd := [name for name in names if name not in others]:
            raise ValueError(
                f"{path} is not a CSV file of this benchmark, or not of this version: it {what} {odd[0]!r}"
            )
    if not rows:
        raise ValueError(f"{path} has no results")
    results = [_parse(f"{path}, line {n}", heading, row) for (n, _), row in zip(numbered[1:], rows, strict=True)]
    return {name: value for name, _, value in comments}, results


def _parse(where: str, heading: Sequence[str], row: Sequence[str]) -> Result:
    if len(row) != len(heading):
        raise ValueError(f"{where}: expected {len(heading)} cells, got {len(row)}")
    cells: dict[str, Any] = dict(zip(heading, row, strict=True))
    for f in fields(Result):
        kind, what = {"int": (int, "a whole number"), "float": (float, "a number")}.get(str(f.type), (str, ""))
        try:
            cells[f.name] = kind(cells[f.name])
        except ValueError:
            raise ValueError(f"{where}: {f.name} is {cells[f.name]!r}, which is not {what}") from None
    if cells["suite"] not in SUITES:
        raise ValueError(f"{where}: unknown suite {cells['suite']!r}: choose from {', '.join(SUITES)}")
    return Result(**cells)


def write_json(path: Path, environment: Mapping[str, str], results: Iterable[Result]) -> None:
    text = json.dumps({"environment": dict(environment), "results": [asdict(r) for r in results]}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Moved:
    old: Result
    new: Result

    @property
    def factor(self) -> float:
        """The new time divided by the old."""
        return self.new.p50_us / self.old.p50_us


def compare(old: Sequence[Result], new: Sequence[Result]) -> tuple[list[Moved], int]:
    """The results that moved beyond noise, the most slowed down first; and how many results both runs have.

    A result has moved if the ranges from p20 to p80 of the old and the new run do not overlap.
    """
    before = {r.key: r for r in old if r.p50_us}
    pairs = [Moved(before[r.key], r) for r in new if r.p50_us and r.key in before]
    moved = [m for m in pairs if m.new.p20_us > m.old.p80_us or m.new.p80_us < m.old.p20_us]
    return sorted(moved, key=lambda m: -m.factor), len(pairs)
