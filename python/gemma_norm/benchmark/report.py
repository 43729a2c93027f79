"""Tables of results and a progress line, both within the terminal's width."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TextIO

from gemma_norm._screen import ProgressLine, columns, tables, wrap

from .results import Moved, Result, copy_bandwidth
from .suites import SUITES

POINT = ("op", "dtype", "rows", "hidden", "layout", "cache", "threads")
WORDS = {"suite", "op", "dtype", "layout", "cache", "provider", "next best"}
Row = Mapping[str, Result]  # the results at one point, by provider


def table(suite: str, results: Sequence[Result], width: int | None = None) -> str:
    """A table with a line for each point and a column for each provider.

    Above it is what all points have in common, below it why figures are missing. ``width`` is the terminal's; None
    stands for no limit.
    """
    names = list(dict.fromkeys(r.provider for r in results))
    rows: dict[tuple[object, ...], dict[str, Result]] = {}
    for r in results:
        rows.setdefault(r.point, {})[r.provider] = r
    values = {column: list(dict.fromkeys(str(getattr(r, column)) for r in results)) for column in POINT}
    keys = [c for c in POINT if len(values[c]) > 1 or c in ("rows", "hidden")]
    shared = [f"{c} {v[0]}" for c, v in values.items() if c not in keys and v[0] not in ("0", "contiguous")]
    gemma = {r.op for r in results if r.weight == "gemma"}  # the gated norm knows no such weight
    plain = {r.provider for r in results if r.weight == "plain" and r.op in gemma}
    floor = copy_bandwidth(results) if SUITES[suite].derived and SUITES[suite].axis == "hidden" else 0.0

    notes: dict[str, str] = {}
    heading = [*keys, *(n + "*" * (n in plain) for n in names), "|", *_derived_columns(suite, floor)]
    lines = [heading]
    for row in rows.values():
        first = next(iter(row.values()))
        cells = [_cell(row[n], notes) if n in row else "" for n in names]
        lines.append([*(str(getattr(first, c)) for c in keys), *cells, "|", *_derived(suite, row, floor)])
    above = [f"{suite}: {SUITES[suite].title}", ", ".join(["median us a call", *shared])]
    below = ["* plain weight: knows no zero-centred one"] if plain else []
    below += [f"floor: the bytes over {floor / 1000:.2f} TB/s, at which copy_ moves large tensors"] if floor else []
    below += [f"{label} {note}" for note, label in notes.items()]
    below += _summary(list(rows.values()))
    return "\n".join([*_wrap(above, width), "", *align(lines, len(keys), width), "", *_wrap(below, width)])


def _wrap(lines: Sequence[str], width: int | None) -> list[str]:
    return [part for line in lines for part in wrap(line, width, "", "    ")]


def _cell(r: Result, notes: dict[str, str]) -> str:
    if r.p50_us:
        return number(r.p50_us)
    return notes.setdefault(f"{r.provider}: {r.note}", f"[{len(notes) + 1}]")


def _derived_columns(suite: str, floor: float) -> list[str]:
    if SUITES[suite].host:
        return ["next best"]
    return ["floor", "of floor", "next best"] if floor else ["ours GB/s", "of copy_", "next best"]


def _derived(suite: str, row: Row, floor: float) -> list[str]:
    ours, other = row.get("ours"), next_best(row)
    if not ours or not ours.p50_us:
        return [""] * len(_derived_columns(suite, floor))
    gain = f"{other.p50_us / ours.p50_us:.2f}x {other.provider}" if other else ""
    if SUITES[suite].host:
        return [gain]
    if floor:
        least = ours.bytes / floor * 1e-3
        return [number(least), f"{least / ours.p50_us:.3f}", gain]
    return [number(ours.gb_per_s), f"{ours.of_copy:.3f}", gain]


def next_best(row: Row) -> Result | None:
    """The fastest provider other than ours and those that only move bytes."""
    others = [r for n, r in row.items() if r.weight != "none" and not n.startswith("ours") and r.p50_us]
    return min(others, key=lambda r: r.p50_us, default=None)


def _summary(rows: Sequence[Row]) -> list[str]:
    """For each operator, how fast ours is: the geometric mean over all points, and the worst point."""
    lines = []
    for op in dict.fromkeys(r.op for row in rows for r in row.values()):
        pairs = [(ours, next_best(row)) for row in rows if (ours := row.get("ours")) and ours.op == op and ours.p50_us]
        shares = [(r.of_copy, f"{r.rows} x {r.hidden}") for r, _ in pairs if r.of_copy]
        gains = [(o.p50_us / r.p50_us, f"{r.rows} x {r.hidden}, {o.provider}") for r, o in pairs if o]
        for measured, what in ((shares, "of copy_'s bandwidth"), (gains, "times as fast as the next best")):
            if measured:
                mean = math.exp(sum(math.log(value) for value, _ in measured) / len(measured))
                least, where = min(measured)
                lines.append(f"{op}: {mean:.3f} {what} (geometric mean; least {least:.3f} at {where})")
    return lines


def moved_table(moved: Sequence[Moved], pairs: int, width: int | None = None) -> str:
    lines = [["suite", "op", "dtype", "rows", "hidden", "threads", "provider", "old us", "new us", "new/old"]]
    for m in moved:
        r = m.new
        where = [r.suite, r.op, r.dtype, str(r.rows), str(r.hidden), str(r.threads), r.provider]
        lines.append([*where, number(m.old.p50_us), number(r.p50_us), f"{m.factor:.3f}"])
    title = f"{len(moved)} of {pairs} figures moved beyond noise (p20 to p80 apart), slowest first"
    if not pairs:
        title = "none of the figures is in the earlier file"
    keys = len(lines[0]) - 3
    return "\n".join([*_wrap([title], width), *(["", *align(lines, keys, width)] if moved else [])])


def number(value: float) -> str:
    """``value`` with at least three digits."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def align(lines: Sequence[Sequence[str]], keys: int, width: int | None) -> list[str]:
    """The lines of a table, see :func:`tables`. The first line names the columns, and the first ``keys`` are its keys.

    Words are aligned left, numbers right.
    """
    words = [i for i, name in enumerate(lines[0]) if name in WORDS]
    parts = tables(lines, words, keys, width)
    return [line for i, part in enumerate(parts) for line in ([""] if i else []) + part]


class Progress:
    """Shows how far the run is.

    On a terminal, this is one line that is wiped at the end, with a bar if the terminal is wide. Elsewhere, a line is
    printed after each tenth of the points.
    """

    BAR, WIDE = 24, 80

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self.total, self.done, self.stream = total, 0, stream or sys.stderr
        self.line, self.start, self.told = ProgressLine(self.stream), time.monotonic(), -1

    def show(self, doing: str) -> None:
        if self.line.live:
            bar = "#" * (self.BAR * self.done // self.total)
            wide = (columns(self.stream) or 0) >= self.WIDE
            text = f"{self.done}/{self.total}{self._left()}  {doing}"
            self.line.show(f"[{bar:.<{self.BAR}}] {text}" if wide else text)
        elif (tenth := self.done * 10 // self.total) != self.told:
            print(f"{self.done}/{self.total} {doing}", file=self.stream, flush=True)
            self.told = tenth

    def advance(self) -> None:
        self.done += 1

    def close(self) -> None:
        self.line.clear()

    def _left(self) -> str:
        if not self.done:
            return ""
        seconds = round((time.monotonic() - self.start) / self.done * (self.total - self.done))
        return f", {seconds // 60}:{seconds % 60:02} left"
