"""The memory of a call of fuzz_calls.py: its tensors, in buffers whose every other element is watched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fuzz_calls import Arguments, Call
from gemma_norm._checks import Extent
from support import SENTINEL


class Memory:
    """The arguments of a call, each tensor in a buffer whose every other element is watched."""

    def __init__(self, call: Call) -> None:
        self.device = call.device
        self.bases: list[Tensor] = []
        self.views: dict[str, tuple[int, tuple[tuple[int, ...], tuple[int, ...], int]]] = {}
        self.arguments: Arguments = {k: as_argument(k, v) for k, v in call.options.items()}
        random = torch.Generator().manual_seed(call.seed)
        for name, dtype in call.dtypes.items():
            self._add(call, name, dtype, random)
        for name in call.operator.rules:
            self.arguments.setdefault(name, None)
        self.before = [base.clone() for base in self.bases]

    def _add(self, call: Call, name: str, dtype_name: str, random: torch.Generator) -> None:
        shape, (strides, offset) = call.shape_of(name), call.layouts.get(name, (None, 0))
        kind, _, value = call.flaw if call.flaw and call.flaw[1] == name else ("", "", None)
        values = self._values(call, name, shape, random)
        if kind == "dtype":
            dtype_name = value
        if kind == "shape":
            shape, strides = _reshaped(shape, value), None
            values = torch.ones(shape)
        if strides is None:
            strides = torch.empty(shape, device="meta").stride()
        if kind == "stride" and shape:
            strides = (*(2 * s for s in strides[:-1]), value)
        dtype = getattr(torch, dtype_name)
        offset += 16  # room for memory that begins before
        if call.same_memory and call.same_memory[1] == name and call.same_memory[0] in self.views:
            index, (_, _, start) = self.views[call.same_memory[0]]
            offset = max(start + call.same_memory[2], 0)
        else:
            index = len(self.bases)
            self.bases.append(torch.empty(0, dtype=dtype, device=self.device))
        span = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        base = self.bases[index]
        if base.dtype != dtype:  # a tensor of another dtype in the same memory would need its own view of it
            index, base = len(self.bases), torch.empty(0, dtype=dtype, device=self.device)
            self.bases.append(base)
        if base.numel() < offset + span + 16:
            grown = torch.full((offset + span + 16,), SENTINEL, device=self.device).to(dtype)
            grown[: base.numel()] = base
            self.bases[index] = base = grown
            for other, (at, layout) in self.views.items():
                if at == index:
                    self.arguments[other] = base.as_strided(*layout)
        self.views[name] = index, (shape, strides, offset)
        view = base.as_strided(shape, strides, offset)
        filled = base.cpu()  # where elements share memory, a GPU writes them in any order
        filled[self.elements(name).cpu()] = values.flatten().to(dtype)
        base.copy_(filled)
        if call.special and call.special[0] == name and view.numel():
            view[tuple(n // 2 for n in shape)] = call.special[1]
        self.arguments[name] = view

    @staticmethod
    def _values(call: Call, name: str, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
        if name == "positions":
            values = torch.randint(0, 7, shape, generator=random)
            if call.flaw and call.flaw[0] == "position" and values.numel():
                values.view(-1)[values.numel() // 2] = call.flaw[2]
            return values
        values = torch.randn(shape, generator=random)
        if call.operator.rules[name].extent is Extent.ONE:  # scales and bounds that change something
            return values.abs() * call.scale / (1 if name == "scale_ub" else 64)
        if call.operator.rules[name].extent is Extent.HIDDEN:  # near zero for gemma: a missing 1 + shows
            return values * 0.05 if call.options.get("gemma") else values
        gate = name == "gate"
        return values * min(call.scale, 4) if gate and call.scale > 1 and "backward" in call.op else values * call.scale

    def elements(self, name: str) -> Tensor:
        """Where in its buffer the tensor's elements are."""
        index, layout = self.views[name]
        return torch.arange(self.bases[index].numel(), device=self.device).as_strided(*layout).flatten()

    def is_without_gaps(self, name: str) -> bool:
        return name not in self.views or bool(self.arguments[name].is_contiguous())

    def assert_nothing_written_but(self, names: tuple[str, ...]) -> None:
        for index, (base, before) in enumerate(zip(self.bases, self.before, strict=True)):
            same = torch.ones(base.numel(), dtype=torch.bool, device=self.device)
            for name in names:
                if self.views[name][0] == index:
                    same[self.elements(name)] = False
            size = base.element_size()
            a, b = (t.view(torch.uint8).view(-1, size) for t in (base, before))
            assert torch.equal(a[same], b[same]), "something was written that is no element of an output"


def as_argument(name: str, value: Any) -> Any:
    """An option as the operator takes it. Calls are kept as JSON, where a dtype is its name."""
    return getattr(torch, value) if name in ("dtype", "scale_dtype") and value else value


def _reshaped(shape: tuple[int, ...], how: str) -> tuple[int, ...]:
    match how:
        case "longer":
            return (*shape[:-1], shape[-1] + 1) if shape else (1,)
        case "shorter":
            return (*shape[:-1], max(shape[-1] - 1, 0)) if shape else (1,)
        case "more rows":
            return (shape[0] + 1, *shape[1:]) if shape else (2,)
        case "another dimension":
            return (1, *shape)
        case "a dimension less":
            return shape[1:]
    return (*shape[:-1], 0)
