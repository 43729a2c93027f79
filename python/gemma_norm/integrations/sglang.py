"""gemma_norm's kernels in SGLang: ``install()`` before the model is made, or GEMMA_NORM_SGLANG=1 in the environment.

SGLang's norms of one tensor become calls of the plugin backend that SGLang keeps for other projects
(``forward_plugin``), on CUDA, HIP and the CPU. It tries that backend first, and asks it for each call
(``backend_eligible``): a call that is not ours takes SGLang's own way. Its gated norms have no backends, so their
``forward`` is replaced by one that makes the same choice. docs/serving.md lists what is left to SGLang, and why.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._ops.rms_norm import rms_norm
from ._engine import Engine, add_norm, gated_norm, has_kernels, instances, logger, switch, takes, takes_gate

TESTED = "0.5.23"

_LAYERNORM = "sglang.srt.layers.layernorm"
_FLA = "sglang.kernels.ops.attention.fla"
_FUSED_FORWARD = "self, x, residual=None, post_residual_addition=None"
_is_batch_invariant: Callable[[], bool] = lambda: False  # noqa: E731  SGLang's own, once installed

Forward = Callable[..., Any]


class _Norm(NamedTuple):
    """A class of SGLang's with backends."""

    name: str
    init: str
    native: str
    serves: Callable[..., bool]
    forward: Forward


class _Gated(NamedTuple):
    """A class of SGLang's that has a forward and no backends."""

    module: str
    name: str
    init: str
    parameters: str
    serves: Callable[..., bool]
    forward: Forward


def _serves_rms_norm(
    self: Any,
    x: Tensor,
    residual: Tensor | None = None,
    post_residual_addition: Tensor | None = None,
    quant_linear: Any = None,
) -> bool:
    own, weight = self.__dict__, self.weight
    return (
        quant_linear is None  # a quantised result is wanted
        and own.get("_quant_linear") is None
        and own["variance_size_override"] is None
        and own["override_orig_dtype"] is None
        and not own["fp32_residual"]
        and not own.get("x_pad_to_multiple")
        and (weight.dtype is x.dtype or not own["cast_x_before_out_mul"])  # else the result is float32
        and not _is_batch_invariant()
        and takes(x, weight, residual, post_residual_addition)
    )


def _rms_norm(
    self: Any,
    x: Tensor,
    residual: Tensor | None = None,
    post_residual_addition: Tensor | None = None,
    quant_linear: Any = None,
) -> Any:
    weight = self.weight if self.has_weight else None
    eps, each_step = self.variance_epsilon, self.cast_x_before_out_mul
    if residual is None:
        return rms_norm(x, weight, eps, False, each_step)
    return add_norm(x, residual, weight, eps, False, post_residual_addition, each_step, in_place=_writes(x))


def _serves_gemma(
    self: Any, x: Tensor, residual: Tensor | None = None, post_residual_addition: Tensor | None = None
) -> bool:
    return takes(x, self.weight, residual, post_residual_addition)


def _gemma(self: Any, x: Tensor, residual: Tensor | None = None, post_residual_addition: Tensor | None = None) -> Any:
    if residual is None:
        return rms_norm(x, self.weight, self.variance_epsilon, True)
    eps = self.variance_epsilon
    return add_norm(x, residual, self.weight, eps, True, post_residual_addition, in_place=_writes(x))


def _gemma3(self: Any, x: Tensor, residual: Tensor | None = None) -> Any:
    if residual is None:
        return rms_norm(x, self.weight, self.eps, True)
    return add_norm(x, residual, self.weight, self.eps, True, in_place=_writes(x))


def _serves_gemma4(self: Any, x: Tensor) -> bool:
    return (not self.with_scale or self.scale_shift in (0.0, 1.0)) and takes(x, self.weight)


def _gemma4(self: Any, x: Tensor) -> Any:
    if not self.with_scale:
        return rms_norm(x, None, self.eps)
    return rms_norm(x, self.weight, self.eps, self.scale_shift == 1.0)


def _serves_without_scale(self: Any, x: Tensor) -> bool:
    return takes(x, None)


def _without_scale(self: Any, x: Tensor) -> Any:
    return rms_norm(x, None, self.eps)


def _writes(x: Tensor) -> bool:
    """What SGLang itself does: its CUDA kernels overwrite x and residual, all that it has on HIP returns new tensors."""
    return x.is_cuda and torch.version.hip is None


def _serves_fla(self: Any, x: Tensor, z: Tensor | None = None) -> bool:
    return self.bias is None and takes_gate(x, z, self.weight, self.activation)


def _fla(self: Any, x: Tensor, z: Tensor | None = None) -> Any:
    return gated_norm(x, z, self.weight, self.eps, self.activation, self.norm_before_gate, self.group_size)


def _serves_fused(
    self: Any,
    x: Tensor,
    g: Tensor,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> bool:
    plain = residual is None and not prenorm and self.bias is None
    return plain and g.shape == x.shape and takes_gate(x, g, self.weight, self.activation)


def _fused(self: Any, x: Tensor, g: Tensor, *without: Any, **residual: Any) -> Any:
    return gated_norm(x, g, self.weight, self.eps, self.activation, True, None)


_RMS_NORM_INIT = (
    "self, hidden_size, eps=1e-06, var_hidden_size=None, cast_x_before_out_mul=False, fp32_residual=False, "
    "has_weight=True, weight_dtype=None, override_orig_dtype=None, x_pad_to_multiple=0, force_native=False"
)
_NORMS = (
    _Norm("RMSNorm", _RMS_NORM_INIT, f"{_FUSED_FORWARD}, quant_linear=None", _serves_rms_norm, _rms_norm),
    _Norm("GemmaRMSNorm", "self, hidden_size, eps=1e-06", _FUSED_FORWARD, _serves_gemma, _gemma),
    _Norm("Gemma3RMSNorm", "self, dim, eps=1e-06", "self, x, residual=None", _serves_gemma, _gemma3),
    _Norm(
        "Gemma4RMSNorm", "self, dim, eps=1e-06, scale_shift=0.0, with_scale=True", "self, x", _serves_gemma4, _gemma4
    ),
    _Norm("RMSNormWithoutScale", "self, hidden_size, eps=1e-06", "self, x", _serves_without_scale, _without_scale),
)
_GATED = (
    _Gated(
        f"{_FLA}.layernorm_gated",
        "RMSNorm",
        "self, hidden_size, eps=1e-05, group_size=None, norm_before_gate=True, device=None, dtype=None, "
        "activation='swish'",
        "self, x, z=None",
        _serves_fla,
        _fla,
    ),
    _Gated(
        f"{_FLA}.fused_norm_gate",
        "FusedRMSNormGated",
        "self, hidden_size, elementwise_affine=True, eps=1e-05, activation='swish', device=None, dtype=None",
        "self, x, g, residual=None, prenorm=False, residual_in_fp32=False",
        _serves_fused,
        _fused,
    ),
)
_ATTRIBUTES = ("forward_plugin", "backend_eligible", "capabilities")


class _Installed(NamedTuple):
    base: type
    norms: tuple[type, ...]
    gated: dict[type, Forward]
    """SGLang's own forwards."""


_installed: _Installed | None = None


def plugin() -> None:
    """SGLang calls this in each of its processes (entry point group ``sglang.srt.plugins``)."""
    if switch("GEMMA_NORM_SGLANG"):
        install()


def install() -> None:
    """Let our kernels serve SGLang's norms, in this process: those of models made from now on.

    Raises:
        RuntimeError: SGLang is not as it was in the versions of docs/serving.md, another plugin serves a norm, or there
            is no native library for this machine's GPUs. Nothing has been changed then.
    """
    global _installed, _is_batch_invariant
    if _installed is not None:
        return
    engine = Engine("sglang", TESTED, "gemma_norm.integrations.sglang.install")
    engine.native_library()
    fused_op, spec = engine.module("sglang.kernels.fused_op"), engine.module("sglang.kernels.spec")
    base = engine.member(fused_op, "BaseFusedOp")
    plugin_backend = engine.member(engine.member(spec, "KernelBackend"), "PLUGIN")
    requirement, device = engine.member(spec, "CapabilityRequirement"), engine.member(spec, "DeviceType")
    devices = frozenset(
        {engine.member(requirement, "CUDA"), engine.member(requirement, "HIP"), requirement(device=device.CPU)}
    )
    engine.parameters(base, "backend_eligible", "self, backend, *args, **kwargs")
    engine.parameters(base, "forward_plugin", "self, *args, **kwargs")
    engine.parameters(base, "_forward_backend_dynamic", "self, *args, **kwargs")
    if plugin_backend not in engine.member(base, "priority"):
        engine.differs("BaseFusedOp.priority", "a tuple with KernelBackend.PLUGIN", repr(base.priority))
    batch_invariant = engine.module("sglang.srt.batch_invariant_ops")
    engine.parameters(batch_invariant, "is_batch_invariant_mode_enabled", "")

    layernorm = engine.module(_LAYERNORM)
    norms = []
    for norm in _NORMS:
        kind = engine.member(layernorm, norm.name)
        engine.parameters(kind, "__init__", norm.init)
        engine.parameters(kind, "forward_native", norm.native)
        engine.free(kind, *_ATTRIBUTES, "forward")
        norms.append(kind)
    gated = []
    for entry in _GATED:
        kind = engine.member(engine.module(entry.module), entry.name)
        engine.parameters(kind, "__init__", entry.init)
        engine.parameters(kind, "forward", entry.parameters)
        gated.append(kind)

    _is_batch_invariant = batch_invariant.is_batch_invariant_mode_enabled
    for kind, norm in zip(norms, _NORMS, strict=True):
        kind.forward_plugin = _forward_plugin(kind, norm)
        kind.backend_eligible = _backend_eligible(kind, norm, base, plugin_backend)
        kind.capabilities = {**kind.capabilities, plugin_backend: devices}
    originals = {kind: vars(kind)["forward"] for kind in gated}
    for kind, entry in zip(gated, _GATED, strict=True):
        kind.forward = _gated_forward(kind, entry)
    _installed = _Installed(base, tuple(norms), originals)
    names = ", ".join(kind.__name__ for kind in (*norms, *gated))
    logger.info("gemma_norm: serves SGLang %s's %s", engine.version(), names)


def uninstall() -> None:
    """Undo :func:`install`: every class, and every module that has run since, is as it was."""
    global _installed
    if _installed is None:
        return
    base, norms, gated = _installed
    for kind in norms:
        for name in _ATTRIBUTES:
            delattr(kind, name)
    for kind, forward in gated.items():
        kind.forward = forward  # type: ignore[attr-defined]
    # A module keeps the way that its first call found. Without one, it looks again.
    for module in instances(norms):
        for name in ("_forward_method", "_original_forward_method"):
            kept = module.__dict__.get(name)
            if getattr(kept, "__func__", None) is base._forward_backend_dynamic:  # type: ignore[attr-defined]
                setattr(module, name, None)
        module.__dict__.pop("_dynamic_backend_candidates", None)
    _installed = None


_derived: dict[type, bool] = {}  # not functools.cache, which torch.compile does not trace


def _computes_like(kind: type, base: type) -> bool:
    """Whether a class derived from one of SGLang's has its forwards. One with forwards of its own is left alone."""
    if kind not in _derived:
        derived = kind.__mro__[: kind.__mro__.index(base)]
        own = {name for k in derived for name in vars(k)}
        _derived[kind] = not any(name.startswith("forward_") or name in _ATTRIBUTES for name in own)
    return _derived[kind]


def _may_serve(self: Any, kind: type, serves: Callable[..., bool], x: Tensor, *args: Any, **kwargs: Any) -> bool:
    own = type(self)
    return (own is kind or _computes_like(own, kind)) and has_kernels(x) and serves(self, x, *args, **kwargs)


def _backend_eligible(kind: type, norm: _Norm, base: Any, plugin_backend: object) -> Forward:
    def backend_eligible(self: Any, backend: object, *args: Any, **kwargs: Any) -> bool:
        if backend is plugin_backend:
            return _may_serve(self, kind, norm.serves, *args, **kwargs)
        return bool(base.backend_eligible(self, backend, *args, **kwargs))

    return backend_eligible


def _forward_plugin(kind: type, norm: _Norm) -> Forward:
    def forward_plugin(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _may_serve(self, kind, norm.serves, *args, **kwargs):  # only where somebody forces the backend
            raise NotImplementedError(f"gemma_norm: {kind.__name__}.forward_plugin does not serve this call")
        return norm.forward(self, *args, **kwargs)

    return forward_plugin


def _gated_forward(kind: type, entry: _Gated) -> Forward:
    original = vars(kind)["forward"]

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _may_serve(self, kind, entry.serves, *args, **kwargs):
            return entry.forward(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    return forward
