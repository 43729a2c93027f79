"""What the adapters for SGLang, vLLM and kernels share: reading an engine before any change, and the calls."""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.metadata
import inspect
import logging
import os
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import _library
from .._checks import DTYPES, UNWRITABLE
from .._ops.gated_rms_norm import gated_rms_norm
from .._ops.rms_norm import add_rms_norm, fused_add_rms_norm

logger = logging.getLogger("gemma_norm")
SIGMOID = {"silu": False, "swish": False, "sigmoid": True}


def version_of(project: str) -> str:
    try:
        return importlib.metadata.version(project)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


class Engine:
    """Another project, read member by member. The first difference from what we know is the one error, raised before
    anything is replaced: a newer version may pass an argument that an adapter would ignore.
    """

    def __init__(self, name: str, tested: str, function: str) -> None:
        self.name, self.tested, self.function = name, tested, function

    def differs(self, what: str, expected: str, found: str) -> NoReturn:
        versions = f"This adapter knows {self.name} {self.tested}; {self.name} {version_of(self.name)} is installed"
        raise RuntimeError(f"{self.function}: {what} must be {expected}, got {found}. {versions}. Nothing was changed.")

    def module(self, name: str) -> Any:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            self.differs(name, "a module that can be imported", f"{type(error).__name__}: {error}")

    def member(self, owner: Any, name: str) -> Any:
        if not hasattr(owner, name):
            self.differs(f"{owner.__name__}.{name}", "defined", "nothing of that name")
        return getattr(owner, name)

    def parameters(self, owner: Any, name: str, *expected: str) -> None:
        """``expected``, one of which they must be, as they are written in a definition, without annotations."""
        parameters = inspect.signature(self.member(owner, name)).parameters.values()
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
        found = str(inspect.Signature(bare))
        if found not in (known := [f"({parameters})" for parameters in expected]):
            self.differs(f"{owner.__name__}.{name}", f"a function of {' or '.join(known)}", found)

    def free(self, owner: Any, *names: str) -> None:
        """Nobody else has put these into the class."""
        for name in names:
            if name in vars(owner):
                self.differs(f"{owner.__name__}.{name}", "undefined, for this adapter to define", "a definition")

    def native_library(self) -> None:
        """Without native kernels the operators are plain PyTorch, slower than what would be replaced."""
        name = _library.gpu_library()
        if torch.cuda.is_available() and name not in _library._loaded:
            needed = f"gemma_norm's {name} library must be loaded on a machine with GPUs, got none"
            raise RuntimeError(f"{self.function}: {needed}; gemma_norm.libraries() says why. Nothing was changed.")


def switch(variable: str, *others: str) -> str:
    """What the environment variable that turns a plugin on says: "" for off, "1", or one of ``others``."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1", *others):
        raise ValueError(f"gemma_norm: {variable} must be {', '.join(('0', '1', *others))} or unset, got {value!r}")
    return "" if value == "0" else value


def instances(kinds: tuple[type, ...]) -> Iterator[Any]:
    """Every living object of exactly these classes or of one derived from them."""
    return (found for found in gc.get_objects() if issubclass(type(found), kinds))


@functools.cache
def unserved_gpus() -> frozenset[int]:
    """The GPUs that our library has no code for. Asked when a tensor lies on one, for it initialises CUDA."""
    unserved = _library.unserved_gpus()
    for reason in unserved.values():
        logger.warning("gemma_norm: %s; its norms stay with the engine", reason)
    return frozenset(unserved)


def has_kernels(x: Tensor) -> bool:
    """Code that torch.compile traces is taken to run where the same code ran before."""
    return x.is_cpu or (x.is_cuda and (torch.compiler.is_compiling() or x.get_device() not in unserved_gpus()))


def takes(x: Tensor, weight: Tensor | None, residual: Tensor | None = None, post: Tensor | None = None) -> bool:
    """Whether our operators compute the norm of these tensors, and give the results the dtypes that engines expect."""
    dtype = x.dtype
    return (
        has_kernels(x)
        and dtype in DTYPES
        and x.dim() > 0
        and x.stride(-1) == 1
        and (weight is None or weight.dtype is dtype or weight.dtype is torch.float32)
        and (residual is None or _is_like(residual, x))
        and (post is None or _is_like(post, x))
    )


def _is_like(t: Tensor, x: Tensor) -> bool:
    return t.dtype is x.dtype and t.shape == x.shape and t.stride(-1) == 1


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    gemma: bool = False,
    post: Tensor | None = None,
    each_step: bool = False,
    *,
    in_place: bool,
) -> tuple[Tensor, Tensor]:
    """``(y, s)``: new tensors or, where ``in_place`` and nothing speaks against it, x and residual, overwritten."""
    if in_place and post is None and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        try:
            fused_add_rms_norm(x, residual, weight, eps, gemma, None, each_step)
            return x, residual
        except RuntimeError as error:  # nothing has been written
            if not any(reason in str(error) for reason in UNWRITABLE):
                raise
    return add_rms_norm(x, residual, weight, eps, gemma, post, each_step)


def takes_gate(x: Tensor, gate: Tensor | None, weight: Tensor | None, activation: str) -> bool:
    """The gate has x's shape; or x is [tokens * heads, size] and the gate a view of [tokens, heads, size]."""
    return (
        activation in SIGMOID
        and weight is not None
        and takes(x, weight)
        and (
            gate is None
            or (
                gate.dtype is x.dtype
                and gate.stride(-1) == 1
                and (gate.shape == x.shape or (x.dim() == 2 and gate.dim() == 3 and gate.numel() == x.numel()))
                and gate.shape[-1] == x.shape[-1]
            )
        )
    )


def gated_norm(
    x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, activation: str, before: bool, size: int | None
) -> Tensor:
    sigmoid = SIGMOID[activation]
    return gated_rms_norm(x, gate, weight, eps, sigmoid=sigmoid, norm_before_gate=before, group_size=size)
