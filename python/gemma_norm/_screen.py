"""What a terminal needs: colours where they are wanted, a progress line where it can be overwritten, and tables."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

_ANSI = re.compile(r"\x1b\[\d*m")


class Screen:
    """Prints to stdout, in colour on a terminal unless NO_COLOR is set; progress to stderr, on a terminal alone."""

    def __init__(self) -> None:
        self._colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._progress = sys.stderr.isatty()

    def bold(self, text: str) -> str:
        return self._paint("1", text)

    def dim(self, text: str) -> str:
        return self._paint("2", text)

    def good(self, text: str) -> str:
        return self._paint("32", text)

    def bad(self, text: str) -> str:
        return self._paint("31", text)

    def print(self, text: str = "") -> None:
        self.progress("")
        print(text, flush=True)

    def progress(self, text: str) -> None:
        if self._progress:
            print(f"\r\x1b[K{text[:100]}", end="", file=sys.stderr, flush=True)

    def table(self, rows: Sequence[Sequence[str]], left: int = 1) -> None:
        """Print ``rows``, the first being the header; the first ``left`` columns align left, the others right."""
        widths = [max(_width(row[column]) for row in rows) for column in range(len(rows[0]))]
        for index, row in enumerate(rows):
            cells = []
            for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
                space = " " * (width - _width(cell))
                cells.append(cell + space if column < left else space + cell)
            line = "  " + "  ".join(cells).rstrip()
            self.print(self.dim(line) if index == 0 else line)

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text


def _width(cell: str) -> int:
    return len(_ANSI.sub("", cell))
