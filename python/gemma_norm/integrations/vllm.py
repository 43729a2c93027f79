"""gemma_norm's kernels in vLLM: ``install()`` before the model is made, or GEMMA_NORM_VLLM=1 in the environment.

vLLM lets other projects replace a layer by a class of their own (``CustomOp.register_oot``): its RMSNorm, GemmaRMSNorm
and RMSNormGated, on CUDA, ROCm and the CPU. A call that is not ours takes the way that vLLM had chosen for the layer.
The function that normalises and rotates q and k in Qwen3-Next's and Qwen3.5's attention is replaced in its module, and
in those of models that have imported it.

Under Inductor, vLLM's default, nothing changes: Inductor sees the formula and fuses it with its neighbours, which an
operator of ours would keep it from. So this is for ``--enforce-eager``, and for CUDA graphs without Inductor.
``install(under_inductor=True)``, or GEMMA_NORM_VLLM=inductor, puts our operators into Inductor's graphs too.
docs/serving.md lists what is left to vLLM, and why.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._ops.rms_norm import rms_norm
from . import _vllm_rope
from ._engine import (
    Engine,
    add_norm,
    gated_norm,
    instances,
    logger,
    switch,
    takes,
    takes_gate,
    unserved_gpus,
    version_of,
)
from ._engine_rope import Function

TESTED = "0.24.0 to 0.33.0"


class _Layer(NamedTuple):
    name: str
    init: str
    native: str
    ours: type
    """What the class that is registered has before vLLM's."""


class _Chooses:
    """What is asked once for each layer, when it is made: whose ``forward`` its calls take."""

    def dispatch_forward(self, compile_native: bool) -> Any:
        theirs = super().dispatch_forward(compile_native)  # type: ignore[misc]
        if not _takes_over(self):
            return theirs
        self.vllm_forward = theirs
        return self.forward_gemma_norm  # type: ignore[attr-defined]


class _RMSNorm(_Chooses):
    def forward_gemma_norm(self: Any, x: Tensor, residual: Tensor | None = None) -> Any:
        has_weight = self.pass_weight if residual is None else self.pass_weight_add
        weight = self.weight if has_weight else None
        if self.variance_size_override is not None or not takes(x, weight, residual):
            return self.vllm_forward(x, residual)
        # vLLM rounds to the weight's dtype before it multiplies.
        each_step = weight is not None and weight.dtype == x.dtype
        if residual is None:
            return rms_norm(x, weight, self.variance_epsilon, False, each_step)
        # vLLM's CUDA kernels overwrite x and residual here, those of other devices do not.
        return add_norm(x, residual, weight, self.variance_epsilon, each_step=each_step, in_place=x.is_cuda)


class _GemmaRMSNorm(_Chooses):
    def forward_gemma_norm(self: Any, x: Tensor, residual: Tensor | None = None) -> Any:
        if not takes(x, self.weight, residual):
            return self.vllm_forward(x, residual)
        if residual is None:
            return rms_norm(x, self.weight, self.variance_epsilon, True)
        return add_norm(x, residual, self.weight, self.variance_epsilon, True, in_place=False)  # nor does vLLM write


class _RMSNormGated(_Chooses):
    def forward_gemma_norm(self: Any, x: Tensor, z: Tensor | None = None) -> Any:
        if self.bias is not None or not takes_gate(x, z, self.weight, self.activation):
            return self.vllm_forward(x, z)
        return gated_norm(x, z, self.weight, self.eps, self.activation, self.norm_before_gate, self.group_size)


_LAYERS = (
    _Layer(
        "RMSNorm",
        "self, hidden_size, eps=1e-06, var_hidden_size=None, has_weight=True, dtype=None",
        "self, x, residual=None",
        _RMSNorm,
    ),
    _Layer("GemmaRMSNorm", "self, hidden_size, eps=1e-06", "self, x, residual=None", _GemmaRMSNorm),
    _Layer(
        "RMSNormGated",
        "self, hidden_size, eps=1e-05, group_size=None, norm_before_gate=False, device=None, dtype=None, "
        "activation='swish'",
        "self, x, z=None",
        _RMSNormGated,
    ),
)


class _Installed(NamedTuple):
    registry: dict[str, type]
    classes: dict[type, type]
    """vLLM's, by ours."""
    platforms: Any
    """vLLM's package. Which platform it is on is not known before the first look."""
    envs: Any
    get_config: Any
    no_compilation: Any
    under_inductor: bool
    rope: tuple[Function, Function] | None
    """vLLM's function for q and k, and ours."""


_installed: _Installed | None = None


def plugin() -> None:
    """vLLM calls this in each of its processes (entry point group ``vllm.general_plugins``).

    Raises:
        ValueError: GEMMA_NORM_VLLM is neither 0, 1 nor "inductor" nor unset.
        RuntimeError: as :func:`install`.
    """
    if value := switch("GEMMA_NORM_VLLM", "inductor"):
        install(under_inductor=value == "inductor")


def install(*, under_inductor: bool = False) -> None:
    """Let our kernels serve vLLM's norms, in this process: those of models made from now on.

    Args:
        under_inductor: also where Inductor compiles the model. A second call changes nothing but this:
            a bare ``install()`` takes it back.

    Raises:
        RuntimeError: vLLM is not as it was in the versions of docs/serving.md, another plugin has replaced a norm, or
            there is no native library for this machine's GPUs. Nothing has been changed then.
    """
    global _installed
    if _installed is not None:
        _installed = _installed._replace(under_inductor=under_inductor)
        return
    engine = Engine("vllm", TESTED, "gemma_norm.integrations.vllm.install")
    engine.native_library()
    custom_op = engine.module("vllm.model_executor.custom_op")
    base, registry = engine.member(custom_op, "CustomOp"), engine.member(custom_op, "op_registry_oot")
    engine.parameters(base, "register_oot", "_decorated_op_cls=None, name=None")
    engine.parameters(base, "dispatch_forward", "self, compile_native")
    engine.parameters(base, "enabled", "")
    config, platforms, envs = (engine.module(name) for name in ("vllm.config", "vllm.platforms", "vllm.envs"))
    engine.parameters(config, "get_cached_compilation_config", "")
    mode = engine.member(engine.member(config, "CompilationMode"), "NONE")
    layernorm = engine.module("vllm.model_executor.layers.layernorm")
    kinds = []
    for layer in _LAYERS:
        kind = engine.member(layernorm, layer.name)
        engine.parameters(kind, "__init__", layer.init)
        engine.parameters(kind, "forward_native", layer.native)
        engine.free(kind, "forward", "dispatch_forward")
        if layer.name in registry:
            engine.differs(f"op_registry_oot[{layer.name!r}]", "free", f"{registry[layer.name]}, of another plugin")
        kinds.append(kind)
    rope = _vllm_rope.find(engine)

    classes = {}
    for kind, layer in zip(kinds, _LAYERS, strict=True):
        # A class of the same name, so that vLLM's log, and print(model), say what they said.
        ours = type(layer.name, (layer.ours, kind), {"__module__": __name__, "__doc__": kind.__doc__})
        base.register_oot(name=layer.name)(ours)
        ours.name = kind.name  # type: ignore[attr-defined]  # for custom_ops=["+rms_norm"]; register_oot had renamed it
        classes[ours] = kind
    get_config = config.get_cached_compilation_config
    functions = None
    if rope is not None:
        functions = (rope, _vllm_rope.ours(rope, lambda: bool(envs.VLLM_BATCH_INVARIANT)))
        _vllm_rope.replace(*functions)
    _installed = _Installed(registry, classes, platforms, envs, get_config, mode, under_inductor, functions)
    names = ", ".join(kind.__name__ for kind in (*kinds, *(functions or ())[:1]))
    logger.info("gemma_norm: serves vLLM %s's %s", version_of(engine.name), names)


def uninstall() -> None:
    """Undo :func:`install`: layers made from now on are vLLM's, and those that were ours are vLLM's again."""
    global _installed
    if _installed is None:
        return
    for ours in _installed.classes:
        if _installed.registry.get(ours.__name__) is ours:
            del _installed.registry[ours.__name__]
    for layer in instances(tuple(_installed.classes)):
        theirs = layer.__dict__.pop("vllm_forward", None)
        if theirs is not None:
            layer._forward_method = theirs
        layer.__class__ = _installed.classes[type(layer)]
    if _installed.rope is not None:
        _vllm_rope.replace(*reversed(_installed.rope))
    _installed = None


def _takes_over(layer: Any) -> bool:
    if _installed is None or _installed.envs.VLLM_BATCH_INVARIANT:
        return False  # vLLM has kernels of its own for that mode
    platform, config = _installed.platforms.current_platform, _installed.get_config()
    on_gpu = platform.is_cuda() or platform.is_rocm()
    if not (on_gpu or platform.is_cpu()):
        return False
    if on_gpu and torch.cuda.current_device() in unserved_gpus():
        return False
    if config.backend == "inductor" and config.mode not in (None, _installed.no_compilation):
        return _installed.under_inductor and f"-{layer.name}" not in config.custom_ops
    return bool(layer._enforce_enable or layer.enabled())
