"""What the tests of torch.func's transforms and of forward mode share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from support import randn

HIDDEN = 8
OPS = torch.ops.gemma_norm
Function = Callable[[Tensor], Tensor]


def tensors(device: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, residual, weight, and a direction for derivatives."""
    made = [randn(3, HIDDEN, seed=0), randn(3, HIDDEN, seed=1), randn(HIDDEN, seed=2), randn(3, HIDDEN, seed=3)]
    return [t.to(device, dtype) for t in made]


def scalar(f: Function) -> Function:
    return lambda t: (f(t) * torch.sin(f(t) + torch.arange(HIDDEN, device=t.device))).sum()


def first(f: Function) -> Function:
    return grad(scalar(f))


def second(f: Function) -> Function:
    return grad(lambda t: first(f)(t).square().sum())


TRANSFORMS: dict[str, Callable[[Function], Function]] = {
    "grad": first,
    "grad of grad": second,
    "hessian": lambda f: hessian(scalar(f)),
    "jacfwd": jacfwd,
    "jacrev": jacrev,
    "jacfwd of jacfwd": lambda f: jacfwd(jacfwd(f)),
    "jvp": lambda f: lambda t: jvp(f, (t,), (torch.cos(t),))[1],
    "vjp": lambda f: lambda t: vjp(f, t)[1](torch.cos(t))[0],
    "vmap": lambda f: lambda t: vmap(f)(torch.stack([t, 2 * t])),
    "vmap over the last dimension": lambda f: lambda t: vmap(f, in_dims=-1)(torch.stack([t, 2 * t], -1)),
    "vmap of grad": lambda f: lambda t: vmap(first(f))(torch.stack([t, 2 * t])),
}


def assert_close(got: Tensor, want: Tensor) -> None:
    """The error is relative to the largest element, since the terms of a derivative may cancel in others. Where all
    elements are 0, it is absolute.
    """
    assert got.dtype == torch.float32 and got.shape == want.shape
    error = float((got.double() - want).abs().max()) / (float(want.abs().max()) or 1)
    assert error < 2e-5, f"relative error {error:.1e}"
