"""Reads the kernels out of an assembly file of an AMD GPU."""

from __future__ import annotations

import itertools
import re
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

SCOPES = ["wave", "block", "cluster", "stream"]  # gemma_norm::Scope
SIZES = {"float": 4, "float16": 2, "bfloat16": 2, "NoWeight": 0}


@dataclass
class Kernel:
    symbol: str
    form: str  # what is computed: a gemma_norm::Form
    x: str  # element types, of x and of the weight
    weight: str
    round_each_step: bool
    scope: str
    vectors: int  # 16-byte vectors of s that a thread holds
    threads: int  # of a block, at most
    aligned: bool
    lines: list[str] = field(default_factory=list)  # instructions, without comments
    numbers: dict[str, int] = field(default_factory=dict)  # of the metadata and of the kernel descriptor

    def __str__(self) -> str:
        words = [
            self.scope,
            f"{self.vectors} vectors",
            f"{self.threads} threads",
            f"{self.x} x",
            f"{self.weight} weight",
            self.form,
        ]
        words += ["rounded at each step"] if self.round_each_step else []
        return ", ".join(words + (["aligned"] if self.aligned else []))

    def all(self, pattern: str) -> list[str]:
        """The instructions whose name matches the pattern from its start."""
        return [line for line in self.lines if re.match(pattern, line)]

    def before(self, pattern: str) -> list[str]:
        """The instructions up to the first whose name matches."""
        return list(itertools.takewhile(lambda line: not re.match(pattern, line), self.lines))

    @property
    def add(self) -> bool:
        return self.form in ("AddRmsNorm", "AddToFloat32RmsNorm")

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
        """For each vector of s."""
        return 0 if self.weight == "NoWeight" else 2 if self.wide_weight else 1

    @property
    def wide_weight(self) -> bool:
        return SIZES[self.weight] > SIZES[self.s]

    @property
    def narrow_accesses(self) -> bool:
        """A vector of s takes half a vector of another operand."""
        return SIZES[self.x] < SIZES[self.s] or 0 < SIZES[self.weight] < SIZES[self.s]


def parse_name(symbol: str, name: str) -> Kernel | None:
    """`name` is demangled: void gemma_norm::gpu::normalize_rows<gemma_norm::Variant<gemma_norm::RmsNorm, ...>, ...>(...)."""
    matched = re.match(r"void gemma_norm::gpu::normalize_\w+<gemma_norm::Variant<(.*?)>, (.*)>\(", name)
    if not matched:
        return None
    form, x, weight, rounds = (a.removeprefix("gemma_norm::") for a in matched[1].split(", "))
    scope, *vectors, threads, aligned = matched[2].split(", ")
    return Kernel(
        symbol,
        form,
        x,
        weight,
        rounds == "true",
        SCOPES[int(re.sub(r"\D", "", scope))],
        int(vectors[0]) if vectors else 1,
        int(threads),
        aligned == "true",
    )


@cache
def kernels(path: Path) -> list[Kernel]:
    text = path.read_text()
    symbols = re.findall(r"^\s*\.amdhsa_kernel (\S+)$", text, re.M)
    names = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    metadata = {}
    for part in re.split(r"^  - (?=\.)", text[text.index("amdhsa.kernels:") :], flags=re.M)[1:]:
        (symbol,) = re.findall(r"\.symbol: +'?(\S+)\.kd", part)
        metadata[symbol] = {k: int(v) for k, v in re.findall(r"^ *\.(\w+): +(\d+)$", part, re.M)}
    result = []
    for symbol, name in zip(symbols, names.splitlines(), strict=False):
        kernel = parse_name(symbol, name)
        if kernel is None:
            raise ValueError(f"not a kernel of this project: {name}")
        start = text.index(f"\n{symbol}:")
        body = text[start : text.index("\n.Lfunc_end", start)]
        stripped = (line.split(";")[0].strip() for line in body.splitlines()[2:])
        kernel.lines = [line for line in stripped if line and not line.startswith(".") and not line.endswith(":")]
        start = text.index(f".amdhsa_kernel {symbol}\n")
        descriptor = text[start : text.index(".end_amdhsa_kernel", start)]
        kernel.numbers = {k: int(v) for k, v in re.findall(r"\.amdhsa_(\w+) (\d+)$", descriptor, re.M)}
        kernel.numbers |= metadata[symbol]
        result.append(kernel)
    return result
