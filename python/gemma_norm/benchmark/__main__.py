"""The benchmark's command. It measures or loads results, writes the files that were asked for, and prints tables."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence

from gemma_norm._screen import INTERRUPTED, columns, end_cleanly, wrap

from . import environment, plot, report, results
from .arguments import DTYPES, FAMILIES, parse
from .cases import Point
from .providers import PROVIDERS, Provider, why_absent
from .results import Result
from .run import DeviceLost, run
from .suites import SUITES, Choice
from .timing import QUICK, Effort, keep_freed_memory, warm_up


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.load:
        facts, measured, status = options.load.facts, options.load.measured, 0
    else:
        facts, measured, status = _measure(options)
    wrote, failed = _write(options, facts, measured)
    if measured:
        _show(facts, measured)
    if options.compare:
        moved = results.compare(options.compare.measured, measured)
        print(report.moved_table(*moved, columns(sys.stdout)), end="\n\n")
    for line in wrote:
        print(line)
    for line in failed:
        print(line, file=sys.stderr)
    return status or (1 if failed else 0)


def _write(
    options: argparse.Namespace, facts: dict[str, str], measured: Sequence[Result]
) -> tuple[list[str], list[str]]:
    """Write the files, and return lines to print about plots and about failures.

    This comes before anything is printed, because the reader of the output may stop reading.
    """
    wrote: list[str] = []
    failed: list[str] = []
    writers = {"csv": results.write_csv, "json": results.write_json, "plot": plot.write}
    for option, write in writers.items():
        if path := getattr(options, option):
            try:
                wrote += [f"wrote {file}" for file in write(path, facts, measured) or ()]
            except OSError as error:  # for example, the disk is full
                failed.append(f"cannot write {path}: {error.strerror or error}")
    return wrote, failed


def _measure(options: argparse.Namespace) -> tuple[dict[str, str], list[Result], int]:
    """The environment, the results, and the exit status, which is not 0 if the run was stopped before its end."""
    asked = [q for q in PROVIDERS.values() if q.family in (options.providers or FAMILIES)]
    absent = {q.name: reason for q in asked if (reason := why_absent(q))}
    providers: list[Provider] = [q for q in asked if q.name not in absent]
    facts = environment.describe(providers, absent, options.suite)
    effort = QUICK if options.quick else Effort()
    dtypes = tuple(DTYPES[n] for n in options.dtype or ())
    choice = Choice(dtypes, options.rows or (), options.hidden or (), options.quick)
    points: list[Point] = [point for name in options.suite for point in SUITES[name].points(choice)]
    if any(q.device == "cuda" for q in points):
        warm_up(effort.warm_up)
    largest = max((q.rows * q.hidden * q.dtype.itemsize for q in points if q.device == "cpu"), default=0)
    if largest >= 2**20:
        keep_freed_memory(largest)
    measured: list[Result] = []
    progress = report.Progress(len(points))
    stopped, status = "", 0
    try:
        running = run(points, providers, effort, not options.plain)
        for point in points:
            progress.show(str(point))
            measured += next(running)
            progress.advance()
            if options.csv:
                with contextlib.suppress(OSError):  # at the end it is written again, and a failure reported
                    results.write_csv(options.csv, facts, measured)
    except KeyboardInterrupt:
        stopped, status = "interrupted", INTERRUPTED
    except DeviceLost as error:
        stopped, status = str(error), 1
    progress.close()
    if stopped:
        print(f"stopped after {progress.done} of {len(points)} points: {stopped}", file=sys.stderr)
    return facts, measured, status


def _show(facts: dict[str, str], measured: Sequence[Result]) -> None:
    width = columns(sys.stdout)
    across = max(map(len, facts), default=0)
    for name, value in facts.items():
        print("\n".join(wrap(value, width, f"{name.ljust(across)}  ", "    ")))
    print()
    for suite in dict.fromkeys(r.suite for r in measured):
        print(report.table(suite, [r for r in measured if r.suite == suite], width), end="\n\n")


if __name__ == "__main__":
    sys.exit(end_cleanly(main))
