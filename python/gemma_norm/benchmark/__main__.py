"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from . import environment, plot, report, results
from .cases import Point
from .providers import PROVIDERS, Provider, why_absent
from .results import Result
from .run import DeviceLost, run
from .suites import SUITES, Choice
from .timing import QUICK, Effort, keep_freed_memory, warm_up

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FAMILIES = tuple(dict.fromkeys(p.family for p in PROVIDERS.values()))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m gemma_norm.benchmark",
        description="Time RMSNorm beside copy_, PyTorch and other libraries. Results are checked first.",
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--suite", type=_names(SUITES), metavar="A,B", help="default: cpu, or all others on a GPU machine")
    p.add_argument("--dtype", type=_names(DTYPES), metavar="A,B", default=(), help=f"of {', '.join(DTYPES)}")
    p.add_argument("--providers", type=_names(FAMILIES), metavar="A,B", default=FAMILIES, help="default: all there are")
    p.add_argument("--hidden", type=_sizes, metavar="N,M", default=(), help="instead of the suite's (qk: head sizes)")
    p.add_argument("--rows", type=_sizes, metavar="N,M", default=(), help="instead of the suite's (qk: tokens)")
    p.add_argument("--plain", action="store_true", help="a plain weight for all, instead of zero-centred where known")
    p.add_argument("--quick", action="store_true", help="fewer points, fewer samples")
    p.add_argument("--csv", type=Path, metavar="FILE", help="write the results, anew after every point")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    p.add_argument("--plot", type=Path, metavar="DIR", help="write a PNG and an SVG a suite (needs matplotlib)")
    p.add_argument("--compare", type=Path, metavar="OLD.csv", help="show what moved beyond noise since")
    p.add_argument("--load", type=Path, metavar="FILE.csv", help="use an earlier run; measure nothing")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser()
    options = p.parse_args(arguments)
    if options.plot and (reason := plot.why_not()):
        p.error(reason)
    for path in (options.csv, options.json):
        if path and not path.parent.is_dir():
            p.error(f"{path.parent} is not a folder")
    try:
        old = results.read_csv(options.compare)[1] if options.compare else None
        facts, measured = results.read_csv(options.load) if options.load else ({}, [])
    except (OSError, ValueError) as error:
        p.error(str(error))
    status = 0
    if not options.load:
        gpu = torch.cuda.is_available()
        suites = options.suite or (tuple(n for n in SUITES if n != "cpu") if gpu else ("cpu",))
        if not gpu and (needing := [n for n in suites if SUITES[n].needs_gpu]):
            p.error(f"no GPU is available to PyTorch {torch.__version__}, and suite {needing[0]} needs one")
        facts, measured, status = _measure(options, suites)
    elif options.suite:
        measured = [r for r in measured if r.suite in options.suite]
    _show(facts, measured)
    if options.json:
        results.write_json(options.json, facts, measured)
    if old is not None:
        print(report.moved_table(*results.compare(old, measured)), end="\n\n")
    if options.plot:
        for path in plot.write(options.plot, facts, measured):
            print(f"wrote {path}")
    return status


def _measure(options: argparse.Namespace, suites: Sequence[str]) -> tuple[dict[str, str], list[Result], int]:
    """The environment, what was measured, and the exit status: 1 when the run did not come to its end."""
    asked = [q for q in PROVIDERS.values() if q.family in options.providers]
    absent = {q.name: reason for q in asked if (reason := why_absent(q))}
    providers: list[Provider] = [q for q in asked if q.name not in absent]
    facts = environment.describe(providers, absent, suites)
    effort = QUICK if options.quick else Effort()
    dtypes = tuple(DTYPES[n] for n in options.dtype)
    choice = Choice(dtypes, options.rows, options.hidden, options.quick)
    points: list[Point] = [point for name in suites for point in SUITES[name].points(choice)]
    if any(q.device == "cuda" for q in points):
        warm_up(effort.warm_up)
    largest = max((q.rows * q.hidden * q.dtype.itemsize for q in points if q.device == "cpu"), default=0)
    if largest >= 2**20:
        keep_freed_memory(largest)
    measured: list[Result] = []
    progress = report.Progress(len(points))
    stopped = ""
    try:
        running = run(points, providers, effort, not options.plain)
        for point in points:
            progress.show(str(point))
            measured += next(running)
            progress.advance()
            if options.csv:
                results.write_csv(options.csv, facts, measured)
    except KeyboardInterrupt:
        stopped = "interrupted"
    except DeviceLost as error:
        stopped = str(error)
    progress.close()
    if stopped:
        print(f"stopped after {progress.done} of {len(points)} points: {stopped}", file=sys.stderr)
    return facts, measured, 1 if stopped else 0


def _show(facts: dict[str, str], measured: Sequence[Result]) -> None:
    width = max(map(len, facts), default=0)
    print("\n".join(f"{name.ljust(width)}  {value}" for name, value in facts.items()), end="\n\n")
    for suite in dict.fromkeys(r.suite for r in measured):
        print(report.table(suite, [r for r in measured if r.suite == suite]), end="\n\n")


def _names(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    names = tuple(known)

    def parse(text: str) -> tuple[str, ...]:
        asked = tuple(name for name in text.split(",") if name)
        for name in asked:
            if name not in names:
                raise argparse.ArgumentTypeError(f"unknown name {name}: choose from {', '.join(names)}")
        return asked

    return parse


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in text.split(",") if size)
    if min(sizes, default=0) < 1:
        raise argparse.ArgumentTypeError(f"expected sizes of 1 and more, got {text}")
    return sizes


def _epilog() -> str:
    suites = "\n".join(f"  {name:8} {suite.title}" for name, suite in SUITES.items())
    return f"suites:\n{suites}\n\nproviders:\n  {', '.join(FAMILIES)}"


if __name__ == "__main__":
    sys.exit(main())
