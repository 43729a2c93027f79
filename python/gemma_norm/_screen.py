"""How a command uses its terminal: it ends cleanly, shows progress, fits tables and text, and uses colours."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Container, Sequence
from typing import NoReturn, TextIO

_ANSI = re.compile(r"\x1b\[\d*m")
_WIPE = "\r\x1b[K"

INTERRUPTED = 128 + signal.SIGINT
"""The exit status after Ctrl-C, as shells report it."""
NO_READER = 128 + signal.SIGPIPE
"""The exit status if the reader of the output has stopped reading, as ``head`` does."""


class Parser(argparse.ArgumentParser):
    """Reports a bad argument in one line, and exits with status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def end_cleanly(main: Callable[[], int]) -> int:
    """Run ``main`` and return its exit status. Ctrl-C and a closed pipe leave no traceback and no progress line."""
    try:
        status = main()
        if sys.stdout:  # None if the caller has closed it
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:
        status = NO_READER
        _discard(sys.stdout)
    try:
        ProgressLine().clear()
    except BrokenPipeError:
        _discard(sys.stderr)
    return status


def _discard(stream: TextIO) -> None:
    """Redirect ``stream`` to /dev/null, so that Python does not fail when it flushes it at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def columns(stream: TextIO | None) -> int | None:
    """The width of the terminal that ``stream`` writes to; None if it does not write to a terminal."""
    if not stream or not stream.isatty():
        return None
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:  # the terminal does not report its size
        return 80


class ProgressLine:
    """A line on stderr that overwrites itself, fits into the terminal's width, and can be wiped.

    It is shown only on a terminal.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self.live = columns(self._stream) is not None and os.environ.get("TERM") != "dumb"

    def show(self, text: str) -> None:
        if self.live:
            width = columns(self._stream) or 80  # queried each time, because windows are resized
            # Three columns stay free: a full line may wrap, and the terminal echoes Ctrl-C as two characters.
            print(_WIPE + text[: width - 3], end="", file=self._stream, flush=True)

    def clear(self) -> None:
        self.show("")


class Screen:
    """Prints to stdout, within the terminal's width, and in colour on a terminal unless NO_COLOR is set."""

    def __init__(self) -> None:
        self._width = columns(sys.stdout)
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        self._colour = self._width is not None and not plain
        self._line = ProgressLine()
        self.progress = self._line.show

    def bold(self, text: str) -> str:
        return self._paint("1", text)

    def dim(self, text: str) -> str:
        return self._paint("2", text)

    def good(self, text: str) -> str:
        return self._paint("32", text)

    def bad(self, text: str) -> str:
        return self._paint("31", text)

    def print(self, text: str = "") -> None:
        self._line.clear()
        print(text, flush=True)

    def title(self, name: str, text: str) -> None:
        first, *others = wrap(f"{name}   {text}", self._width)
        for line in (first.replace(name, self.bold(name)), *others, ""):
            self.print(line)

    def note(self, text: str, paint: Callable[[str], str] | None = None) -> None:
        """Print a sentence, indented, on as many lines as it needs."""
        for line in wrap(text, self._width, "  "):
            self.print((paint or self.dim)(line))

    def table(self, rows: Sequence[Sequence[str]], left: int = 1, keys: int = 1) -> None:
        """Print ``rows`` as :func:`tables` lays them out. The first ``left`` columns align left, the others right."""
        parts = tables(rows, range(left), keys, self._width and self._width - 2, rows[0][0])
        for part in parts:
            for number, line in enumerate(part):
                self.print(self.dim(f"  {line}") if number == 0 else f"  {line}")
            if len(parts) > 1:
                self.print()

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text


def tables(
    rows: Sequence[Sequence[str]], left: Container[int], keys: int, width: int | None, title: str = ""
) -> list[list[str]]:
    """The lines of a table, of which the first row is the header, or of several tables if one would be too wide.

    If the table is wider than ``width``, its columns are distributed over several tables. Each starts with the first
    ``keys`` columns, which say what a row is about. If not even one more column fits next to those, each row becomes a
    table of its own: its keys, then a line for each other column; ``title`` is above all of these.

    The columns in ``left`` are aligned left, the others right. With ``width`` None, any width fits.
    """
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    names = range(keys)

    def line(row: Sequence[str], members: Sequence[int]) -> str:
        cells = []
        for c in members:
            space = " " * (widths[c] - _width(row[c]))
            cells.append(row[c] + space if c in left else space + row[c])
        return "  ".join(cells).rstrip()

    def fits(members: Sequence[int]) -> bool:
        return width is None or sum(widths[c] + 2 for c in members) - 2 <= width

    groups: list[list[int]] = [[*names]]
    for column in range(keys, len(widths)):
        if not fits([*groups[-1], column]) and len(groups[-1]) > keys:
            groups.append([*names])
        groups[-1].append(column)
    if all(map(fits, groups)):
        return [[line(row, group) for row in rows] for group in groups]
    return ([[title]] if title else []) + [_record(rows[0], row, left, keys, width) for row in rows[1:]]


def _record(header: Sequence[str], row: Sequence[str], left: Container[int], keys: int, width: int | None) -> list[str]:
    lines = [", ".join(row[c] if c in left else f"{header[c]} {row[c]}" for c in range(keys))]
    across = max(map(len, header[keys:]))
    for name, cell in zip(header[keys:], row[keys:], strict=True):
        if cell and cell != name:  # in a column of separators, the cell and the name are equal
            lines += wrap(cell, width, f"  {name.ljust(across)}  " if name else "  ", "    ")
    return lines


def wrap(text: str, width: int | None, first: str = "", others: str | None = None) -> list[str]:
    """``text`` in lines of at most ``width``, or in one line if that is None. Lines break only between words.

    The first line starts with ``first``, the others with ``others``; if that is None, with ``first`` as well.
    """
    if width is None or len(first) + _width(text) <= width:
        return [first + text]
    if others is not None and len(first) + len(text.split()[0]) > width:
        return [first.rstrip(), *wrap(text, width, others)]
    rest = first if others is None else others
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def _width(cell: str) -> int:
    return len(_ANSI.sub("", cell))
