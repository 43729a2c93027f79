"""Nothing is timed that is not right: one call against the float64 oracle, its outputs poisoned with NaN."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gemma_norm import reference

from .cases import EPS, RMS_NORM, Inputs
from .providers import Call, Provider

PEERS = 8.0
"""Times the bound of a single rounding: others round the weight and the normalised value too, or not the sum."""
MOST = {"cuda": 2**24, "cpu": 2**20}
"""Elements compared with the oracle; of larger tensors, evenly spaced rows. Every element is looked at for NaN."""


class WrongResult(Exception):
    pass


def check(provider: Provider, call: Call, inputs: Inputs, gemma: bool) -> None:
    """Raises :class:`WrongResult`."""
    inputs.restore()
    _poison(inputs)
    outputs = call(*inputs.sets[0])
    y, *sums = outputs if isinstance(outputs, tuple) else (outputs,)
    if provider.copies:
        for got, source in zip((y, *sums), inputs.original, strict=True):
            _compare("the copy", got, source, 0.0)
        return
    x = inputs.original[0]
    if inputs.point.op == RMS_NORM:
        s = x
        _compare("x, which is not to be written,", inputs.sets[0][0], x, 0.0)
    else:
        s = x + inputs.original[1]
        _compare("the sum", sums[0], s, 0.0 if provider.exact else 1.0)
    bound = reference.max_ulp_error(x.dtype, x.shape[-1]) * (1.0 if provider.exact else PEERS)
    _compare("the result", y, s, bound, lambda rows: reference.oracle(rows, inputs.weight, EPS, gemma))


def _poison(inputs: Inputs) -> None:
    """Leave NaN in freed memory, which the allocator hands to the next tensors of this size: the outputs.

    PyTorch's GPU allocator does so always. glibc takes an aligned block out of a larger one, and keeps the first few
    small ones back, hence more of them and a little larger.
    """
    x = inputs.original[0]
    size = x.numel() + (128 if x.device.type == "cpu" else 0)
    copies = 4 if x.nbytes > 2**16 else 32
    freed = [torch.full((size,), torch.nan, dtype=x.dtype, device=x.device) for _ in range(copies)]
    del freed


def _compare(
    name: str, got: Tensor, source: Tensor, bound: float, exact: Callable[[Tensor], Tensor] = Tensor.double
) -> None:
    if got.shape != source.shape or got.dtype != source.dtype:
        raise WrongResult(f"{name} is {got.dtype} {list(got.shape)}, not {source.dtype} {list(source.shape)}")
    if got.isnan().any():
        raise WrongResult(f"{name} has NaN: not all of it was written")
    hidden = got.shape[-1]
    got, source = got.reshape(-1, hidden), source.reshape(-1, hidden)
    count = min(len(got), max(1, MOST[got.device.type] // hidden))
    rows = torch.linspace(0, len(got) - 1, count, dtype=torch.float64, device=got.device).round().long()
    error = reference.ulp_error(got[rows], exact(source[rows]))
    if error > bound:
        raise WrongResult(f"{name} is {error:.3g} units in the last place off, allowed are {bound:.3g}")
