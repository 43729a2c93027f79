"""gemma_norm's kernels for ``kernelize`` of Hugging Face's kernels library, under its names for norms.

A name there is no formula: of the classes that are called RMSNorm most round before the weight and some do not, and
RMSNormGated is two formulas. So a module is run once, with a weight of our own, and compared with the formulas that
this library has; what is none of them keeps its class's forward, and so does a call that our operators do not take or
that ``torch.compile`` traces. :mod:`gemma_norm.integrations.transformers` covers more, and without kernels.
"""

from __future__ import annotations

import importlib.util
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._ops.gated_rms_norm import gated_rms_norm
from .._ops.rms_norm import rms_norm
from ._engine import Engine, takes, takes_gate, version_of
from ._semantics import Found, Left, classify

TESTED = "0.17.2 with transformers 5.19.0 to 5.22.0"
DEVICES = ("cpu", "cuda", "rocm")

# kernelize asks that a layer class has no __init__ and nothing beside these two attributes and forward, whose
# parameters are as many as the replaced one's. forward is called with the module that it serves as self.


class RMSNorm(nn.Module):
    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _norm(self, hidden_states)


class RMSNormZeroCentered(nn.Module):
    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        return _norm(self, x)


class RMSNormGated(nn.Module):
    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        return _gated_norm(self, hidden_states, gate)


@dataclass(frozen=True)
class _Repository:
    """What kernels expects in a mapping: the layer class, or a way to it."""

    layer: type[nn.Module]

    @property
    def layer_name(self) -> str:
        return self.layer.__name__

    def load(self) -> type[nn.Module]:
        return self.layer

    def __str__(self) -> str:
        return f"gemma_norm, layer {self.layer_name}"


def kernel_mapping() -> dict[str, dict[str, Any]]:
    """For ``kernels.use_kernel_mapping``: our layers, by layer name and device type."""
    layers = (RMSNorm, RMSNormZeroCentered, RMSNormGated)
    return {layer.__name__: {device: _Repository(layer) for device in DEVICES} for layer in layers}


def register_kernels() -> None:
    """Make our layers those that ``kernels.kernelize(model, mode=..., device=...)`` puts into models from now on.

    Raises:
        RuntimeError: this kernels has no such mapping, the installed transformers does not work with it (its decorators
            do nothing then, and ``kernelize`` would leave every norm as it is), or there is no native library for this
            machine's GPUs. Nothing has been registered then.
    """
    engine = Engine("kernels", TESTED, "gemma_norm.integrations.kernels.register_kernels")
    kernels = engine.module("kernels")
    engine.parameters(kernels, "register_kernel_mapping", "mapping, inherit_mapping=True")
    engine.parameters(kernels, "kernelize", "model, *, mode, device=None, use_fallback=True")
    if importlib.util.find_spec("transformers") is not None:
        _check_transformers(engine)
    engine.native_library()
    kernels.register_kernel_mapping(kernel_mapping())


def _check_transformers(engine: Engine) -> None:
    utils, hub = (
        engine.module("transformers.utils.import_utils"),
        engine.module("transformers.integrations.hub_kernels"),
    )
    if not engine.member(utils, "is_kernels_available")():
        least, beyond = getattr(utils, "KERNELS_MIN_VERSION", "?"), getattr(utils, "KERNELS_MAX_VERSION", "?")
        wanted = f"of a version that transformers {version_of('transformers')} works with"
        engine.differs("kernels", f"{wanted}, {least} <= version < {beyond}", version_of("kernels"))
    if not engine.member(hub, "_kernels_enabled"):
        engine.differs("USE_HUB_KERNELS", "unset, or YES, for transformers' norms to have layer names", "another value")


_found: weakref.WeakKeyDictionary[nn.Module, Found | Left | None] = weakref.WeakKeyDictionary()


def _semantics(module: nn.Module, gated: bool) -> Found | None:
    """What a module computes. It is kept for each module, because asking :func:`classify` takes as long as a kernel."""
    if module not in _found:
        _found[module] = classify(module)
    found = _found[module]
    return found if isinstance(found, Found) and found.semantics.gated == gated else None


def _norm(module: Any, x: Tensor) -> Tensor:
    weight = module.weight
    like_x = weight is not None and weight.dtype is x.dtype  # else many of these classes return float32
    if not torch.compiler.is_compiling() and like_x and takes(x, weight):
        found = _semantics(module, gated=False)
        if found is not None:
            ours, eps = found.semantics, getattr(module, found.eps_name)
            return rms_norm(x, weight if ours.weighted else None, eps, ours.gemma, ours.each_step)
    original: Tensor = type(module).forward(module, x)
    return original


def _gated_norm(module: Any, x: Tensor, gate: Tensor | None) -> Tensor:
    weight = module.weight
    like_x = weight is not None and weight.dtype is x.dtype and gate is not None and gate.shape == x.shape
    if not torch.compiler.is_compiling() and like_x and takes_gate(x, gate, weight, "silu"):
        found = _semantics(module, gated=True)
        if found is not None:
            ours = found.semantics
            return gated_rms_norm(
                x,
                gate,
                weight,
                getattr(module, found.eps_name),
                sigmoid=ours.sigmoid,
                norm_before_gate=ours.norm_before_gate,
                group_size=ours.group_size,
                round_each_step=ours.each_step,
            )
    original: Tensor = type(module).forward(module, x, gate)
    return original
