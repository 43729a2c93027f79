"""Reads the kernels out of an assembly file of an AMD GPU."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from kernel_names import BackwardName, KernelName, RopeName, kernel_names

SIZES = {"float": 4, "float16": 2, "bfloat16": 2, "NoWeight": 0}


@dataclass(frozen=True)
class Code:
    code: str  # instructions, one a line, without comments
    numbers: dict[str, int]  # of the metadata and of the kernel descriptor

    def all(self, pattern: str) -> list[str]:
        """The instructions whose name matches the pattern from its start."""
        return [found[0] for found in re.finditer(f"^(?:{pattern}).*$", self.code, re.M)]

    def before(self, pattern: str) -> list[str]:
        """The instructions up to the last whose name matches."""
        found = [match.start() for match in re.finditer(f"^(?:{pattern})", self.code, re.M)]
        return self.code[: found[-1] if found else None].splitlines()

    def calls(self) -> object:
        """What of it says that it calls a function; false if it calls none."""
        return self.numbers.get("uses_dynamic_stack") or self.all(r"s_swappc|s_call|.*@(gotpcrel|rel)32")

    def spills(self) -> list[str]:
        """What of it says that vector registers are kept in memory."""
        memory = [n for n in ("private_segment_fixed_size", "vgpr_spill_count") if self.numbers.get(n)]
        return memory or self.all("scratch_")


@dataclass(frozen=True)
class BackwardKernel(BackwardName, Code):
    """A kernel of the backward operators."""

    __str__ = BackwardName.__str__


@dataclass(frozen=True)
class RopeKernel(RopeName, Code):
    """A kernel of qk_norm_rope."""

    __str__ = RopeName.__str__


@dataclass(frozen=True)
class Kernel(KernelName, Code):
    """A kernel of the forward operators."""

    __str__ = KernelName.__str__

    @property
    def add(self) -> bool:
        return self.form in ("AddRmsNorm", "AddToFloat32RmsNorm", "RmsNormAddRmsNorm")

    @property
    def norms(self) -> int:
        """Of a row: x may have a norm of its own before the addition."""
        return 2 if self.form == "RmsNormAddRmsNorm" else 1

    @property
    def gated(self) -> bool:
        return self.form in ("GatedRmsNorm", "GatedInputRmsNorm")

    @property
    def s(self) -> str:
        """The element type of what is normalised."""
        return "float" if self.form in ("AddToFloat32RmsNorm", "GatedInputRmsNorm") else self.x

    @property
    def items(self) -> int:
        """Elements of a vector."""
        return 16 // SIZES[self.s]

    @property
    def weight_vectors(self) -> int:
        """Vectors of the weight for each vector of s."""
        return 0 if self.weight == "NoWeight" else 2 if self.wide_weight else 1

    @property
    def wide_weight(self) -> bool:
        return SIZES[self.weight] > SIZES[self.s]

    @property
    def narrow_accesses(self) -> bool:
        """Where the elements of another operand are half as wide as those of s, its vectors are of 8 bytes."""
        return SIZES[self.x] < SIZES[self.s] or 0 < SIZES[self.weight] < SIZES[self.s]


AnyKernel = Kernel | BackwardKernel | RopeKernel
K = TypeVar("K", Kernel, BackwardKernel, RopeKernel, AnyKernel)
KINDS = {KernelName: Kernel, BackwardName: BackwardKernel, RopeName: RopeKernel}


@cache
def kernels(path: Path) -> list[AnyKernel]:
    text = path.read_text()
    symbols = re.findall(r"^\s*\.amdhsa_kernel (\S+)$", text, re.M)
    metadata = {}
    for part in re.split(r"^  - (?=\.)", text[text.index("amdhsa.kernels:") :], flags=re.M)[1:]:
        (symbol,) = re.findall(r"\.symbol: +'?(\S+)\.kd", part)
        metadata[symbol] = {k: int(v) for k, v in re.findall(r"^ *\.(\w+): +(\d+)$", part, re.M)}
    result: list[AnyKernel] = []
    at = 0  # In the text, each kernel's code comes before its descriptor, and both before those of the next.
    for symbol, name in zip(symbols, kernel_names(symbols), strict=True):
        start = text.index(f"\n{symbol}:", at)
        body = text[start : text.index("\n.Lfunc_end", start)]
        stripped = (line.split(";")[0].strip() for line in body.splitlines()[2:])
        lines = [line for line in stripped if line and not line.startswith(".") and not line.endswith(":")]
        start = text.index(f".amdhsa_kernel {symbol}\n", start)
        at = text.index(".end_amdhsa_kernel", start)
        descriptor = text[start:at]
        numbers = {k: int(v) for k, v in re.findall(r"\.amdhsa_(\w+) (\d+)$", descriptor, re.M)}
        result.append(KINDS[type(name)](**vars(name), code="\n".join(lines), numbers=numbers | metadata[symbol]))
    return result


def check(code: Sequence[K], wrong: Callable[[K], object]) -> None:
    """Fails if `wrong` returns something for a kernel, and shows it."""
    found = {str(kernel): what for kernel in code if (what := wrong(kernel))}
    assert not found, "\n".join(f"{kernel}: {what}" for kernel, what in list(found.items())[:10])
