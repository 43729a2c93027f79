"""What a GPU kernel computes and how, read from its symbol, for the tests of machine code of both vendors.

This is the one place that knows the template parameters of csrc/gpu/row_kernel.cuh, backward_kernel.cuh and
rope_kernel.cuh, and their order.
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


@dataclass(frozen=True)
class BackwardName:
    kernel: str  # "rows", "one row", "two passes", "sum of chunks" or "sum of rows"
    terms: str  # "PlainTerms" or "GatedTerms"; the sum of chunks has none, and no types
    x: str  # element types
    dout: str
    scope: str
    vectors: int  # 16-byte vectors of x that a thread holds of each row
    rows: int  # that it has at a time
    threads: int
    aligned: bool

    @property
    def sums(self) -> bool:
        """It adds up dweight, and has no dx."""
        return self.kernel.startswith("sum")

    def __str__(self) -> str:
        words = [self.kernel, self.scope, f"{self.vectors} vectors of {self.rows} rows", f"{self.threads} threads"]
        words += [f"{self.x} x", f"{self.dout} dout", self.terms]
        return ", ".join(words + (["aligned"] if self.aligned else []))


@dataclass(frozen=True)
class RopeName:
    """A kernel of qk_norm_rope."""

    x: str  # element types
    weight: str
    angles: str
    vectors: int
    partner: str  # where the other element of a pair is
    threads = 128

    @property
    def aligned(self) -> bool:
        return self.partner != "memory"

    def __str__(self) -> str:
        words = [f"{self.vectors} vectors", f"{self.x} x", f"{self.weight} weight", f"{self.angles} angles"]
        return ", ".join(["rope", *words, f"partner in {self.partner}"])


PARTNERS = ("vector", "thread", "other lane", "memory")
# void gemma_norm::gpu::rotate_heads<gemma_norm::bfloat16, float, float, 2, (gemma_norm::gpu::Partner)1>(...)
ROPE_PATTERN = re.compile(r"void gemma_norm::gpu::rotate_heads<(.*?)>\(")
# void gemma_norm::gpu::backpropagate_rows<gemma_norm::gpu::PlainTerms<gemma_norm::float16, ...>, ...>(...)
BACKWARD_PATTERN = re.compile(
    r"void gemma_norm::gpu::(backpropagate_\w+|sum_rows)<gemma_norm::gpu::(\w+)<(.*?)>(?:, (.*?))? ?>\("
)
# void gemma_norm::gpu::normalize_rows<gemma_norm::Variant<gemma_norm::RmsNorm, ...>, ...>(...)
PATTERN = re.compile(r"void gemma_norm::gpu::normalize_\w+<gemma_norm::Variant<(.*?)>, (.*)>\(")


def scope_of(word: str) -> str:
    return SCOPES[int(re.sub(r"\D", "", word))]


def parse_backward(demangled: str) -> BackwardName | None:
    """None where this is no kernel of the backward operators."""
    if re.match(r"gemma_norm::gpu::.*sum_chunks\(", demangled):
        return BackwardName("sum of chunks", "", "", "", "block", 0, 0, 1024, False)
    matched = BACKWARD_PATTERN.match(demangled)
    if not matched:
        return None
    function, terms, types, numbers = matched.groups()
    names = [word.removeprefix("gemma_norm::") for word in types.split(", ")]  # gated terms have one
    x, dout = names[0], names[-1]
    words = [word for word in (numbers or "").split(", ") if word]
    if function == "sum_rows":
        threads = 1024 if x == "float" else 512
        return BackwardName("sum of rows", terms, x, dout, "block", 1, 4, threads, words[0] == "true")
    if function == "backpropagate_in_two_passes":
        return BackwardName("two passes", terms, x, dout, "two passes", 1, 1, int(words[0]), words[-1] == "true")
    scope, vectors, *others = words
    if function == "backpropagate_one_row":
        return BackwardName("one row", terms, x, dout, scope_of(scope), int(vectors), 1, int(others[0]), True)
    rows, threads, _, aligned = others
    return BackwardName(
        "rows", terms, x, dout, scope_of(scope), int(vectors), int(rows), int(threads), aligned == "true"
    )


def parse(demangled: str) -> KernelName | BackwardName | RopeName:
    """ValueError where this is no kernel of the project."""
    if backward := parse_backward(demangled):
        return backward
    if rope := ROPE_PATTERN.match(demangled):
        x, weight, angles, vectors, partner = (word.removeprefix("gemma_norm::") for word in rope[1].split(", "))
        return RopeName(x, weight, angles, int(vectors), PARTNERS[int(re.sub(r"\D", "", partner))])
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
        scope=scope_of(scope),
        vectors=int(vectors[0]) if vectors else 1,
        threads=int(threads),
        aligned=aligned == "true",
    )


def kernel_names(symbols: list[str]) -> list[KernelName | BackwardName | RopeName]:
    """One for each symbol."""
    done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return [parse(name) for name in done.stdout.splitlines()]
