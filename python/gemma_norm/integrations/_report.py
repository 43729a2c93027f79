"""What a patch did, for people and for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from ._semantics import Semantics


@dataclass(frozen=True)
class Replaced:
    """A norm that runs this library's operator. ``semantics`` is what it computes now."""

    name: str
    cls: str
    semantics: Semantics
    hidden: int | None
    """None for a norm without a weight, which takes any size."""
    eps: float
    dtype: torch.dtype | None
    probe: float
    """The largest share of 16-bit elements of the probe that differed from the formula, each by at most four units
    in the last place. In float32 they were equal within 1e-5."""


@dataclass(frozen=True)
class Fused:
    """A residual addition that joins the norm after it."""

    name: str
    """Of the layer."""
    cls: str
    norm: str
    """The name of the norm in the model."""
    across: bool
    """Whether the norm is in another module than the addition: used only where no gradient is recorded."""
    before: str = ""
    """The name of a norm before the addition that joins as well, if it is like the one after it."""


@dataclass(frozen=True)
class Rotated:
    """Attention whose rotation of q and k joins their norms."""

    name: str
    cls: str
    q_norm: str
    """The attribute of the norm of q."""
    k_norm: str
    gate: str = ""
    """The variable that holds the gate beside each head of q, where it joins as well and so becomes contiguous."""


@dataclass(frozen=True)
class Left:
    """A module that stays as it is."""

    name: str
    cls: str
    reason: str


@dataclass
class Report:
    """The result of :func:`gemma_norm.integrations.transformers.patch`. ``print(report)`` shows a table."""

    replaced: list[Replaced] = field(default_factory=list)
    fused: list[Fused] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    """What looks like a norm (it has an eps, or its class's name ends in Norm) and stays."""
    unfused: list[Left] = field(default_factory=list)
    """Layers whose residual additions stay apart from the norms."""
    rotated: list[Rotated] = field(default_factory=list)
    unrotated: list[Left] = field(default_factory=list)
    """Attention with norms of q and k right before a rotation, which stays apart from them."""
    already: list[Replaced] = field(default_factory=list)
    """Norms that an earlier patch replaced."""
    fallbacks: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often a replaced norm ran its original forward, by its name and the reason. It counts on while the model is
    used. Calls inside compiled code are not counted."""
    additions: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often an addition that had joined a norm ran by itself, by the norm's name and the reason; likewise."""
    rotations: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often a rotation that had joined the norms of q and k ran by itself, by the attention's name and the reason;
    likewise."""
    dry_run: bool = False

    def raise_if_left(self) -> None:
        """RuntimeError if something that looks like a norm was left."""
        if self.left:
            raise RuntimeError("patch: norms were left as they are:\n" + "\n".join(_rows(self.left, _left_row)))

    def __str__(self) -> str:
        verb = "would be replaced" if self.dry_run else "replaced"
        parts = [
            (f"{len(self.replaced)} norms {verb}", _rows(self.replaced, _replaced_row)),
            (f"{len(self.already)} norms were replaced already", _rows(self.already, _replaced_row)),
            (f"{len(self.fused)} residual additions {'would join' if self.dry_run else 'joined'} a norm",
             _rows(self.fused, _fused_row)),
            (f"{len(self.rotated)} rotations {'would join' if self.dry_run else 'joined'} the norms of q and k",
             _rows(self.rotated, _rotated_row)),
            (f"{len(self.left)} modules left as they are", _rows(self.left, _left_row)),
            (f"{len(self.unfused)} layers whose residual additions stay apart", _rows(self.unfused, _left_row)),
            (f"{len(self.unrotated)} rotations stay apart from the norms", _rows(self.unrotated, _left_row)),
            (f"{self.fallbacks.total()} calls ran the original forward", _counted(self.fallbacks)),
            (f"{self.additions.total()} additions ran apart from the norm", _counted(self.additions)),
            (f"{self.rotations.total()} rotations ran apart from the norms", _counted(self.rotations)),
        ]  # fmt: skip
        shown = [parts[0], *(part for part in parts[1:] if part[1])]
        return "\n".join(line for title, rows in shown for line in (title, *(f"  {row}" for row in rows)))


def _counted(calls: Counter[tuple[str, str]]) -> list[str]:
    reasons: Counter[str] = Counter()
    for (_, reason), count in calls.items():
        reasons[reason] += count
    return _table([[f"{count} x", reason] for reason, count in reasons.most_common()])


def _replaced_row(row: Replaced) -> tuple[str, ...]:
    hidden = "any size" if row.hidden is None else str(row.hidden)
    dtype = "" if row.dtype is None else str(row.dtype).removeprefix("torch.")
    return f"{row.cls}({hidden})", str(row.semantics), f"eps {row.eps:g}", dtype


def _fused_row(row: Fused) -> tuple[str, ...]:
    return (
        row.cls,
        f"{row.before.rpartition('.')[2]} + {row.norm.rpartition('.')[2]}".strip(),
        "of the next layer, in inference" if row.across else "in the layer",
    )


def _rotated_row(row: Rotated) -> tuple[str, ...]:
    return row.cls, ", ".join(part for part in (row.q_norm, row.k_norm, row.gate) if part)


def _left_row(row: Left) -> tuple[str, ...]:
    return row.cls, row.reason


def _rows(rows: Iterable[Any], describe: Callable[[Any], tuple[str, ...]]) -> list[str]:
    """Equal rows as one, with their number, the name of the first and what they have in common."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        groups.setdefault(describe(row), []).append(row.name)
    return _table([[f"{len(names)} x", *key, _common(names)] for key, names in groups.items()])


def _common(names: list[str]) -> str:
    """``layers.0.norm`` and ``layers.1.norm`` as ``layers.*.norm``; several such patterns are counted."""
    patterns = Counter(
        ".".join("*" if part.isdigit() and len(names) > 1 else part for part in n.split(".")) for n in names
    )
    first, *others = patterns
    return first + (f" and {len(others)} more" if len(others) > 1 else f", {others[0]}" if others else "")


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    cells = (
        [c.rjust(w) if i == 0 else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))] for r in rows
    )
    return ["  ".join(row).rstrip() for row in cells]
