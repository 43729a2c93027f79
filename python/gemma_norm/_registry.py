"""All implementations of an operator that PyTorch needs beside the native kernels, made from one description.

An :class:`Operator` describes one overload in ``torch.ops.gemma_norm``. Its schema is defined in C++; its definition in
plain PyTorch and its rules are in :mod:`gemma_norm._ops`. From these, ``register`` makes:

- an implementation in plain PyTorch for devices without a native library. It checks its arguments as the native kernels
  do, and warns once for each device type. PyTorch also sends it sparse, quantised and other such tensors of any device,
  which it refuses;
- a fake implementation for meta tensors, torch.compile and torch.export, which gives the shape and dtype of the
  results;
- an implementation for the transforms of torch.func (grad, vmap, jvp and what is built from them). It runs the
  definition, which PyTorch can differentiate and batch in any order. Its dispatch key is active only inside a
  transform, so other calls pay nothing for it. It refuses an operator that writes into its arguments, because a
  transform would see neither the write nor its derivative; torch.func.functionalize is an exception;
- a sharding rule for distributed tensors, see :mod:`gemma_norm._sharding`;
- refusals of nested tensors, and of lazily negated tensors that would be written;
- an implementation for autograd, if the operator is functional, which records the derivative.

The last one is in Python, and takes about as long as a small kernel. A functional operator therefore has a twin without
it: ``torch.ops.gemma_norm._rms_norm`` beside ``rms_norm``. The functions in :mod:`gemma_norm._ops` call the twin in
inference. Modes, tensor subclasses and tracers are shown the operator in the twin's place, so no program holds a twin;
only a profiler sees it.

The dispatcher skips autograd for operators that write into their arguments. They record no derivative.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.nested._internal.nested_tensor import NestedTensor

from ._checks import Extent, Rule, check_arguments, check_derivatives, check_memory, has_tangent, layout_name
from ._checks_heads import check_positions_are_in_the_cache
from ._library import operator_implementations, why_not_native
from ._sharding import declare

Arguments = dict[str, Any]

_torch: Any = torch  # not all of it is typed
_is_grad_enabled = torch.is_grad_enabled
_is_tracing = torch._C._is_tracing
_warned: set[str] = set()
_library = operator_implementations(__name__)


@dataclass(frozen=True)
class Operator:
    name: str
    """Its name in ``torch.ops.gemma_norm``, with the overload, such as "rms_norm.out"."""
    definition: Callable[..., Any]
    """A function in plain PyTorch that writes nothing, differentiable if the operator is. It has the parameters of the
    schema except ``out``, and maybe those of other overloads."""
    rules: Mapping[str, Rule]
    """The rule for each tensor, by the argument's name, in the order of the checks."""
    functional: str
    """The operator that computes the same in new tensors, and is differentiable."""
    more_results: tuple[str, ...] = ()
    """For each result after the first, the argument whose shape and dtype it has. The first has those of the
    first rule's. If the argument is None, the result has no heads."""
    new_results: Callable[[Arguments], tuple[Tensor, ...]] | None = None
    """For an operator that quantises, and has no derivative: makes its results of a call, empty. Of those, the last are
    what it writes into arguments, if it does."""
    extents: tuple[Extent, ...] = ()
    """With ``new_results``: of each result."""
    derivative: type[torch.autograd.Function] | None = None
    """For a functional operator: its setup_context and backward. ``register`` adds the forward pass."""

    @functools.cached_property
    def first(self) -> str:
        """The name of the tensor with which all others are compared: "x", or "q"."""
        return next(iter(self.rules))

    @functools.cached_property
    def overload(self) -> Any:
        return _overload(self.name)

    @functools.cached_property
    def twin(self) -> Any:
        """For a functional operator: the overload with the same kernels and without derivatives."""
        return _overload(f"_{self.name}")

    @property
    def label(self) -> str:
        """The function's name, in messages. One that returns y as well has an operator of its own."""
        return self.name.partition(".")[0].removesuffix("_y")

    @property
    def call_instead(self) -> str:
        return f"gemma_norm.{self.functional}" + (" without out" if "out" in self.rules else "")

    @property
    def call_to_write_nothing(self) -> str:
        """As ``call_instead``, where the result may be quantised, since no derivative is wanted."""
        return f"gemma_norm.{self.label.removeprefix('fused_')}" if self.new_results else self.call_instead

    @functools.cached_property
    def written(self) -> tuple[str, ...]:
        """The names of the arguments that it writes, in the order of the definition's results."""
        arguments = self.overload._schema.arguments
        return tuple(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)

    @functools.cached_property
    def results(self) -> tuple[Extent, ...]:
        """The extent of each result."""
        if self.extents:
            return self.extents
        return (self.rules[self.first].extent, *(self.rules[name].extent for name in self.more_results))

    @functools.cached_property
    def defaults(self) -> tuple[Any, ...]:
        """The default values of all arguments, in their order. None if an argument has none."""
        return tuple(a.default_value for a in self.overload._schema.arguments)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """All arguments of a call by name, including defaults."""
        schema = self.overload._schema.arguments
        defaults = {a.name: a.default_value for a in schema if a.has_default_value()}
        given = dict(zip((a.name for a in schema), args, strict=False))
        return {**defaults, **given, **kwargs}

    def compute(self, arguments: Arguments) -> tuple[Tensor, ...]:
        results = self.definition(**{name: value for name, value in arguments.items() if name != "out"})
        return results if isinstance(results, tuple) else (results,)

    def give(self, arguments: Arguments, results: tuple[Tensor, ...]) -> Any:
        """Write ``results`` into the arguments that the operator writes, and return what the operator returns.

        The written ones are the last.
        """
        new = len(results) - len(self.written)
        for name, result in zip(self.written, results[new:], strict=True):
            arguments[name].copy_(result)
        if not new:
            return arguments.get("out")
        return results[:new] if new > 1 else results[0]

    # The implementations. Each takes its arguments as the dispatcher passes them.

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.bind(args, kwargs)
        check_arguments(self, arguments)
        check_memory(self, arguments)
        check_positions_are_in_the_cache(self.label, arguments.get("cos_sin_cache"), arguments.get("positions"))
        _warn_once(arguments[self.first])
        results = self.compute(arguments)
        as_they_are = self.written or self.new_results
        return self.give(arguments, results if as_they_are else tuple(t.contiguous() for t in results))

    def fake(self, *args: Any, **kwargs: Any) -> Any:
        declare(self)
        arguments = self.bind(args, kwargs)
        check_arguments(self, arguments)
        if self.new_results:
            new = self.new_results(arguments)[: len(self.overload._schema.returns)]
            return new if len(new) > 1 else new[0]
        if self.written:
            return arguments.get("out")
        alike = [arguments[name] for name in (self.first, *self.more_results)]
        alike = [alike[0][..., :0, :] if t is None else t for t in alike]
        results = tuple(t.new_empty(t.shape) for t in alike)
        return results if self.more_results else results[0]

    def functionalised(self, *args: Any, **kwargs: Any) -> Any:
        """For torch.compile, which by itself cannot functionalise an operator that returns one of its arguments."""
        arguments = self.bind(args, kwargs)
        check_arguments(self, arguments)
        functional = OPERATORS[self.functional].overload
        inputs = {a.name: arguments[a.name] for a in functional._schema.arguments}
        results = functional(**inputs)
        return self.give(arguments, results if isinstance(results, tuple) else (results,))

    def transformed(self, *args: Any, **kwargs: Any) -> Any:
        if self.new_results and _is_differentiating():
            rule = "a quantised result has no derivative, got a call inside a transform that differentiates"
            raise RuntimeError(f"{self.label}: {rule}: call {self.call_instead}")
        if self.written and not _only_functionalising():
            rule = "is not available inside a torch.func transform, which would see neither that nor the derivative"
            raise RuntimeError(f"{self.label}: writing into an argument {rule}: call {self.call_to_write_nothing}")
        arguments = self.bind(args, kwargs)
        check_arguments(self, arguments, transformed=True)
        check_positions_are_in_the_cache(
            self.label, arguments.get("cos_sin_cache"), _innermost(arguments.get("positions"))
        )
        if self.new_results:  # autograd sees through torch.func.vmap
            check_derivatives(self, {k: _innermost(t) for k, t in arguments.items() if isinstance(t, Tensor)})
        return self.give(arguments, self.compute(arguments))

    @functools.cached_property
    def record(self) -> Callable[..., Any]:
        """``derivative.apply`` without the part in Python, which takes longer than all else here.

        That part binds the arguments by the signature of the forward pass; ours are bound. It is also the way into
        torch.func's transforms, inside which :meth:`recorded` is not called.
        """
        apply: Callable[..., Any] = super(torch.autograd.Function, self.derivative).apply  # type: ignore[misc]
        return apply

    def recorded(self, twin: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Run a functional operator, and record its derivative if one is wanted. If not, ``twin`` runs."""
        tensors = [argument for argument in args if isinstance(argument, Tensor)]
        if has_tangent(*tensors):
            return self.transformed(*args)
        if self.derivative is not None and _is_grad_enabled() and any(t.requires_grad for t in tensors):
            args += self.defaults[len(args) :]  # the dispatcher omits trailing arguments that have their default values
            return self.record(*unwrap_dead_wrappers(args))
        return twin(*args)

    def negated(self, *args: Any, **kwargs: Any) -> Any:
        """For tensors with the negative bit, which PyTorch negates when they are read.

        PyTorch's own fallback would write to copies, and so hide which of the arguments share memory.
        """
        arguments = self.bind(args, kwargs)
        for name in self.written:
            if arguments[name].is_neg():
                rule = "is written and must not be negated lazily, got a tensor with its negative bit set"
                raise RuntimeError(f"{self.label}: {name} {rule}; call resolve_neg() on it")
        return self.overload(**{k: v.resolve_neg() if isinstance(v, Tensor) else v for k, v in arguments.items()})

    def refuse_nested(self, *args: Any, **kwargs: Any) -> NoReturn:
        for name, value in self.bind(args, kwargs).items():
            if isinstance(value, Tensor) and value.is_nested:
                raise RuntimeError(f"{self.label}: {name} must be a dense tensor, got {layout_name(value)}")
        raise AssertionError("no argument is nested")


OPERATORS: dict[str, Operator] = {}


def register(*operators: Operator) -> None:
    for op in operators:
        OPERATORS[op.name] = op
        kernels = {
            "CompositeExplicitAutograd": op.plain,
            "Autograd": torch.library.fallthrough_kernel,
            "FuncTorchDynamicLayerFrontMode": op.transformed,
            "NestedTensorCPU": op.refuse_nested,
            "NestedTensorCUDA": op.refuse_nested,
        }
        if op.derivative is not None:
            _register_twin(op, kernels)
            op.derivative.forward = staticmethod(op.twin)  # type: ignore[method-assign]
            kernels["Autograd"] = _autograd(op)
        if op.written:
            kernels["Negative"] = op.negated
        if any(result.alias_info is not None for result in op.overload._schema.returns):
            kernels["Functionalize"] = op.functionalised
        for key, kernel in kernels.items():
            _library.impl(op.name, kernel, key)
        qualified = f"gemma_norm::{op.name}"
        torch.library.register_fake(qualified, op.fake, lib=_library)
        torch.library.register_torch_dispatch(qualified, NestedTensor, _jagged(op), lib=_library)


def _register_twin(op: Operator, kernels: Mapping[str, Callable[..., Any]]) -> None:
    for key, kernel in {**kernels, "Meta": op.fake}.items():
        _library.impl(f"_{op.name}", kernel, key)
    for key in ("Python", "Tracer"):
        _library.impl(f"_{op.name}", _shown_as(op, key), key, with_keyset=True)


def _shown_as(op: Operator, key: str) -> Callable[..., Any]:
    """Make the twin's kernel for a dispatch key that watches calls: it passes the operator to PyTorch's kernel."""
    dispatch_key = torch._C._dispatch_key_parse(key)
    own, below = torch._C.DispatchKeySet(dispatch_key), torch._C._dispatch_keyset_full_after(dispatch_key)
    redispatch, twin = op.overload.redispatch, op.twin.redispatch

    def show(keys: Any, *args: Any) -> Any:
        if key == "Tracer" and not _is_tracing():  # the operator is recorded already, and runs now
            return twin(keys & below, *args)
        return redispatch(keys & below | own, *args)

    return show


def _autograd(op: Operator) -> Callable[..., Any]:
    recorded = op.recorded
    twin = bare(op.twin)

    def kernel(*args: Any) -> Any:
        if _is_grad_enabled() or forward_ad._current_level >= 0:
            return recorded(twin, args)
        return twin(*args)

    return kernel


def _jagged(op: Operator) -> Callable[..., NoReturn]:
    return lambda cls, func, types, args, kwargs: op.refuse_nested(*args, **(kwargs or {}))


def bare(overload: Any) -> Any:
    """What an OpOverload calls. Its own ``__call__`` is a frame of Python, a part of what a small call costs."""
    return getattr(overload, "_op", overload)


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.gemma_norm, packet), overload or "default")


def _warn_once(x: Tensor) -> None:
    device = x.device.type
    if device not in _warned:
        _warned.add(device)
        reason = why_not_native(device)
        warnings.warn(f"gemma_norm: plain PyTorch instead of a native kernel on {device}: {reason}", stacklevel=4)


def _innermost(t: Any) -> Any:
    """The tensor that the transforms of torch.func have wrapped. What is no tensor, None for one, is returned."""
    functorch = torch._C._functorch
    while isinstance(t, Tensor) and functorch.is_functorch_wrapped_tensor(t):
        if torch._is_functional_tensor(t):
            _torch._sync(t)  # what was written through views of it
        t = functorch.get_unwrapped(t)
    return t


def _is_differentiating() -> bool:
    """Whether an active transform is torch.func.grad, jvp or one that is made of them."""
    functorch = torch._C._functorch
    types = (functorch.TransformType.Grad, functorch.TransformType.Jvp)
    return any(level.key() in types for level in functorch.get_interpreter_stack() or ())


def _only_functionalising() -> bool:
    """Whether all active transforms are torch.func.functionalize, which is made for programs that write."""
    functorch = torch._C._functorch
    levels = functorch.get_interpreter_stack() or ()
    return all(level.key() == functorch.TransformType.Functionalize for level in levels)
