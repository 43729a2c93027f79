"""The arguments of the command line. A wrong one is reported in one line, before anything is measured."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

import torch

from gemma_norm._screen import Parser, columns, wrap

from . import plot, results
from .providers import PROVIDERS, why_absent
from .results import Result
from .suites import SUITES

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FAMILIES = tuple(dict.fromkeys(p.family for p in PROVIDERS.values()))
MOST = 2**31 - 1
"""The largest number of rows, and of elements in a row, that is accepted: far more than fit into memory."""
MEASURING = ("rows", "hidden", "plain", "quick")
"""Options that say how to measure, so they are refused with --load. --suite, --dtype and --providers are not among
them: with --load they select from its results."""

DEFAULT_SUITES = {True: tuple(n for n, s in SUITES.items() if n != "cpu" and not s.derived), False: ("cpu",)}
"""The suites that run by default, by whether there is a GPU."""

Part = TypeVar("Part", str, int)
Refuse = Callable[[str, str], NoReturn]
"""Takes an option and what is wrong with it, and ends the program with that message."""


@dataclass
class Run:
    """An earlier run, read from its CSV file."""

    path: Path
    facts: dict[str, str]
    measured: list[Result]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    p = _parser()
    options = p.parse_args(arguments)

    def refuse(option: str, why: str) -> NoReturn:
        p.error(f"argument --{option}: {why}")

    outputs: dict[Path, str] = {}
    for option in ("csv", "json", "plot"):
        path = getattr(options, option)
        if path and (other := outputs.setdefault(path.resolve(), option)) != option:
            refuse(option, f"{path} is given to --{other} too")
    if run := options.load:
        for option in MEASURING:
            if getattr(options, option):
                refuse(option, "not allowed with argument --load")
        if written := outputs.get(run.path.resolve()):
            refuse(written, f"{run.path} is given to --load too")
        for option in ("suite", "dtype", "providers"):
            _select(run, option, getattr(options, option), refuse)
    else:
        _refuse_impossible(options, refuse)
        options.suite = options.suite or DEFAULT_SUITES[torch.cuda.is_available()]
    return options


def _refuse_impossible(options: argparse.Namespace, refuse: Refuse) -> None:
    """Refuse options with which there would be nothing to measure."""
    for name in options.suite or ():
        suite = SUITES[name]
        if suite.needs_gpu and not torch.cuda.is_available():
            refuse("suite", f"no GPU is available to PyTorch {torch.__version__}, and {name} needs one")
        if suite.hidden and (others := [h for h in options.hidden or () if h not in suite.hidden]):
            refuse("hidden", f"{name} has no size {others[0]}: choose from {', '.join(map(str, suite.hidden))}")
    if options.providers:
        reasons = [why_absent(p) for p in PROVIDERS.values() if p.family in options.providers]
        if all(reasons):
            refuse("providers", f"none of {', '.join(options.providers)} can be used: {reasons[0]}")


def _parser() -> Parser:
    p = Parser(
        prog="python -m gemma_norm.benchmark",
        description=_fit("Time RMSNorm beside copy_, PyTorch and other libraries. Results are checked first."),
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    suites, families, dtypes = _names(SUITES), _names(FAMILIES), _names(DTYPES)
    p.add_argument("--suite", type=suites, metavar="A,B", help="default: cpu, or forward to host on a GPU machine")
    p.add_argument("--dtype", type=dtypes, metavar="A,B", help=f"of {', '.join(DTYPES)}; default: the suite's")
    p.add_argument("--providers", type=families, metavar="A,B", help="default: all there are")
    p.add_argument("--hidden", type=_sizes, metavar="N,M", help="instead of the suite's (qk: head sizes)")
    p.add_argument("--rows", type=_sizes, metavar="N,M", help="instead of the suite's (qk: tokens)")
    p.add_argument("--plain", action="store_true", help="a plain weight for all, instead of zero-centred where known")
    p.add_argument("--quick", action="store_true", help="fewer points, fewer samples")
    p.add_argument("--csv", type=_output_file, metavar="FILE", help="write the results, anew after every point")
    p.add_argument("--json", type=_output_file, metavar="FILE", help="write the results")
    p.add_argument("--plot", type=_plot_folder, metavar="DIR", help="write a PNG a suite and dtype (needs matplotlib)")
    p.add_argument("--compare", type=_run, metavar="OLD.csv", help="show what moved beyond noise since")
    load = "measure nothing, use an earlier run: all of it, or the suites, dtypes and providers named"
    p.add_argument("--load", type=_run, metavar="FILE.csv", help=load)
    return p


def _select(run: Run, option: str, asked: Sequence[str] | None, refuse: Refuse) -> None:
    """Keep those results of ``run`` whose ``option`` was asked for. There must be some for each value asked for."""
    if asked is None:
        return

    def name(r: Result) -> str:
        return r.provider.partition(":")[0] if option == "providers" else str(getattr(r, option))

    there = tuple(dict.fromkeys(map(name, run.measured)))
    if missing := [a for a in asked if a not in there]:
        what = f"{option.removesuffix('s')} {missing[0]}"
        refuse(option, f"{run.path} has no results of {what}: choose from {', '.join(there)}")
    run.measured = [r for r in run.measured if name(r) in asked]


def _names(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    names = tuple(known)

    def parse(text: str) -> tuple[str, ...]:
        asked = _parts(text, "names")
        for name in asked:
            if name not in names:
                raise argparse.ArgumentTypeError(f"unknown name {name!r}: choose from {', '.join(names)}")
        return asked

    return parse


def _sizes(text: str) -> tuple[int, ...]:
    parts = _parts(text, "sizes")
    for part in parts:
        if not (part.isascii() and part.isdigit() and 1 <= int(part[:20]) <= MOST):
            raise argparse.ArgumentTypeError(f"expected whole numbers from 1 to {MOST}, got {part!r}")
    return _distinct(tuple(map(int, parts)))


def _parts(text: str, what: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in text.split(","))
    if not all(parts):
        raise argparse.ArgumentTypeError(f"expected {what} with commas between them, got {text!r}")
    return _distinct(parts)


def _distinct(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    for i, part in enumerate(parts):
        if part in parts[:i]:
            raise argparse.ArgumentTypeError(f"{part} is named twice")
    return parts


def _run(text: str) -> Run:
    try:
        return Run(Path(text), *results.read_csv(Path(text)))
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read {text!r}: {error.strerror}") from None
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _output_file(text: str) -> Path:
    """The path of a file that can be written. Trying that creates no file and changes none."""
    return _writable(text, _try_file)


def _plot_folder(text: str) -> Path:
    if reason := plot.why_not():
        raise argparse.ArgumentTypeError(reason)
    return _writable(text, _try_folder)


def _writable(text: str, attempt: Callable[[Path], None]) -> Path:
    try:
        if not text:
            raise OSError(errno.ENOENT, "the name is empty")
        attempt(Path(os.path.realpath(text)))  # follows links, also one whose target does not exist
    except (OSError, ValueError) as error:  # ValueError: the name contains a null character
        reason = getattr(error, "strerror", None) or str(error)
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: {reason}") from None
    return Path(text)


def _try_file(path: Path) -> None:
    if not path.parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{path.parent} is not a folder")
    if path.exists() and not (path.is_file() or path.is_dir()):
        return  # a device or a pipe: opening and closing a pipe would end it for its reader
    there = path.exists()
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666))  # tried, because permissions do not tell everything
    if not there:
        path.unlink()


def _try_folder(path: Path) -> None:
    """Raise OSError unless ``path`` is a folder that can be written, or can become one."""
    there = next(p for p in (path, *path.parents) if p.exists())
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{there} is not a folder")
    with tempfile.TemporaryDirectory(dir=there):
        pass


def _epilog() -> str:
    suites = [_fit(suite.title, f"  {name:8} ", " " * 11) for name, suite in SUITES.items()]
    return "\n".join(["suites:", *suites, "", "providers:", _fit(", ".join(FAMILIES), "  ")])


def _fit(text: str, first: str = "", others: str | None = None) -> str:
    return "\n".join(wrap(text, columns(sys.stdout), first, others))
