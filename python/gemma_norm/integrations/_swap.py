"""How a module comes to run this library's operator: its class is exchanged for a subclass with another forward.

The module, its parameters, hooks and name stay the same objects, and ``isinstance`` holds. There is one subclass for
each class and formula, named as its base. Pickles hold the base and the formula, from which the subclass is made again.
"""

from __future__ import annotations

import copy
import copyreg
import inspect
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ._semantics import Semantics

Counts = Counter[tuple[str, str]]
STATE = "_gemma_norm"
SWAP = "_gemma_norm_swap"
"""The attribute of a derived class that holds what it was made from."""
# How pickle makes objects again that have no recipe of their own.
_newobj: Any = copyreg.__newobj__  # type: ignore[attr-defined]


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

    def __init__(self, name: str, fallbacks: Counts, separate: Counts) -> None:
        self.name, self.fallbacks, self.separate = name, fallbacks, separate
        self.offer: Any = None
        """What the layer before has computed for this norm."""
        self.wasted = 0
        """How many offers in a row were not taken."""
        self.next: nn.Module | None = None
        """The norm that the addition at this layer's end joins."""

    def count(self, reason: str) -> None:
        self.fallbacks[self.name, reason] += 1

    def apart(self, reason: str) -> None:
        self.separate[self.name, reason] += 1

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        """A copy's fallbacks are counted with the original's, so that the report that exists shows them."""
        new = State(self.name, self.fallbacks, self.separate)
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


def derive(base: type[nn.Module], kind: str, made_from: Any, forward: Any, **members: Any) -> type[nn.Module]:
    """A subclass that looks like its base and is pickled as what it was made from."""

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        reduced = base.__reduce_ex__(self, protocol)
        if not isinstance(reduced, tuple) or reduced[0] is not _newobj or type(self) is not made:
            return reduced
        return (rebuild, (kind, made_from), *reduced[2:])

    names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    body = {**names, "forward": forward, "__reduce_ex__": __reduce_ex__, **members}
    metaclass: Any = type(base)
    made: type[nn.Module] = metaclass(base.__name__, (base,), body)
    return made


def rebuild(kind: str, made_from: Any) -> nn.Module:
    """For pickles."""
    from . import _forwards, _residual, _rotation

    kinds = {"norm": _forwards.subclass, "layer": _residual.layer_subclass, "attention": _rotation.attention_subclass}
    make: Any = kinds[kind]
    made: type[nn.Module] = make(made_from)
    return made.__new__(made)


def base_of(module: nn.Module) -> type[nn.Module] | None:
    """The class before the exchange; None where there was none."""
    found = type(module).__dict__.get(SWAP)
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


def named_like(function: Any, original: Callable[..., Any]) -> types.FunctionType:
    """With the original's names for the parameters, which calls may use, and its defaults."""
    parameters = list(inspect.signature(original).parameters.values())
    code = function.__code__
    names = (*(p.name for p in parameters), *code.co_varnames[code.co_argcount :])
    new = types.FunctionType(
        code.replace(co_varnames=names), function.__globals__, "forward", None, function.__closure__
    )
    defaults = tuple(p.default for p in parameters if p.default is not p.empty)
    new.__defaults__ = defaults or None
    new.__module__, new.__qualname__ = original.__module__, original.__qualname__
    return new
