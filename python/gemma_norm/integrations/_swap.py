"""How a module comes to run this library's operator: its class is exchanged for a subclass with another forward.

The module, its parameters, hooks and name stay the same objects, and ``isinstance`` holds. There is one subclass for
each class and formula, named as its base. Pickles hold the base and the formula, from which the subclass is made again.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .._ops.gated_rms_norm import gated_rms_norm
from .._ops.rms_norm import rms_norm
from ._semantics import Semantics

Counts = Counter[tuple[str, str]]
STATE = "_gemma_norm"
_is_compiling = torch.compiler.is_compiling
_is_tracing = torch._C._is_tracing
_newobj: Any = copyreg.__newobj__  # type: ignore[attr-defined]  # how objects without a recipe of their own are made again
_in_functorch = torch._C._are_functorch_transforms_active


@dataclass(frozen=True)
class Swap:
    """What a subclass is made from."""

    base: type[nn.Module]
    semantics: Semantics
    eps_name: str
    once: bool
    """rounding="once": round_each_step is not used."""
    native: bool
    """compiled="native": compiled code calls the operator."""
    takes: bool = False
    """Whether the addition at the end of the layer before may have computed the result, see :mod:`._residual`."""

    @property
    def each_step(self) -> bool:
        return self.semantics.each_step and not self.once


class State:
    """A replaced module's own: kept in its ``__dict__``, not in its ``state_dict``."""

    def __init__(self, name: str, fallbacks: Counts, additions: Counts) -> None:
        self.name, self.fallbacks, self.additions = name, fallbacks, additions
        self.offer: Any = None
        """What the layer before has computed for this norm."""
        self.wasted = 0
        """How many offers in a row were not taken."""
        self.next: nn.Module | None = None
        """The norm that the addition at this layer's end joins."""

    def count(self, reason: str) -> None:
        self.fallbacks[self.name, reason] += 1

    def apart(self, reason: str) -> None:
        self.additions[self.name, reason] += 1

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        """A copy's fallbacks are counted with the original's, so that the report that exists shows them."""
        new = State(self.name, self.fallbacks, self.additions)
        memo[id(self)] = new
        new.next = copy.deepcopy(self.next, memo)
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        return State, (self.name, Counter(), Counter()), {"next": self.next}


def state(module: nn.Module) -> State:
    found = module.__dict__.get(STATE)
    if found is None:  # such as after functional code has made a bare copy
        found = module.__dict__[STATE] = State("", Counter(), Counter())
    return found


@functools.cache
def subclass(swap: Swap) -> type[nn.Module]:
    base = swap.base
    forward = _gated_forward(swap) if swap.semantics.gated else _plain_forward(swap)
    if swap.takes:
        (taking,) = TAKING
        forward = taking(forward)
    return derive(base, "swap", swap, forward, extra_repr=_extra_repr(base), _gemma_norm_swap=swap)


def derive(base: type[nn.Module], kind: str, made_from: Any, forward: Any, **members: Any) -> type[nn.Module]:
    """A subclass that looks like its base and is pickled as what it was made from."""

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        reduced = base.__reduce_ex__(self, protocol)
        if not isinstance(reduced, tuple) or reduced[0] is not _newobj or type(self) is not made:
            return reduced
        return (rebuild, (kind, made_from), *reduced[2:])

    names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    body = {**names, "forward": _named_like(forward, base.forward), "__reduce_ex__": __reduce_ex__, **members}
    metaclass: Any = type(base)
    made: type[nn.Module] = metaclass(base.__name__, (base,), body)
    return made


# _residual defines these, and imports this module.
TAKING: list[Callable[[Callable[..., Any]], Callable[..., Any]]] = []
MAKERS: dict[str, Callable[[Any], type[nn.Module]]] = {"swap": subclass}


def rebuild(kind: str, made_from: Any) -> nn.Module:
    """For pickles."""
    from . import _residual  # noqa: F401  defines what a layer is made by

    made = MAKERS[kind](made_from)
    return made.__new__(made)


def base_of(module: nn.Module) -> type[nn.Module] | None:
    """The class before the exchange; None where there was none."""
    found = type(module).__dict__.get("_gemma_norm_swap")
    return None if found is None else found.base


def exchange(module: nn.Module, new: type[nn.Module]) -> None:
    """Also where accelerate, or something like it, keeps the forward of the old class as a bound method."""
    old = type(module)
    module.__class__ = new
    for key in ("forward", "_old_forward"):
        bound = module.__dict__.get(key)
        if isinstance(bound, types.MethodType) and bound.__func__ is old.forward:
            module.__dict__[key] = types.MethodType(new.forward, module)


def own_forward(module: nn.Module) -> str | None:
    """Why the class's forward is not what runs when the module is called; None where it is."""
    names = module.__dict__
    bound = names.get("_old_forward" if "_hf_hook" in names else "forward")
    if bound is None or (isinstance(bound, types.MethodType) and bound.__func__ is type(module).forward):
        return None
    return "has a forward of its own, set by kernelize, Liger or the like"


def _plain_forward(swap: Swap) -> Callable[..., Any]:
    """In a decoding step this costs as much as the kernel, so what is called here is bound to names of its own, and a
    call without derivatives goes to the operator, past :func:`gemma_norm.rms_norm`, which sees to all others.
    """
    base, eps, gemma, each_step = swap.base, swap.eps_name, swap.semantics.gemma, swap.each_step
    in_compiled_code = _compiled_plain(swap)
    original = base.forward
    is_compiling, is_tracing, in_functorch = _is_compiling, _is_tracing, _in_functorch
    is_grad_enabled, plain = torch.is_grad_enabled, Tensor
    operator: Any = torch.ops.gemma_norm.rms_norm.default
    operator = getattr(operator, "_op", operator)  # what an OpOverload calls in a Python frame of its own

    def forward(self: Any, x: Tensor) -> Any:
        if is_compiling():
            return in_compiled_code(self, x)
        weight = self._parameters.get("weight")
        if weight is None:
            weight = self.weight
        if x.dtype is weight.dtype and not in_functorch() and not is_tracing():
            reason, rounds = None, each_step
        else:
            reason, rounds = unusual(swap, x, weight), False
        if reason is None:
            try:
                if is_grad_enabled() or type(x) is not plain or forward_ad._current_level >= 0:
                    return rms_norm(x, weight, getattr(self, eps), gemma, rounds)
                return operator(x, weight, getattr(self, eps), gemma, rounds)
            except RuntimeError as error:
                reason = refusal(error)
        state(self).count(reason)
        return original(self, x)

    def weightless(self: Any, x: Tensor) -> Any:
        if is_compiling():
            return in_compiled_code(self, x)
        if in_functorch() or is_tracing():
            reason = _TRANSFORMED
        else:
            try:
                return rms_norm(x, None, getattr(self, eps))
            except RuntimeError as error:
                reason = refusal(error)
        state(self).count(reason)
        return original(self, x)

    return forward if swap.semantics.weighted else weightless


def _gated_forward(swap: Swap) -> Callable[..., Any]:
    semantics, eps, original = swap.semantics, swap.eps_name, swap.base.forward
    sigmoid, before, size = semantics.sigmoid, semantics.norm_before_gate, semantics.group_size

    def norm(self: Any, x: Tensor, gate: Tensor | None, weight: Tensor, each_step: bool) -> Tensor:
        return gated_rms_norm(
            x,
            gate,
            weight,
            getattr(self, eps),
            sigmoid=sigmoid,
            norm_before_gate=before,
            group_size=size,
            round_each_step=each_step,
        )

    def in_compiled_code(self: Any, x: Tensor, gate: Tensor | None) -> Any:
        weight = self.weight
        usable = gate is not None or semantics.without_gate
        if not swap.native or not usable or not usable_in_compiled_code(swap, x, weight, gate):
            return original(self, x, gate)
        return norm(self, x, gate, weight, swap.each_step and x.dtype == weight.dtype)

    def forward(self: Any, x: Tensor, gate: Tensor | None = None) -> Any:
        if _is_compiling():
            return in_compiled_code(self, x, gate)
        weight = self._parameters.get("weight")
        if weight is None:
            weight = self.weight
        each_step = swap.each_step
        reason = None if gate is not None or semantics.without_gate else "no gate"
        if reason is None and (x.dtype is not weight.dtype or _in_functorch() or _is_tracing()):
            reason, each_step = unusual(swap, x, weight), False
        if reason is None:
            try:
                return norm(self, x, gate, weight, each_step)
            except RuntimeError as error:
                reason = refusal(error)
        state(self).count(reason)
        return original(self, x, gate)

    return forward


_TRANSFORMED = "inside a torch.func transform or a trace"


def unusual(swap: Swap, x: Tensor, weight: Tensor) -> str | None:
    """Why a call whose dtypes differ, or which is transformed or traced, runs the original; None where it does not."""
    if _in_functorch() or _is_tracing():
        return _TRANSFORMED
    if (x.dtype, weight.dtype) in swap.semantics.mixed:
        return None
    dtypes = [str(t.dtype).removeprefix("torch.") for t in (x, weight)]
    return f"x is {dtypes[0]} and the weight {dtypes[1]}, for which the original computes what no operator here does"


def refusal(error: RuntimeError) -> str:
    """The reason for the report, without numbers that differ from call to call. Out of memory is no refusal."""
    if isinstance(error, torch.OutOfMemoryError) or " out of memory" in str(error):
        raise error
    return str(error).partition("\n")[0][:160]


def usable_in_compiled_code(swap: Swap, *tensors: Tensor | None) -> bool:
    """What the operator would refuse, asked before: there is no way back from inside a graph."""
    x, weight = tensors[0], tensors[1]
    assert x is not None
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or _in_onnx_export():
        return False
    if weight is not None and x.dtype != weight.dtype and (x.dtype, weight.dtype) not in swap.semantics.mixed:
        return False
    if weight is not None and x.shape[-1] != weight.shape[0]:
        return False
    return all(t is None or t.dim() == 1 or t.stride(-1) == 1 for t in tensors)


def _compiled_plain(swap: Swap) -> Callable[..., Any]:
    gemma, weighted, eps, original = swap.semantics.gemma, swap.semantics.weighted, swap.eps_name, swap.base.forward

    def native(self: Any, x: Tensor) -> Any:
        weight = self.weight if weighted else None
        if not usable_in_compiled_code(swap, x, weight):
            return original(self, x)
        each_step = swap.each_step and weight is not None and x.dtype == weight.dtype
        return rms_norm(x, weight, getattr(self, eps), gemma, each_step)

    return native if swap.native else original


def _in_onnx_export() -> bool:
    from torch.onnx import is_in_onnx_export

    return is_in_onnx_export()


def _extra_repr(base: type[nn.Module]) -> Callable[[nn.Module], str]:
    def extra_repr(self: nn.Module) -> str:
        text = base.extra_repr(self)
        return f"{text}, gemma_norm" if text else "gemma_norm"

    return extra_repr


def _named_like(function: types.FunctionType, original: Callable[..., Any]) -> types.FunctionType:
    """With the original's names for the parameters, which calls may use, and its defaults."""
    parameters = list(inspect.signature(original).parameters.values())
    code = function.__code__
    if len(parameters) != code.co_argcount:  # a layer's forward, which is the original's but for a few statements
        return function
    names = (*(p.name for p in parameters), *code.co_varnames[code.co_argcount :])
    new = types.FunctionType(
        code.replace(co_varnames=names), function.__globals__, "forward", None, function.__closure__
    )
    defaults = tuple(p.default for p in parameters if p.default is not p.empty)
    new.__defaults__ = defaults or None
    new.__module__, new.__qualname__ = original.__module__, original.__qualname__
    return new
