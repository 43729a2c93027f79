"""The checks of ``python -m gemma_norm``.

Each operator's results are compared with the float64 oracle, and the bits of results that must be equal are compared
with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _library, reference
from ._checks import DTYPES
from ._ops import rms_norm as ops
from ._ops import rms_norm_add_rms_norm as normed

HIDDEN = (256, 2048, 4096, 5120, 1023)
ROWS = 33


@dataclass
class Result:
    """The check of one operator in one dtype on one device, over all hidden sizes, with ``gemma`` off and on."""

    op: str
    device: str
    dtype: torch.dtype
    error: float = 0.0
    """The largest error, in units in the last place."""
    of_limit: float = 0.0
    """The largest ratio of an error to the error that the contract allows for its hidden size."""
    failure: str = ""

    def add(self, y: Tensor, exact: Tensor) -> None:
        error = reference.ulp_error(y, exact)
        self.error = max(self.error, error)
        self.of_limit = max(self.of_limit, error / reference.max_ulp_error(y.dtype, y.shape[-1]))
        if self.of_limit > 1 and not self.failure:
            self.failure = f"hidden {y.shape[-1]}: off by {error:.2f} units in the last place"

    def require(self, holds: bool, promise: str) -> None:
        if not holds and not self.failure:
            self.failure = f"{promise} does not hold"


def devices() -> list[str]:
    """The CPU and every GPU that the loaded library has code for."""
    count, unserved = torch.cuda.device_count() if torch.cuda.is_available() else 0, _library.unserved_gpus()
    return ["cpu", *(f"cuda:{index}" for index in range(count) if index not in unserved)]


def check(progress: Callable[[str], None]) -> Iterator[Result]:
    for device in devices():
        for op, run in _CHECKS.items():
            for dtype in DTYPES:
                progress(f"checking {op} {dtype} on {device}")
                result = Result(op, device, dtype)
                try:
                    for hidden in HIDDEN:
                        for gemma in (False, True):
                            run(result, *_inputs(hidden, dtype, device, gemma), gemma)
                except RuntimeError as error:
                    result.failure = str(error).strip().partition("\n")[0]
                yield result


def _inputs(hidden: int, dtype: torch.dtype, device: str, gemma: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual, post and weight.

    x is a slice of a wider buffer, as q is of a fused qkv. A zero-centred weight is small, so that the result is far
    off if its 1 is not added.
    """
    generator = torch.Generator().manual_seed(hidden)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    x, residual, post = random(ROWS, hidden + 8)[:, :hidden], random(ROWS, hidden), random(ROWS, hidden)
    weight = random(hidden) * (0.1 if gemma else 1.0)
    return x, residual, post, weight.float() if gemma else weight


def _rms_norm(result: Result, x: Tensor, residual: Tensor, post: Tensor, weight: Tensor, gemma: bool) -> None:
    y = ops.rms_norm(x, weight, gemma=gemma)
    result.add(y, reference.oracle(x, weight, gemma=gemma))
    result.require(
        torch.equal(y[-1:], ops.rms_norm(x[-1:].clone(), weight, gemma=gemma)), "one row alone equals it among others"
    )


def _rms_norm_out(result: Result, x: Tensor, residual: Tensor, post: Tensor, weight: Tensor, gemma: bool) -> None:
    exact = reference.oracle(x, weight, gemma=gemma)
    result.require(ops.rms_norm(x, weight, gemma=gemma, out=x) is x, "out is returned")
    result.add(x, exact)


def _add_rms_norm(result: Result, x: Tensor, residual: Tensor, post: Tensor, weight: Tensor, gemma: bool) -> None:
    for addition, s in ((None, x + residual), (post, x + (residual + post))):
        y, new_residual = ops.add_rms_norm(x, residual, weight, gemma=gemma, post_residual_addition=addition)
        result.add(y, reference.oracle(s, weight, gemma=gemma))
        result.require(torch.equal(new_residual, s), "the sum is the rounded sum")
        result.require(torch.equal(y, ops.rms_norm(s, weight, gemma=gemma)), "fused equals unfused")


def _fused_add_rms_norm(result: Result, x: Tensor, residual: Tensor, post: Tensor, weight: Tensor, gemma: bool) -> None:
    y, s = ops.add_rms_norm(x, residual, weight, gemma=gemma, post_residual_addition=post)
    exact = reference.oracle(x + (residual + post), weight, gemma=gemma)
    ops.fused_add_rms_norm(x, residual, weight, gemma=gemma, post_residual_addition=post)
    result.add(x, exact)
    result.require(torch.equal(x, y) and torch.equal(residual, s), "in place equals functional")


def _normed_add(result: Result, x: Tensor, residual: Tensor, post: Tensor, weight: Tensor, gemma: bool) -> None:
    post_weight = weight.flip(0)
    s = residual + ops.rms_norm(x, post_weight, gemma=gemma)
    y, new_residual = normed.rms_norm_add_rms_norm(x, residual, post_weight, weight, gemma=gemma)
    result.add(y, reference.oracle(s, weight, gemma=gemma))
    result.require(torch.equal(new_residual, s), "the sum is the rounded sum")
    result.require(torch.equal(y, ops.rms_norm(s, weight, gemma=gemma)), "fused equals unfused")
    normed.fused_rms_norm_add_rms_norm(x, residual, post_weight, weight, gemma=gemma)
    result.require(torch.equal(x, y) and torch.equal(residual, s), "in place equals functional")


_CHECKS: dict[str, Callable[[Result, Tensor, Tensor, Tensor, Tensor, bool], None]] = {
    "rms_norm": _rms_norm,
    "rms_norm out=x": _rms_norm_out,
    "fused_add_rms_norm": _fused_add_rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rms_norm_add_rms_norm": _normed_add,
}
