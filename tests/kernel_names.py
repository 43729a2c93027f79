"""What a GPU kernel computes and how, read from its symbol, for the tests of machine code of both vendors.

This is the one place that knows the template parameters of csrc/gpu/row_kernel.cuh and their order.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

SCOPES = ["wave", "block", "cluster", "two passes"]  # gemma_norm::Scope


@dataclass(frozen=True)
class KernelName:
    form: str  # what is computed: a gemma_norm::Form
    x: str  # element types, of x and of the weight
    weight: str
    round_each_step: bool
    scope: str
    vectors: int  # 16-byte vectors of s that a thread holds
    threads: int  # of a block, at most
    aligned: bool

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


# void gemma_norm::gpu::normalize_rows<gemma_norm::Variant<gemma_norm::RmsNorm, ...>, ...>(...)
PATTERN = re.compile(r"void gemma_norm::gpu::normalize_\w+<gemma_norm::Variant<(.*?)>, (.*)>\(")


def parse(demangled: str) -> KernelName:
    """ValueError where this is no kernel of the project."""
    matched = PATTERN.match(demangled)
    if not matched:
        raise ValueError(f"not a kernel of this project: {demangled}")
    form, x, weight, round_each_step = (word.removeprefix("gemma_norm::") for word in matched[1].split(", "))
    scope, *vectors, threads, aligned = matched[2].split(", ")  # normalize_in_two_passes has no number of vectors
    return KernelName(
        form=form,
        x=x,
        weight=weight,
        round_each_step=round_each_step == "true",
        scope=SCOPES[int(re.sub(r"\D", "", scope))],
        vectors=int(vectors[0]) if vectors else 1,
        threads=int(threads),
        aligned=aligned == "true",
    )


def kernel_names(symbols: list[str]) -> list[KernelName]:
    """One for each symbol."""
    done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return [parse(name) for name in done.stdout.splitlines()]
