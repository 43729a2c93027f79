"""gemma_norm's kernels in SGLang: ``install()`` before the model is made, or GEMMA_NORM_SGLANG=1 in the environment.

SGLang's norms of one tensor become calls of the plugin backend that SGLang keeps for other projects
(``forward_plugin``), on CUDA, HIP and the CPU. It tries that backend first, and asks it for each call
(``backend_eligible``): a call that is not ours takes SGLang's own way. Its gated norms have no backends, so their
``forward`` is replaced by one that makes the same choice, and so is the function that normalises and rotates q and k in
Qwen3.5. docs/serving.md lists what is left to SGLang, and why.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from . import _sglang_norms, _sglang_rope
from ._engine import Engine, instances, logger, switch, version_of
from ._sglang_norms import GATED, NORMS, Forward, Gated, Norm

TESTED = "0.5.23"

_ATTRIBUTES = ("forward_plugin", "backend_eligible", "capabilities")


class _Installed(NamedTuple):
    base: type
    norms: tuple[type, ...]
    gated: dict[type, Forward]
    """SGLang's own forwards."""
    rope: tuple[Forward, Forward] | None
    """SGLang's own function, and ours."""


_installed: _Installed | None = None


def plugin() -> None:
    """SGLang calls this in each of its processes (entry point group ``sglang.srt.plugins``).

    Raises:
        ValueError: GEMMA_NORM_SGLANG is neither 0 nor 1 nor unset.
        RuntimeError: as :func:`install`.
    """
    if switch("GEMMA_NORM_SGLANG"):
        install()


def install() -> None:
    """Let our kernels serve SGLang's norms, in this process: those of models made from now on.

    Raises:
        RuntimeError: SGLang is not as it was in the versions of docs/serving.md, another plugin serves a norm, or there
            is no native library for this machine's GPUs. Nothing has been changed then.
    """
    global _installed
    if _installed is not None:
        return
    engine = Engine("sglang", TESTED, "gemma_norm.integrations.sglang.install")
    engine.native_library()
    fused_op, spec = engine.module("sglang.kernels.fused_op"), engine.module("sglang.kernels.spec")
    base = engine.member(fused_op, "BaseFusedOp")
    plugin_backend = engine.member(engine.member(spec, "KernelBackend"), "PLUGIN")
    requirement, device = engine.member(spec, "CapabilityRequirement"), engine.member(spec, "DeviceType")
    devices = frozenset(
        {
            engine.member(requirement, "CUDA"),
            engine.member(requirement, "HIP"),
            requirement(device=engine.member(device, "CPU")),
        }
    )
    engine.parameters(base, "backend_eligible", "self, backend, *args, **kwargs")
    engine.parameters(base, "forward_plugin", "self, *args, **kwargs")
    engine.parameters(base, "_forward_backend_dynamic", "self, *args, **kwargs")
    if plugin_backend not in engine.member(base, "priority"):
        engine.differs("BaseFusedOp.priority", "a tuple with KernelBackend.PLUGIN", repr(base.priority))
    batch_invariant = engine.module("sglang.srt.batch_invariant_ops")
    engine.parameters(batch_invariant, "is_batch_invariant_mode_enabled", "")

    layernorm = engine.module("sglang.srt.layers.layernorm")
    norms = []
    for norm in NORMS:
        kind = engine.member(layernorm, norm.name)
        engine.parameters(kind, "__init__", norm.init)
        engine.parameters(kind, "forward_native", norm.native)
        engine.free(kind, *_ATTRIBUTES, "forward")
        norms.append(kind)
    originals: dict[Any, Forward] = {}
    for entry in GATED:
        kind = engine.member(engine.module(entry.module), entry.name)
        engine.parameters(kind, "__init__", entry.init)
        engine.parameters(kind, "forward", entry.parameters)
        if "forward" not in vars(kind):
            engine.differs(f"{kind.__name__}.forward", "its own", "that of a class that it is derived from")
        originals[kind] = vars(kind)["forward"]
    rope = _sglang_rope.find(engine)

    _sglang_norms.batch_invariant = batch_invariant.is_batch_invariant_mode_enabled
    for kind, norm in zip(norms, NORMS, strict=True):
        kind.forward_plugin = _forward_plugin(kind, norm)
        kind.backend_eligible = _backend_eligible(kind, norm, base, plugin_backend)
        kind.capabilities = {**kind.capabilities, plugin_backend: devices}
    for kind, entry in zip(originals, GATED, strict=True):
        kind.forward = _gated_forward(kind, entry, originals[kind])
    functions = None
    if rope is not None:
        functions = (rope, _sglang_rope.ours(rope))
        _sglang_rope.replace(*functions)
    _installed = _Installed(base, tuple(norms), originals, functions)
    names = ", ".join(kind.__name__ for kind in (*norms, *originals, *(functions or ())[:1]))
    logger.info("gemma_norm: serves SGLang %s's %s", version_of(engine.name), names)


def uninstall() -> None:
    """Undo :func:`install`: every class, and every module that has run since, is as it was."""
    global _installed
    if _installed is None:
        return
    base, norms, gated, rope = _installed
    _sglang_norms.batch_invariant = lambda: False
    for kind in norms:
        for name in _ATTRIBUTES:
            delattr(kind, name)
    for kind, forward in gated.items():
        kind.forward = forward  # type: ignore[attr-defined]
    if rope is not None:
        _sglang_rope.replace(rope[1], rope[0])
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


# Each call passes here twice, so the condition is written out: a further call with *args costs as much as what it asks.


def _backend_eligible(kind: type, norm: Norm, base: Any, plugin_backend: object) -> Forward:
    serves, theirs = norm.serves, base.backend_eligible

    def backend_eligible(self: Any, backend: object, *args: Any, **kwargs: Any) -> bool:
        if backend is not plugin_backend:
            return bool(theirs(self, backend, *args, **kwargs))
        own = type(self)
        return (own is kind or _computes_like(own, kind)) and serves(self, *args, **kwargs)

    return backend_eligible


def _forward_plugin(kind: type, norm: Norm) -> Forward:
    serves, ours = norm.serves, norm.forward

    def forward_plugin(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = type(self)
        if (own is kind or _computes_like(own, kind)) and serves(self, *args, **kwargs):
            return ours(self, *args, **kwargs)
        # Only where somebody forces the backend.
        raise NotImplementedError(f"gemma_norm: {kind.__name__}.forward_plugin does not serve this call")

    return forward_plugin


def _gated_forward(kind: type, entry: Gated, original: Forward) -> Forward:
    serves, ours = entry.serves, entry.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = type(self)
        if (own is kind or _computes_like(own, kind)) and serves(self, *args, **kwargs):
            return ours(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    return forward
