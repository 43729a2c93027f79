"""Whether two strided tensors share memory: csrc/core/overlap.cpp in Python."""

from __future__ import annotations

import torch
from torch import Tensor


def same_memory(a: Tensor, b: Tensor) -> bool:
    strides = [(sa, sb) for n, sa, sb in zip(a.shape, a.stride(), b.stride(), strict=False) if n != 1]
    same = a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.shape == b.shape
    return same and all(sa == sb for sa, sb in strides)


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether some byte belongs to both tensors, exactly, for any strides."""
    (a_begin, a_end), (b_begin, b_end) = _extent(a), _extent(b)
    if a_end <= b_begin or b_end <= a_begin:
        return False
    a_starts, b_starts = _row_starts(a), _row_starts(b)
    # A row of b overlaps a row of a if it begins before that row's end, but after (that row's beginning - the length of
    # a row of b).
    first = torch.searchsorted(b_starts, a_starts - _row_bytes(b), right=True)
    return bool((first < torch.searchsorted(b_starts, a_starts + _row_bytes(a))).any())


def overlaps_itself(a: Tensor) -> bool:
    """Whether two elements share a byte."""
    return bool((_row_starts(a).diff() < _row_bytes(a)).any())


def _row_bytes(a: Tensor) -> int:
    return (a.shape[-1] if a.dim() else 1) * a.element_size()


def _extent(a: Tensor) -> tuple[int, int]:
    last = sum((n - 1) * stride for n, stride in zip(a.shape, a.stride(), strict=True))
    return a.data_ptr(), a.data_ptr() + (last + 1) * a.element_size()


def _row_starts(a: Tensor) -> Tensor:
    """The address of every row's first byte, sorted."""
    starts = torch.tensor([a.data_ptr()], device="cpu")
    for n, stride in zip(a.shape[:-1], a.stride()[:-1], strict=True):
        starts = (starts[:, None] + torch.arange(n, device="cpu") * (stride * a.element_size())).flatten()
    return starts.sort().values
