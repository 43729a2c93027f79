"""A call whose arguments are checked, and what the rules in the files `_checks*.py` share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Check = Callable[[], None]
Arguments = Mapping[str, Any]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Checked(NamedTuple):
    """A call that is being checked: its tensors by name, and the names of the first two, x and the weight."""

    label: str
    x_name: str
    weight_name: str
    tensors: Mapping[str, Any]

    @property
    def x(self) -> Tensor:
        x: Tensor = self.tensors[self.x_name]
        return x

    def leading(self) -> torch.Size:
        """The leading dimensions of x, without the heads."""
        return self.x.shape[:-2]


def check_group(call: Checked, name: str, arguments: Mapping[str, Any]) -> None:
    size, hidden = arguments.get(name), call.x.shape[-1]
    if size is not None:
        divides = size > 0 and hidden % size == 0
        require(divides, f"{call.label}: {name} must divide {call.x_name}'s last dimension {hidden}, got {size}")


def check_rows(op: str, name: str, t: Tensor, strides: bool) -> None:
    if strides:
        contiguous = t.stride(-1) == 1 or t.shape[-1] == 1
        rule = "must have a contiguous last dimension (stride 1)"
        require(contiguous, f"{op}: {name} {rule}, got stride {t.stride(-1)}")


def require(condition: bool | torch.SymBool, message: str) -> None:
    if not torch.compiler.is_dynamo_compiling():
        check: Any = torch._check  # not typed
        check(condition, lambda: message)
    elif not condition:  # Dynamo cannot trace torch._check if its message refers to a variable
        raise RuntimeError(message)
