"""How the operators take distributed tensors (DTensor): a sharding rule for each, made from its description.

A rule says which placements of the inputs an operator can compute on without communication, on each dimension of the
mesh, and which placements the results then have. PyTorch chooses the cheapest and redistributes the inputs to it:

- rows: tensors of x's shape are sharded on the same leading dimension, and tensors of the weight's shape replicated.
  Results of x's shape are sharded alike. A result of the weight's shape, a gradient, is a sum over this rank's rows
  alone, so it is partial. Of an operator with heads, the cosines, sines and positions are sharded with the tokens,
  and replicated where the heads are sharded, as in tensor parallelism;
- everything is replicated.

The hidden dimension is never sharded, because each row is normalised as a whole: a tensor that is, is gathered.

An operator that writes into its arguments has no rule and is refused. PyTorch redistributes an argument into a copy
where its placement does not fit, and the operator would write into the copy, which is then dropped.

The rules are declared with torch.distributed.tensor.experimental.register_sharding. Importing that takes more than half
a second, for which nobody who uses no DTensor should wait. Therefore the operator's fake implementation calls
``declare``, which does something if the program has imported torch.distributed.tensor. PyTorch asks the fake
implementation for the results' shapes before it looks for a rule, so the rule is there at the first call.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ._checks import Extent, Rule

DTENSOR = "got a DTensor"
_MODULE = "torch.distributed.tensor"
_declared: set[str] = set()


class Shardable(Protocol):
    """What the rules need to know of a :class:`gemma_norm._registry.Operator`."""

    @property
    def name(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def rules(self) -> Mapping[str, Rule]: ...
    @property
    def written(self) -> tuple[str, ...]: ...
    @property
    def results(self) -> tuple[Extent, ...]: ...
    @property
    def call_to_write_nothing(self) -> str: ...
    @property
    def overload(self) -> Any: ...
    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]: ...


def declare(op: Shardable) -> None:
    """Declare the operator's rule, once, if torch.distributed.tensor is imported and has ``register_sharding``."""
    if op.name in _declared or _MODULE not in sys.modules:
        return
    _declared.add(op.name)
    try:
        from torch.distributed.tensor.experimental import register_sharding
    except ImportError:  # explain_missing() says so once a DTensor is passed
        return
    register_sharding(op.overload)(_refusal(op) if op.written else _rule(op))


def explain_missing(op: Shardable, error: RuntimeError, arguments: Mapping[str, Any]) -> None:
    """Raise an error that says why a functional operator takes no DTensor, if that is why ``error`` was raised."""
    if not isinstance(error, NotImplementedError) or op.written:
        return
    try:
        from torch.distributed.tensor.experimental import register_sharding  # noqa: F401
    except ImportError:
        for name, t in arguments.items():
            if isinstance(t, Tensor) and type(t).__module__.startswith(_MODULE):
                rule = f"must be a plain tensor, {DTENSOR}: PyTorch {torch.__version__} has no {_MODULE}.experimental"
                raise NotImplementedError(f"{op.label}: {name} {rule}.register_sharding, which is needed") from None


def _rule(op: Shardable) -> Any:
    from torch.distributed.tensor import Partial, Replicate, Shard

    def rule(*args: Any, **kwargs: Any) -> list[tuple[list[Any], list[Any]]]:
        given = dict(zip((a.name for a in op.overload._schema.arguments), args, strict=False)) | kwargs
        x = given[next(iter(op.rules))]
        extents = {n: op.rules[n].extent if n in op.rules and v is not None else None for n, v in given.items()}
        heads = x.ndim - 2 if Extent.HEADS in extents.values() else None
        choices = []
        for dim in (None, *range(x.ndim - 1)):

            def place(extent: Extent, t: Any, dim: int | None = dim) -> Any:
                if dim is None or extent in (Extent.HIDDEN, Extent.TABLE, Extent.ONE):
                    return Replicate()
                if extent not in (Extent.ANGLES, Extent.POSITIONS):
                    return Shard(dim)
                axes = t.ndim - (x.ndim - 2) if extent is Extent.POSITIONS else 0
                return Replicate() if dim == heads else Shard(dim + axes)

            shared = Replicate() if dim is None else Partial()
            results = [shared if extent is Extent.HIDDEN else place(extent, x) for extent in op.results]
            inputs = [None if extent is None else place(extent, given[n]) for n, extent in extents.items()]
            choices.append((results, inputs))
        return choices

    return rule


def _refusal(op: Shardable) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        rule = f"is written and must be a plain tensor, {DTENSOR}"
        reason = "PyTorch may redistribute it into a copy, and the copy would be written"
        raise NotImplementedError(f"{op.label}: {op.written[0]} {rule}: {reason}; call {op.call_to_write_nothing}")

    return refuse
