"""gemma_norm's kernels for ``kernelize`` of Hugging Face's kernels library, under its names for the norms of transformers.

A name there is no formula: of the classes that are called RMSNorm most round before the weight and some do not, and
RMSNormGated is two formulas. So a module is run once, with a weight of our own, and compared with the formulas that
this library has; what is none of them keeps its class's forward, and so does a call that our operators do not take or
that ``torch.compile`` traces. :mod:`gemma_norm.integrations.transformers` covers more, and without kernels.
"""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import reference
from .._ops.gated_rms_norm import gated_rms_norm
from .._ops.rms_norm import rms_norm
from ._engine import Engine, takes, takes_gate

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
        wanted = f"of a version that transformers {Engine('transformers', '', '').version()} works with"
        engine.differs("kernels", f"{wanted}, {least} <= version < {beyond}", engine.version())
    if not engine.member(hub, "_kernels_enabled"):
        engine.differs("USE_HUB_KERNELS", "unset, or YES, for transformers' norms to have layer names", "another value")


class _Formula(NamedTuple):
    eps: str
    """The name of the module's attribute."""
    gemma: bool = False
    each_step: bool = False
    activation: str = ""


_formulas: dict[Any, _Formula | None] = {}


def _norm(module: Any, x: Tensor) -> Tensor:
    weight = module.weight
    like_x = weight is not None and weight.dtype is x.dtype  # else many of these classes return float32
    if not torch.compiler.is_compiling() and like_x and takes(x, weight):
        formula = _formula(module)
        if formula is not None:
            return rms_norm(x, weight, getattr(module, formula.eps), formula.gemma, formula.each_step)
    original: Tensor = type(module).forward(module, x)
    return original


def _gated_norm(module: Any, x: Tensor, gate: Tensor | None) -> Tensor:
    weight = module.weight
    like_x = weight is not None and weight.dtype is x.dtype and gate is not None and gate.shape == x.shape
    if not torch.compiler.is_compiling() and like_x and takes_gate(x, gate, weight, "silu"):
        formula = _formula(module, gated=True)
        if formula is not None:
            sigmoid, eps = formula.activation == "sigmoid", getattr(module, formula.eps)
            return gated_rms_norm(x, gate, weight, eps, sigmoid=sigmoid, round_each_step=formula.each_step)
    original: Tensor = type(module).forward(module, x, gate)
    return original


def _formula(module: Any, gated: bool = False) -> _Formula | None:
    key = (type(module), gated, *(module.__dict__.get(name) for name in ("activation", "group_size", "n_groups")))
    if key not in _formulas:
        _formulas[key] = _find(module, gated)
    return _formulas[key]


def _find(module: Any, gated: bool) -> _Formula | None:
    """The formula whose results a copy of the module has, in bfloat16 and on inputs among which some are as small as
    the root of eps. With another formula a fifth of the elements differ. A few differ with the right one, where
    another last place of float32 tips a rounding.
    """
    names = [name for name in ("variance_epsilon", "eps") if isinstance(module.__dict__.get(name), float)]
    if len(names) != 1 or [*module._parameters] != ["weight"] or module._buffers or module._modules:
        return None
    eps, hidden = module.__dict__[names[0]], module.weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    x, gate = torch.randn(2, 2, 1 + 4096 // hidden, hidden, generator=generator, device="cpu")
    x, gate = (x * torch.tensor([1.0, eps**0.5])[:, None, None]).bfloat16(), gate.bfloat16()
    weight = (torch.randn(hidden, generator=generator, device="cpu") * 0.3 + 0.7).bfloat16()
    probe = copy.copy(module)
    probe.__dict__["_parameters"] = {"weight": nn.Parameter(weight, requires_grad=False)}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            theirs = type(module).forward(probe, x, *([gate] if gated else []))
        except Exception:  # whatever it needs, it is no norm of x (and a gate) alone
            return None
    for formula in _candidates(names[0], gated):
        if gated:
            sigmoid = formula.activation == "sigmoid"
            ours = reference.gated_rms_norm(x, gate, weight, eps, sigmoid, round_each_step=formula.each_step)
        else:
            ours = reference.rms_norm(x, weight, eps, formula.gemma, formula.each_step)
        like_ours = isinstance(theirs, Tensor) and theirs.dtype == ours.dtype and theirs.shape == ours.shape
        if like_ours and float((theirs != ours).float().mean()) < 0.001:
            return formula
    return None


def _candidates(eps: str, gated: bool) -> list[_Formula]:
    if gated:
        return [_Formula(eps, False, each_step, name) for name in ("silu", "sigmoid") for each_step in (True, False)]
    return [_Formula(eps, each_step=True), _Formula(eps), _Formula(eps, gemma=True)]
