"""What the checks that run in several processes share: the same tensors in each of them, and comparisons."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, distribute_tensor

from support import randn

SHAPE = (4, 6, 32)
HIDDEN = SHAPE[-1]
LIKE_X = ("x", "residual", "post", "gate")


@functools.cache
def line(device: str) -> DeviceMesh:
    """All ranks in a row."""
    return init_device_mesh(device, (dist.get_world_size(),))


def put(t: Tensor, placement: Placement) -> DTensor:
    mesh = line(t.device.type)
    if isinstance(placement, Partial):
        return DTensor.from_local(t / mesh.size(), mesh, [placement])
    return distribute_tensor(t, mesh, [placement])


def tensors(device: str, names: tuple[str, ...], shape: tuple[int, ...] = SHAPE) -> dict[str, Tensor]:
    shapes = {name: shape if name in LIKE_X else shape[-1:] for name in names}
    return {name: randn(*shapes[name], device=device, seed=seed) for seed, name in enumerate(names)}


def assert_close(got: Tensor, want: Tensor, terms: int = SHAPE[0] * SHAPE[1]) -> None:
    """Equal but for the rounding of sums of so many terms, which were added in another order."""
    unit = torch.finfo(want.dtype).eps
    limit = 4 * unit * terms**0.5 * max(1.0, float(want.abs().max()) if want.numel() else 0.0)
    torch.testing.assert_close(got, want, rtol=0, atol=limit)


def assert_raises(call: Callable[[], Any], message: str, kind: type[Exception] = RuntimeError) -> None:
    import pytest

    with pytest.raises(kind, match=message):
        call()
