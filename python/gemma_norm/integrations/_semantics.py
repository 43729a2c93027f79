"""Which formula a module computes, found out by running it.

A name says nothing about a norm: among the classes of transformers, some called RMSNorm return the reciprocal root
alone or compute something else, and some called LayerNorm are RMSNorms. So a copy of the module, with a random weight
of its own, is run on random inputs, and what it returns is compared with each formula that this library has.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference

EPS_NAMES = ("variance_epsilon", "eps")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MIXED = tuple((x, weight) for x, weight in itertools.product(DTYPES, DTYPES) if x != weight)
# Of 16-bit elements so many may differ from the formula, each by so many units in the last place. A class that computes
# pow(mean, -0.5), or adds the squares in another order, rounds a few elements in the other direction, and so do other
# versions of PyTorch's silu; what is rounded at each step then differs by more than one unit. With another place for a
# rounding, 20 % of the elements and more differ.
SHARE = 0.002
ULPS = 4


@dataclass(frozen=True)
class Semantics:
    """What a module computes, in terms of this library's functions."""

    gated: bool = False
    weighted: bool = True
    gemma: bool = False
    each_step: bool = False
    sigmoid: bool = False
    norm_before_gate: bool = True
    group_size: int | None = None
    without_gate: bool = False
    """A gated norm that also takes None for the gate, and then is the norm alone."""
    wide_gate: bool = False
    """A gate of 16 bits is taken with float32 x, as if it were float32."""
    mixed: frozenset[tuple[torch.dtype, torch.dtype]] = field(default=frozenset(), repr=False)
    """The pairs of different dtypes, x's and the weight's, for which the module computes what our function does.
    transformers' Llama-like classes return float32 for 16-bit x and a float32 weight, which no function of ours does.
    """

    def __str__(self) -> str:
        if not self.gated:
            if not self.weighted:
                return "no weight"
            return "1 + weight" if self.gemma else "rounds twice" if self.each_step else "rounds once"
        gate = "sigmoid" if self.sigmoid else "silu"
        order = f"gated, {gate}" if self.norm_before_gate else f"{gate} gate first"
        roundings = "rounds each step" if self.each_step else "rounds once"
        return f"{order}, {roundings}" + (f", groups of {self.group_size}" if self.group_size else "")

    def formula(self, x: Tensor, weight: Tensor | None, eps: float, gate: Tensor | None = None) -> Tensor:
        weight = weight if self.weighted else None
        each_step = self.each_step and (weight is None or weight.dtype == x.dtype)
        if self.gated:
            assert weight is not None
            options = (self.sigmoid, self.norm_before_gate, self.group_size, each_step)
            return reference.gated_rms_norm(x, gate, weight, eps, *options)
        return reference.rms_norm(x, weight, eps, self.gemma, each_step)


@dataclass(frozen=True)
class Found:
    """A module that computes a formula of ours."""

    semantics: Semantics
    eps_name: str
    share: float
    """The largest share of 16-bit elements that differ from the formula, each by at most ULPS units."""


@dataclass(frozen=True)
class Left:
    """A module that looks like a norm and is not replaced, and why."""

    reason: str


_cache: dict[Any, Found | Left] = {}


def classify(module: nn.Module) -> Found | Left | None:
    """None for what does not look like a norm at all. Neither the module nor its weight is run, read or changed."""
    names = [name for name in EPS_NAMES if name in module.__dict__]
    kind = type(module)
    if not names and not kind.__name__.endswith("Norm"):
        return None
    if kind.forward in _KNOWN:
        return None
    if "weight" in getattr(module, "parametrizations", ()):
        return Left("its weight is parametrized")
    if module._modules:  # what it consists of is looked at by itself
        return None
    tensors = {name: t for name, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
    if not names:
        return Left(f"has no {' or '.join(EPS_NAMES)}")
    if len(names) > 1:
        return Left(f"has both {' and '.join(EPS_NAMES)}")
    eps = module.__dict__[names[0]]
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        return Left(f"{names[0]} is {eps!r}, not a number")
    if tensors.keys() - {"weight"}:
        return Left(f"has {', '.join(sorted(tensors.keys() - {'weight'}))} beside a weight")
    weight = tensors.get("weight", module.__dict__.get("weight"))  # FSDP keeps a view as a plain attribute
    if weight is not None and weight.dim() != 1:
        return Left(f"its weight has {weight.dim()} dimensions")
    if weight is not None and not weight.dtype.is_floating_point:
        return Left(f"its weight has dtype {str(weight.dtype).removeprefix('torch.')}")
    attributes = {k: v for k, v in module.__dict__.items() if not k.startswith("_") and k not in ("training", "weight")}
    simple = all(isinstance(v, str | int | float | bool | None | tuple) for v in attributes.values())
    size = None if weight is None else weight.shape[0]
    key = (kind, kind.forward, size, tuple(sorted((k, repr(v)) for k, v in attributes.items())))
    if simple and key in _cache:
        return _cache[key]
    # The probe is on the CPU, also where the program has made another device the default.
    with warnings.catch_warnings(), torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        warnings.simplefilter("ignore")  # PyTorch's own norm warns of mixed dtypes, which the model may never see
        result = _Probe(module, names[0], weight).run()
    if simple:
        _cache[key] = result
    return result


# What these compute is documented: they subtract a mean, or normalise over other dimensions.
_KNOWN = {
    kind.forward
    for kind in (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.LocalResponseNorm)
}


class _Probe:
    """One module's copy, the inputs and the candidates."""

    def __init__(self, module: nn.Module, eps_name: str, weight: Tensor | None) -> None:
        self.module, self.eps_name = module, eps_name
        self.eps = float(module.__dict__[eps_name])
        shape = module.__dict__.get("normalized_shape")
        own = shape[-1] if isinstance(shape, tuple) and len(shape) == 1 else 64
        self.hidden = own if weight is None else weight.shape[0]
        rows = max(4, -(-8192 // self.hidden))
        self.generator = torch.Generator().manual_seed(0)
        # One half of the inputs is about as large as the root of eps, so that a wrong eps shows.
        scales = torch.tensor([1.0, min(self.eps, 1.0) ** 0.5 or 1e-3])[:, None, None]
        self.x = self._random(2, rows, self.hidden) * scales
        self.gate = self._random(2, rows, self.hidden)
        self.weight = None if weight is None else self._random(self.hidden) * 0.3 + 0.7

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device="cpu", dtype=torch.float32)

    def original(
        self, dtype: torch.dtype, weight_dtype: torch.dtype, gates: tuple[Tensor | None, ...], training: bool = False
    ) -> Any:
        """The class's forward on a shallow copy: no hook runs, and no tensor of the model is touched. A float32 gate is
        given x's dtype.
        """
        copy = object.__new__(type(self.module))
        copy.__dict__ = {**self.module.__dict__, "training": training}
        copy._parameters, copy._buffers = dict(self.module._parameters), dict(self.module._buffers)
        copy.__dict__.pop("forward", None)
        if self.weight is not None:
            weight = self.weight.to(weight_dtype)
            if "weight" in copy._parameters:
                copy._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
            elif "weight" in copy._buffers:
                copy._buffers["weight"] = weight
            else:
                copy.__dict__["weight"] = weight
        cast = [gate.to(dtype) if gate is not None and gate.dtype == torch.float32 else gate for gate in gates]
        return type(self.module).forward(copy, self.x.to(dtype), *cast)

    def run(self) -> Found | Left:
        parameters = list(inspect.signature(type(self.module).forward).parameters.values())[1:]
        if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters) or not 1 <= len(parameters) <= 2:
            return Left("its forward takes other arguments than x, or x and a gate")
        if len(parameters) == 2:
            return self._run(self._gated_candidates(), gate=self.gate)
        if self.weight is None:
            return self._run([Semantics(weighted=False)])
        plain = [Semantics(each_step=True), Semantics(gemma=True), Semantics(), Semantics(weighted=False)]
        return self._run(plain)

    def _gated_candidates(self) -> list[Semantics]:
        if self.weight is None:
            return []
        own = self.module.__dict__
        sizes = {None, own.get("group_size")}
        if isinstance(own.get("n_groups"), int):
            sizes.add(self.hidden // own["n_groups"])
        sizes = {None if size == self.hidden else size for size in sizes}
        usable = sorted(
            (s for s in sizes if s is None or (isinstance(s, int) and s > 0 and self.hidden % s == 0)), key=str
        )
        options = itertools.product((True, False), (False, True), (False, True), usable)
        return [
            Semantics(True, sigmoid=sigmoid, norm_before_gate=before, each_step=each_step, group_size=size)
            for before, sigmoid, each_step, size in options
        ]

    def _run(self, candidates: list[Semantics], gate: Tensor | None = None) -> Found | Left:
        gates = () if gate is None else (gate,)
        answers: dict[torch.dtype, Tensor] = {}
        for dtype in DTYPES:
            try:
                answer = self.original(dtype, dtype, gates)
            except Exception as error:  # whatever a stranger's forward raises, it is not run again
                return Left(f"fails on {_name(dtype)} [2, {self.x.shape[1]}, {self.hidden}]: {_line(error)}")
            if not isinstance(answer, Tensor) or answer.shape != self.x.shape:
                return Left("returns something else than one tensor of x's shape")
            if answer.dtype != dtype:
                return Left(f"returns {_name(answer.dtype)} for {_name(dtype)}")
            answers[dtype] = answer
        trained = self.original(torch.float32, torch.float32, gates, training=True)
        if not isinstance(trained, Tensor) or not torch.equal(trained, answers[torch.float32]):
            return Left("computes something else in training")
        nearest, shares = None, []
        for candidate in candidates:
            formula = self._formula(candidate, gate)
            if _share(answers[torch.float32], formula(torch.float32, torch.float32)) > 0:
                continue
            shares = [_share(answers[dtype], formula(dtype, dtype)) for dtype in (torch.bfloat16, torch.float16)]
            if max(shares) <= SHARE:
                return Found(self._complete(candidate, gate), self.eps_name, max(shares))
            nearest = candidate
        if nearest is None:
            return Left("computes something else")
        return Left("is an RMSNorm in float32, but rounds in a way of its own in 16 bits")

    def _formula(self, candidate: Semantics, gate: Tensor | None) -> Callable[[torch.dtype, torch.dtype], Tensor]:
        def formula(dtype: torch.dtype, weight_dtype: torch.dtype) -> Tensor:
            weight = None if self.weight is None else self.weight.to(weight_dtype)
            return candidate.formula(self.x.to(dtype), weight, self.eps, None if gate is None else gate.to(dtype))

        return formula

    def _complete(self, candidate: Semantics, gate: Tensor | None) -> Semantics:
        """With what holds beyond equal dtypes and a given gate."""
        options = dict(candidate.__dict__)
        gates = () if gate is None else (gate,)
        if candidate.weighted:
            formula = self._formula(candidate, gate)
            # Our functions take a weight of x's dtype or float32, and with float32 x any.
            ours = [(x, weight) for x, weight in MIXED if torch.float32 in (x, weight)]
            if candidate.each_step:
                ours = [(x, weight) for x, weight in ours if x == torch.float32]
            original = functools.partial(self.original, gates=gates)
            options["mixed"] = frozenset(
                pair for pair in ours if self._agrees(formula(*pair), functools.partial(original, *pair))
            )
        if gate is not None:
            want = self._formula(candidate, None)(torch.bfloat16, torch.bfloat16)
            alone = functools.partial(self.original, torch.bfloat16, torch.bfloat16, (None,))
            options["without_gate"] = self._agrees(want, alone)
            half = gate.bfloat16()
            want = self._formula(candidate, half.float())(torch.float32, torch.float32)
            wide = functools.partial(self.original, torch.float32, torch.float32, (half,))
            options["wide_gate"] = self._agrees(want, wide)
        return Semantics(**options)

    def _agrees(self, want: Tensor, original: Callable[[], Any]) -> bool:
        try:
            got = original()
        except Exception:  # the original does not take this, so there is nothing to replace
            return False
        return isinstance(got, Tensor) and got.dtype == want.dtype and _share(got, want) <= SHARE


def _share(got: Tensor, want: Tensor) -> float:
    """The share of elements that differ; 1.0 where one differs by more than rounding explains. float32: 0 or 1."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return 1.0
    if got.dtype == torch.float32:
        close = torch.isclose(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
        return 0.0 if bool(close.all()) else 1.0
    distance = (_ordered(got) - _ordered(want)).abs()
    return 1.0 if int(distance.max()) > ULPS else float((distance > 0).float().mean())


def _ordered(t: Tensor) -> Tensor:
    """16-bit floating-point numbers as integers in their order, neighbours one apart."""
    bits = t.contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
