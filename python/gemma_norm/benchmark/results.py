"""A result, files of them, and what moved between two."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from .cases import Point
from .timing import Timing


@dataclass(frozen=True)
class Result:
    """One provider at one point; ``p50_us`` is 0 where there is no figure, and ``note`` says why."""

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
    """copy_'s time over this one's: the share of copy_'s bandwidth that is reached."""
    note: str = ""

    @property
    def point(self) -> tuple[object, ...]:
        return self.suite, self.op, self.dtype, self.rows, self.hidden, self.layout, self.cache, self.threads

    @property
    def key(self) -> tuple[object, ...]:
        return (*self.point, self.provider, self.weight)


def make(point: Point, provider: str, weight: str, outcome: Timing | Exception, copy: Timing | None) -> Result:
    result = Result(
        point.suite, point.op, str(point.dtype).removeprefix("torch."), point.rows, point.hidden,
        str(point.heads) if point.heads else "contiguous", point.cache, point.threads, provider, weight,
    )  # fmt: skip
    if isinstance(outcome, Exception):
        return replace(result, note=describe(outcome))
    p20, p50, p80 = (round(t, 4) for t in (outcome.p20, outcome.p50, outcome.p80))
    result = replace(result, p20_us=p20, p50_us=p50, p80_us=p80)
    if point.suite == "host":
        return result
    of_copy = round(copy.p50 / p50, 4) if copy else 0.0
    return replace(result, bytes=point.bytes, gb_per_s=round(point.bytes / p50 * 1e-3, 2), of_copy=of_copy)


def describe(error: Exception) -> str:
    text = str(error).strip()
    if "out of memory" in text or "DefaultCPUAllocator" in text:
        return "out of memory"
    return f"{type(error).__name__}: {text.partition(chr(10))[0]}"[:160]


def write_csv(path: Path, environment: Mapping[str, str], results: Iterable[Result]) -> None:
    """The environment in ``# name: value`` lines, then the table."""
    with path.open("w", newline="") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in environment.items())
        writer = csv.DictWriter(file, [f.name for f in fields(Result)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(r) for r in results)


def read_csv(path: Path) -> tuple[dict[str, str], list[Result]]:
    lines = path.read_text().splitlines()
    comments = [line[2:].partition(": ") for line in lines if line.startswith("# ")]
    kinds = {f.name: {"int": int, "float": float}.get(str(f.type), str) for f in fields(Result)}
    table = csv.DictReader(line for line in lines if not line.startswith("#"))
    if set(table.fieldnames or ()) != set(kinds):
        raise ValueError(f"{path} is not a CSV file of this benchmark: its columns are {table.fieldnames}")
    results = [Result(**{name: kinds[name](value) for name, value in row.items()}) for row in table]
    return {name: value for name, _, value in comments}, results


def write_json(path: Path, environment: Mapping[str, str], results: Iterable[Result]) -> None:
    text = json.dumps({"environment": dict(environment), "results": [asdict(r) for r in results]}, indent=1)
    path.write_text(text + "\n")


@dataclass(frozen=True)
class Moved:
    old: Result
    new: Result

    @property
    def factor(self) -> float:
        """New time over old."""
        return self.new.p50_us / self.old.p50_us


def compare(old: Sequence[Result], new: Sequence[Result]) -> tuple[list[Moved], int]:
    """What moved beyond noise (p20 to p80 of old and new apart), slowest first, and how many figures both have."""
    before = {r.key: r for r in old if r.p50_us}
    pairs = [Moved(before[r.key], r) for r in new if r.p50_us and r.key in before]
    moved = [m for m in pairs if m.new.p20_us > m.old.p80_us or m.new.p80_us < m.old.p20_us]
    return sorted(moved, key=lambda m: -m.factor), len(pairs)
