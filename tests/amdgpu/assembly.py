"""Reads the kernels out of an assembly file of an AMD GPU."""

from __future__ import annotations

import itertools
import re
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

SCOPES = ["wave", "block", "cluster", "stream"]  # gemma_norm::Scope


@dataclass
class Kernel:
    symbol: str
    op: str
    x: str
    weight: str
    add: bool
    scope: str
    vectors: int  # 16-byte vectors of x that a thread holds
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
            self.op,
        ]
        return ", ".join([w for w in words if w] + (["aligned"] if self.aligned else []))

    def all(self, pattern: str) -> list[str]:
        """The instructions whose name matches the pattern from its start."""
        return [line for line in self.lines if re.match(pattern, line)]

    def before(self, pattern: str) -> list[str]:
        """The instructions up to the first whose name matches."""
        return list(itertools.takewhile(lambda line: not re.match(pattern, line), self.lines))

    @property
    def wide_weight(self) -> bool:
        return self.weight == "float" != self.x


def parse_name(symbol: str, name: str) -> Kernel | None:
    """`name` is demangled: void gemma_norm::gpu::normalize_rows<gemma_norm::RmsNorm, gemma_norm::bfloat16, float, ...>(...)."""
    matched = re.match(r"void gemma_norm::gpu::normalize_(\w+)<(.*)>\(", name)
    if not matched:
        return None
    op, x, weight, scope, *vectors, threads, aligned = (a.removeprefix("gemma_norm::") for a in matched[2].split(", "))
    scope = SCOPES[int(re.sub(r"\D", "", scope))]
    return Kernel(
        symbol,
        op,
        x,
        weight,
        op == "AddRmsNorm",
        scope,
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
