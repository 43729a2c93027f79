"""The checks that the modules' constructors make, so that a module is not made of what each of its calls would refuse.

Each raises ValueError with the class, the argument, what it must be and what it is.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import torch

from ._checks import DTYPES


def is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_size_and_eps(name: str, hidden_size: int, eps: float) -> None:
    # Below 2^60, the bytes of a row fit into 63 bits, also in float64, which PyTorch's default dtype may be.
    if not is_integer(hidden_size) or not 1 <= hidden_size < 2**60:
        rule = "hidden_size must be an integer of at least 1 and below 2^60, the size of the normalised dimension"
        raise ValueError(f"{name}: {rule}, got {hidden_size!r}")
    if not isinstance(eps, Real):
        hint = "; torch.nn.RMSNorm takes torch.finfo(dtype).eps for None" if eps is None else ""
        raise ValueError(f"{name}: eps must be a number, got {eps!r}{hint}")
    if not 0 <= eps <= torch.finfo(torch.float32).max:  # true for NaN
        raise ValueError(f"{name}: eps must be finite in float32 and at least 0, got {eps!r}")


def check_flags(name: str, **flags: Any) -> None:
    """Python's and NumPy's bools pass, and the integers 0 and 1. Any other value would count as True or False too."""
    for argument, value in flags.items():
        is_bool = type(value).__name__ in ("bool", "bool_")
        if not is_bool and not (isinstance(value, Integral) and value in (0, 1)):
            raise ValueError(f"{name}: {argument} must be a bool, got {value!r}")


def check_choice(name: str, argument: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: {argument} must be one of {', '.join(choices)}, got {value!r}")


def check_group_size(name: str, group_size: int | None, hidden_size: int) -> None:
    if group_size is None:
        return
    if not is_integer(group_size):
        raise ValueError(f"{name}: group_size must be an integer or None, got {group_size!r}")
    if group_size < 1 or hidden_size % group_size:
        raise ValueError(f"{name}: group_size must divide hidden_size {hidden_size}, got {group_size!r}")


def check_device_and_dtype(name: str, device: Any, dtype: Any) -> None:
    """Check what the weight is made of.

    A dtype that is PyTorch's default is not an argument and not checked: a model may be made in float64 and cast later.
    """
    is_device = device is None or isinstance(device, (torch.device, str, int))
    if isinstance(device, str):
        try:
            torch.device(device)
        except RuntimeError:
            is_device = False
    if not is_device:
        raise ValueError(f"{name}: device must be None or a device of PyTorch, such as 'cuda:0', got {device!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"{name}: dtype must be float32, float16 or bfloat16 of torch or None, got {dtype!r}")
