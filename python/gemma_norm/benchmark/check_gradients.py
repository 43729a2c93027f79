"""The check of a provider's gradients before they are timed, against float64 autograd of the oracle.

As in :mod:`.check`, the memory of the results is filled with NaN before the call. An error is measured by what the
gradient's dtype and float32 arithmetic allow (a *bound* of its own for each element), because a gradient of x is a
difference and may be much smaller than what it is made of.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gemma_norm import reference

from .cases import ADD_RMS_NORM, GATED_RMS_NORM
from .check import MOST, WrongResult, poison
from .formula import EPS
from .gradients import Call, GradientInputs
from .providers import Provider

PEERS = 4.0
"""Other libraries may be off by this many units of the dtype: they also round the weight, the normalised row or parts
of the sums."""
FLOAT32 = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Exact:
    """A gradient in float64, and how large the terms are whose sum it is."""

    value: Tensor
    terms: Tensor
    additions: float
    """By how many float32 units of ``terms`` a float32 computation may be off."""

    def bound(self, dtype: torch.dtype, exact: bool) -> Tensor:
        eps = torch.finfo(dtype).eps
        smallest = torch.finfo(dtype).tiny * eps
        if exact:  # half a unit for the one rounding, and a thousandth for a rounding that goes the other way
            return self.value.abs() * eps * 0.501 + smallest / 2 + self.terms * FLOAT32 * self.additions
        return PEERS * (eps * (self.value.abs() + self.terms) + smallest + self.terms * FLOAT32 * self.additions)


def check(provider: Provider, call: Call, inputs: GradientInputs, gemma: bool) -> None:
    """Raise :class:`.check.WrongResult` if ``call`` does not return the gradients that the point asks for."""
    inputs.restore()
    poison(inputs.sources[0])
    index, *gradients = inputs.sets[0]
    got = call(index, *gradients)
    for name, tensors, originals in (
        ("an input", inputs.leaves[0], inputs.sources),
        ("an incoming gradient", () if provider.writes_gradient else gradients, inputs.original),
    ):
        if not all(torch.equal(t, original) for t, original in zip(tensors, originals, strict=False)):
            raise WrongResult(f"{name} was written")
    if gemma not in inputs.exact:
        inputs.exact[gemma] = _exact(inputs, gemma)
    rows, wanted = inputs.exact[gemma]
    names = ["x", *{ADD_RMS_NORM: ["the residual"], GATED_RMS_NORM: ["the gate"]}.get(inputs.point.op, []), "weight"]
    for name, mine, exact, source in zip(names, got, wanted, (*inputs.sources, inputs.weight), strict=True):
        what = f"the gradient of {name}"
        if mine.shape != source.shape or mine.dtype != source.dtype:
            raise WrongResult(f"{what} is {mine.dtype} {list(mine.shape)}, not {source.dtype} {list(source.shape)}")
        if mine.isnan().any():
            raise WrongResult(f"{what} has NaN: not all of it was written")
        chosen = mine if name == "weight" else mine[rows]
        apart = (chosen.double() - exact.value).abs()
        ratio = torch.where(apart == 0, 0.0, apart / exact.bound(mine.dtype, provider.exact))  # a bound may be 0
        error = ratio.max().item()
        if not error <= 1:  # nor NaN
            raise WrongResult(f"{what} is off by {error:.3g} times what is allowed")


@torch.enable_grad()
def _exact(inputs: GradientInputs, gemma: bool) -> tuple[Tensor, list[Exact]]:
    """Some rows, the gradients of x and of residual or gate there, and the whole gradient of the weight."""
    point, weight = inputs.point, inputs.weight.detach().double()
    most = max(1, MOST[inputs.weight.device.type] // point.hidden)
    rows = torch.linspace(0, point.rows - 1, min(point.rows, most), dtype=torch.float64, device=weight.device)
    rows = rows.round().long()
    total, squares = torch.zeros_like(weight), torch.zeros_like(weight)
    for first in range(0, point.rows, most):
        part = torch.arange(first, min(first + most, point.rows), device=weight.device)
        *_, dweight, terms = _derive(inputs, gemma, part)
        total += dweight
        squares += terms.square().sum(0)
    ds, scale, dgate, dgate_terms, _, _ = _derive(inputs, gemma, rows)
    sums = 4 * reference.max_ulp_error(torch.float32, point.hidden)
    found = [Exact(ds, scale, sums)]
    if point.op == ADD_RMS_NORM:
        found.append(found[0])
    if point.op == GATED_RMS_NORM:
        found.append(Exact(dgate, dgate_terms, sums))
    return rows, [*found, Exact(total, squares.sqrt(), sums + 4 * math.sqrt(point.rows))]


def _derive(inputs: GradientInputs, gemma: bool, rows: Tensor) -> tuple[Tensor, ...]:
    """At these rows: the gradient of s and its terms' size, the gate's and its terms; the weight's and its terms."""
    x, *others = (t[rows] for t in inputs.sources)
    dy, *dsum = (t[rows].double() for t in inputs.original)
    gated = inputs.point.op == GATED_RMS_NORM
    s = (x + others[0] if inputs.point.op == ADD_RMS_NORM else x).double().requires_grad_()
    gate = (others[0] if gated else torch.zeros_like(x)).double().requires_grad_()
    weight = inputs.weight.detach().double().requires_grad_()
    activation = functional.silu(gate) if gated else torch.ones_like(gate)
    n = reference.oracle(s, None, EPS)
    y = reference.oracle(s, weight, EPS, gemma) * activation
    ds, dgate, dweight = torch.autograd.grad(y, (s, gate, weight), dy, materialize_grads=True)
    with torch.no_grad():
        factor = 1 + weight if gemma else weight
        rstd = torch.rsqrt(s.square().mean(-1, keepdim=True) + EPS)
        scale = (rstd * dy * factor * activation).abs().amax(-1, keepdim=True)
        if dsum:
            ds, scale = ds + dsum[0], scale + dsum[0].abs()
        return ds, scale.expand_as(ds), dgate, (dy * n * factor).abs(), dweight, dy * n * activation
