"""What fuzz_check.py compares with: results between two float64 bounds, and gradients within the error of their terms.

A bound is the exact value, moved by the errors that float32 arithmetic may make, and rounded where the contract rounds.
Rounding keeps the order of numbers. So a result that the contract allows lies between its bounds after each rounding,
also where the last place of float32 tips one, and no share of wrong elements must be allowed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gemma_norm
from gemma_norm import reference

Arguments = dict[str, Any]
UNIT = torch.finfo(torch.float32).eps
LEAST = 2.0**-149  # of float32
OPS = torch.ops.gemma_norm


@dataclass(frozen=True)
class Bounds:
    low: Tensor
    high: Tensor

    @staticmethod
    def of(t: Tensor) -> Bounds:
        return Bounds(t.double(), t.double())

    def off_by(self, relative: float, absolute: float | Tensor = LEAST) -> Bounds:
        low, high = (t.abs().nan_to_num(0, 0, 0) * relative + absolute for t in (self.low, self.high))
        return Bounds(self.low - low, self.high + high)

    def rounded(self, dtype: torch.dtype | None) -> Bounds:
        return self if dtype is None else Bounds(self.low.to(dtype).double(), self.high.to(dtype).double())

    def times(self, other: Bounds) -> Bounds:
        products = [a * b for a in (self.low, self.high) for b in (other.low, other.high)]
        low = high = products[0]
        for p in products[1:]:
            low, high = torch.minimum(low, p), torch.maximum(high, p)
        return Bounds(low, high)

    def plus(self, other: Bounds) -> Bounds:
        return Bounds(self.low + other.low, self.high + other.high)

    def mapped(self, f: Any) -> Bounds:
        return Bounds(f(self.low), f(self.high))

    def assert_holds(self, y: Tensor) -> None:
        assert y.shape == self.low.shape, f"shape {list(y.shape)}, expected {list(self.low.shape)}"
        got, low, high = y.double(), *(t.to(y.dtype).double() for t in (self.low, self.high))
        # A bound that is NaN beside one that is not comes of an infinity that rounding may or may not reach.
        right = torch.where(low.isnan() & high.isnan(), got.isnan(), (low <= got) & (got <= high))
        right |= low.isnan() != high.isnan()
        right |= (low == -math.inf) & (high == math.inf)  # what may be 0 times infinity, which may be NaN
        if not bool(right.all()):
            at = tuple(int(i) for i in (~right).nonzero()[0])
            raise AssertionError(f"{float(got[at])!r} at {list(at)}, not in {float(low[at])!r} to {float(high[at])!r}")


def normed(s: Bounds, eps: float, size: int | None = None) -> Bounds:
    """``s * rstd``, within the bound of docs/contract.md, C1.4. ``size`` is that of a group."""
    groups = s.mapped(lambda t: t.unflatten(-1, (-1, size or t.shape[-1])))
    error = reference.max_ulp_error(torch.float32, groups.low.shape[-1]) * UNIT
    if s.low is s.high:
        n = Bounds.of(reference.oracle(groups.low, None, eps)).off_by(error)
    else:  # where the gate comes first
        small = torch.where(groups.low.sign() == groups.high.sign(), groups.low.abs().minimum(groups.high.abs()), 0.0)
        large = groups.low.abs().maximum(groups.high.abs())
        least, most = (_rstd(t, eps) for t in (large, small))
        n = groups.times(Bounds(least, most)).off_by(error)
    return n.mapped(lambda t: t.flatten(-2))


def _rstd(s: Tensor, eps: float) -> Tensor:
    total = s.square().sum(-1, keepdim=True)
    total = torch.where(total > torch.finfo(torch.float32).max, math.inf, total)
    return 1 / torch.sqrt(total / s.shape[-1] + torch.tensor(eps).item())


def weighted(n: Bounds, weight: Tensor | None, gemma: bool, each_step: torch.dtype | None) -> Bounds:
    n = n.rounded(each_step)
    if weight is None:
        return n
    return n.times(Bounds.of(1 + weight.double() if gemma else weight)).off_by(2 * UNIT)


def norm(s: Tensor, weight: Tensor | None, options: Arguments, dtype: torch.dtype) -> Bounds:
    each_step = dtype if options.get("round_each_step") else None
    return weighted(normed(Bounds.of(s), options["eps"]), weight, bool(options.get("gemma")), each_step)


def activation(gate: Tensor, sigmoid: bool) -> Bounds:
    """C4.5: within 3 units in the last place, and where the logistic function is subnormal |gate| * 1.5 * 2^-149.
    PyTorch's own, which serves torch.func's transforms, is 0 from -88.8 on, so the second is larger here.
    """
    g = gate.double()
    exact = torch.sigmoid(g) if sigmoid else g * torch.sigmoid(g)
    return Bounds.of(exact).off_by(4 * UNIT, (1 + g.abs().nan_to_num(0, 0, 0)) * 2.0**-126)


def gated(a: Arguments) -> Bounds:
    x, gate, dtype = a["x"], a["gate"], a["x"].dtype
    each_step = dtype if a["round_each_step"] else None
    act = None if gate is None else activation(gate, a["sigmoid"])
    s = Bounds.of(x)
    if act is not None and not a["norm_before_gate"]:
        s = s.times(act).off_by(UNIT)
    y = weighted(normed(s, a["eps"], a.get("group_size")), a["weight"], False, each_step)
    if a["norm_before_gate"]:
        y = y.rounded(each_step)
        y = y if act is None else y.times(act).off_by(UNIT)
    return y


def rotated(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, a: Arguments) -> Bounds:
    rounding = x.dtype if a["round_rotation"] else None
    n = norm(x, weight, a, x.dtype).rounded(rounding)
    if cos.dtype != x.dtype:  # the rotation is in float32 then
        rounding = None
    c, s = Bounds.of(cos.unsqueeze(-2)), Bounds.of(sin.unsqueeze(-2))
    rotary = cos.shape[-1]
    first, rest = n.mapped(lambda t: t[..., :rotary]), n.mapped(lambda t: t[..., rotary:])
    # The half that is negated has its bounds exchanged.
    pairs = [reference.rotate_half(t, a["interleaved"]) for t in (first.low, first.high)]
    turn = Bounds(pairs[0].minimum(pairs[1]), pairs[0].maximum(pairs[1]))
    products = [p.off_by(UNIT).rounded(rounding) for p in (first.times(c), turn.times(s))]
    turned = products[0].plus(products[1]).off_by(UNIT)
    return Bounds(torch.cat((turned.low, rest.low), -1), torch.cat((turned.high, rest.high), -1))


def results(name: str, a: Arguments, got: tuple[Tensor, ...], native: bool) -> list[Bounds | Tensor]:
    """Of a forward operator: bounds for what is normalised; the very numbers of the new residual.

    ``got`` are its results. Those that are not ``native`` are of the definition, run by a transform.
    """
    if name == "rms_norm":
        return [norm(a["x"], a["weight"], a, a["x"].dtype)]
    if name == "gated_rms_norm":
        return [gated(a)]
    if name == "qk_norm_rope":
        cos, sin = a["cos"], a["sin"]
        if cos is None:
            sections = a.get("mrope_section"), bool(a.get("mrope_interleaved"))
            cos, sin = reference.angles(a["cos_sin_cache"], a["positions"], a["interleaved"], *sections)
        copies = [a["q"][..., :0, :] if a[n] is None else a[n] for n in ("gate", "v") if n in a]
        return [rotated(a[n], a[f"{n}_weight"], cos, sin, a) for n in ("q", "k")] + copies
    residual, x = a["residual"], a["x"]
    if name == "rms_norm_add_rms_norm":
        options = {k: a[k] for k in ("eps", "gemma", "round_each_step")}
        n = norm(x, a["post_weight"], a, x.dtype)
        x = gemma_norm.rms_norm(x, a["post_weight"], **options)
        n.assert_holds(x)
        if not native:
            s = n.rounded(x.dtype).plus(Bounds.of(residual)).rounded(x.dtype)
            return [norm(got[1], a["weight"], a, x.dtype), s]
    elif a.get("post_residual_addition") is not None:
        residual = residual + a["post_residual_addition"]
    s = (x + residual).to(residual.dtype)
    return [norm(s, a["weight"], a, x.dtype), s]


def assert_near(got: Tensor, want: Tensor, arithmetic: Tensor) -> None:
    """``got`` is ``want`` but for its own rounding and for errors of float32's arithmetic of that size."""
    info = torch.finfo(got.dtype)
    largest = torch.full_like(want, info.max)
    want = want.to(got.dtype).double() if got.dtype == torch.float16 and bool((want.abs() > info.max).any()) else want
    allowed = info.eps * want.abs().minimum(largest) + info.smallest_normal + arithmetic
    right = ((got.double() - want).abs() <= allowed) | (got.double() == want)
    assert got.shape == want.shape and bool(right.all()), f"off by {float((got.double() - want).abs().max()):g}"


def assert_gradients(name: str, a: Arguments, got: tuple[Tensor, ...]) -> None:
    """Beside the formula in float64. An error is measured by the terms that are added up, since they may cancel."""
    x, dout, weight, eps = a["x"].double(), a["dout"].double(), a["weight"], a["eps"]
    gate, gate_first = a.get("gate"), not a.get("norm_before_gate", True)
    w = torch.ones_like(x[..., :]) if weight is None else 1 + weight.double() if a.get("gemma") else weight.double()
    act, slope, slope_terms = 1.0, 0.0, 0.0
    if gate is not None:
        g = gate.double()
        logistic = torch.sigmoid(g)
        act = logistic if a["sigmoid"] else g * logistic
        slope = logistic * (1 - logistic) * (1 if a["sigmoid"] else g) + (0 if a["sigmoid"] else logistic)
        slope_terms = logistic * (1 + g.abs())
    size = a.get("group_size") or x.shape[-1]

    def groups(t: Tensor) -> Tensor:
        return t.unflatten(-1, (-1, size))

    s, upstream = (x * act, dout) if gate_first else (x, dout * act)
    rstd = torch.rsqrt(groups(s).square().mean(-1, keepdim=True) + eps)
    n = (groups(s) * rstd).flatten(-2)
    weighed = groups(upstream * w)
    ds = rstd * (weighed - groups(n) * (weighed * groups(n)).mean(-1, keepdim=True))
    terms = rstd * (weighed.abs() + groups(n).abs() * (weighed * groups(n)).abs().mean(-1, keepdim=True))
    ds, terms = ds.flatten(-2), terms.flatten(-2)
    want, sizes = [ds * act if gate_first else ds], [terms * act if gate_first else terms]
    if a.get("dsum") is not None:
        want[0], sizes[0] = ds + a["dsum"].double(), terms + a["dsum"].double().abs()
    if gate is not None:
        by_slope = (ds * x, terms * x) if gate_first else (dout * n * w, dout * n * w)
        want.append(by_slope[0] * slope)
        sizes.append(by_slope[1] * slope_terms)
    if not name.endswith("_input"):
        rows = list(range(x.dim() - 1))
        products = upstream * n
        want.append(products.sum(rows) if rows else products)
        sizes.append(products.abs().sum(rows) if rows else products)
    count = x.numel() // x.shape[-1]
    for i, (g, exact, magnitude) in enumerate(zip(got, want, sizes, strict=True)):
        of_weight = i == len(want) - 1 and not name.endswith("_input")
        units = 32 + (count if of_weight else size) ** 0.5
        assert_near(g, exact, magnitude.abs() * UNIT * units)
