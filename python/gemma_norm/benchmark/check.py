"""The check of a provider before it is timed: one call, whose results are compared with the float64 oracle.

The memory of its outputs is filled with NaN before, so that elements that it does not write are found.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from gemma_norm import reference

from . import quantised, rotation
from .cases import ADD_RMS_NORM, GATED_RMS_NORM, NORM_ADD_NORM, QK_NORM_ROPE, Inputs, post_weight
from .formula import EPS
from .norms import Call
from .providers import Provider

PEERS = 8.0
"""The bound for other libraries is this multiple of ours. They also round the weight and the normalised value, or they
do not round the sum."""
ACTIVATION = 4.0
"""What silu and the product with it may add to the error, in float32 units in the last place."""
MOST = {"cuda": 2**24, "cpu": 2**20}
"""At most this many elements are compared with the oracle; of a larger tensor, these are evenly spaced rows. All
elements are checked for NaN."""


class WrongResult(Exception):
    """A provider's result is wrong; the message says how."""


def check(provider: Provider, call: Call, inputs: Inputs, gemma: bool) -> None:
    """Raise :class:`WrongResult` if ``call`` does not compute what the point asks for."""
    inputs.restore()
    poison(inputs.original[0])
    outputs = call(*inputs.sets[0])
    y, *sums = outputs if isinstance(outputs, tuple) else (outputs,)
    if inputs.point.op in quantised.QUANT_OPS:
        return _check_quantised(provider, (y, *sums), inputs, gemma)
    if provider.copies:
        rotates = inputs.point.op == QK_NORM_ROPE
        sources = rotation.sources(inputs.original) if rotates else inputs.original
        for got, source in zip((y, *sums), sources, strict=False):
            _compare("the copy", got, source, 0.0)
        return
    if inputs.point.op == QK_NORM_ROPE:
        return _check_rotation(provider, (y, *sums), inputs, gemma)
    x = inputs.original[0]
    bound = reference.max_ulp_error(x.dtype, x.shape[-1])
    if inputs.point.op == ADD_RMS_NORM:
        x = x + inputs.original[1]
        _compare("the sum", sums[0], x, 0.0 if provider.exact else 1.0)
    elif inputs.point.op == NORM_ADD_NORM:
        _check_sum_of_norm(sums[0], inputs, bound * (1.0 if provider.exact else PEERS), gemma)
        x = sums[0].clone()
    else:
        _compare("x, which is not to be written,", inputs.sets[0][0], x, 0.0)
    exact = [x]
    if inputs.point.op == GATED_RMS_NORM:
        exact.append(inputs.original[1])
        bound += ACTIVATION * torch.finfo(torch.float32).eps / torch.finfo(x.dtype).eps

    def oracle(s: Tensor, *gate: Tensor) -> Tensor:
        y = reference.oracle(s, inputs.weight, EPS, gemma)
        return y * functional.silu(gate[0].double()) if gate else y

    _compare("the result", y, exact, bound * (1.0 if provider.exact else PEERS), oracle)


def _check_sum_of_norm(s: Tensor, inputs: Inputs, bound: float, gemma: bool) -> None:
    """``s`` is the sum of the residual and the norm of x. Where the two nearly cancel each other, the error of the norm
    is many units of the sum, so it is measured in units of what was added.
    """
    x, residual = inputs.original
    _require_like("the sum", s, x)
    rows = _some_rows(s)
    n = reference.oracle(x[rows], post_weight(inputs.weight), EPS, gemma)
    added = residual[rows].double()
    unit = torch.finfo(s.dtype).eps * (n.abs() + added.abs())
    error = float(((s[rows].double() - (n + added)).abs() / unit.clamp_min(torch.finfo(s.dtype).tiny)).max())
    if error > bound + 0.5:
        raise WrongResult(f"the sum is {error:.3g} units in the last place off, allowed are {bound + 0.5:.3g}")


def _check_rotation(provider: Provider, outputs: tuple[Tensor, ...], inputs: Inputs, gemma: bool) -> None:
    q, k, cos, sin, _, _, *copied = inputs.original
    y, z, *copies = outputs
    if len(copies) != len(copied):
        raise WrongResult(f"{len(copies)} tensors were copied, not {len(copied)}")
    for got, source in zip(copies, copied, strict=True):
        _compare("a copy", got, source, 0.0)
    bound = 1.0 if provider.exact else rotation.ROUNDINGS
    weights = {"q": inputs.weight, "k": rotation.k_weight(inputs.weight)}
    for (name, weight), got, x in zip(weights.items(), (y, z), (q, k), strict=True):
        _require_like(name, got, x)
        rows = torch.linspace(0, len(x) - 1, min(len(x), 64), dtype=torch.float64, device=x.device).round().long()
        error = rotation.error(got[rows], x[rows], weight, cos[rows], sin[rows], gemma)
        if error > bound:
            raise WrongResult(f"{name} is {error:.3g} units in the last place off, allowed are {bound:.3g}")


def _check_quantised(provider: Provider, outputs: tuple[Tensor, ...], inputs: Inputs, gemma: bool) -> None:
    if provider.copies or provider.name == "ours:norm alone":
        return
    error = quantised.error(inputs.point.op, outputs, inputs.original, inputs.weight, gemma)
    bound = quantised.UNITS * (1.0 if provider.exact else PEERS)
    if not error <= bound:
        raise WrongResult(f"the result is {error:.3g} halves of a unit of float8 off, allowed are {bound:.3g}")


def _some_rows(t: Tensor) -> Tensor:
    """The indices of evenly spaced rows, not more of them than may be compared."""
    count = min(len(t), max(1, MOST[t.device.type] // t.shape[-1]))
    return torch.linspace(0, len(t) - 1, count, dtype=torch.float64, device=t.device).round().long()


def poison(x: Tensor) -> None:
    """Leave NaN in freed memory that the allocator will use for the next tensors of x's size, which are the outputs.

    PyTorch's GPU allocator always reuses such memory. glibc takes an aligned block out of a larger one, so on the CPU
    the freed tensors are a little larger; and it holds back the first few small ones, so there are more of them.
    """
    size = x.numel() + (128 if x.device.type == "cpu" else 0)
    copies = 4 if x.nbytes > 2**16 else 32
    freed = [torch.full((size,), torch.nan, dtype=x.dtype, device=x.device) for _ in range(copies)]
    del freed


def _compare(
    name: str, got: Tensor, sources: Tensor | list[Tensor], bound: float, exact: Callable[..., Tensor] = Tensor.double
) -> None:
    """Compare ``got``, which must have the shape and dtype of the first source, with ``exact`` of the sources.

    ``exact`` is given some rows of each source, and returns what these rows of ``got`` should be.
    """
    sources = [sources] if isinstance(sources, Tensor) else sources
    _require_like(name, got, sources[0])
    hidden = got.shape[-1]
    got = got.reshape(-1, hidden)
    rows = _some_rows(got)
    error = reference.ulp_error(got[rows], exact(*(s.reshape(-1, hidden)[rows] for s in sources)))
    if error > bound:
        raise WrongResult(f"{name} is {error:.3g} units in the last place off, allowed are {bound:.3g}")


def _require_like(name: str, got: Tensor, source: Tensor) -> None:
    if got.shape != source.shape or got.dtype != source.dtype:
        raise WrongResult(f"{name} is {got.dtype} {list(got.shape)}, not {source.dtype} {list(source.shape)}")
    if got.isnan().any():
        raise WrongResult(f"{name} has NaN: not all of it was written")
