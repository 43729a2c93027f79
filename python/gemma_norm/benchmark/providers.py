"""What is timed. For an operator and a weight, a provider makes a function of x, of x and residual, or of x and gate.

The function returns y or (y, sum), as the library's users call it: in new tensors or, if its fused operator works in
place, in its arguments. The gated norm has no zero-centred weight. Each provider treats a zero-centred weight ("gemma")
in its own way:

===================  ================================================================================
ours                 a flag; ``1 + w`` in float32
eager, torch.compile as Hugging Face's Gemma: in float32, times ``1 + w``, rounded once (``s = x + residual`` first)
liger                ``offset=1.0, casting_mode="gemma"``, what its Gemma modules pass
quack                ``weight_offset=1.0``
flashinfer           two functions for it, ``gemma_rmsnorm`` and ``gemma_fused_add_rmsnorm``
sgl_kernel           likewise
fla                  (flash-linear-attention) has only the gated norm
transformer_engine   ``zero_centered_gamma=True``; has no fused addition
F.rms_norm           has none: it is timed and checked with a plain weight, which is another operator. (A ``1 + w``
                     computed beforehand would be a second tensor, rounded, and wrong once w changes.)
vllm, aiter          likewise
===================  ================================================================================

In the suites of derivatives, a provider is what has a differentiable function (``gradient``), or what moves as many
bytes as the backward pass (``traffic``).
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import gradients, norm_peers, norms, quantised, rotation, rotation_peers
from .cases import BACKWARD, FORWARD, GATED_RMS_NORM, NORM_ADD_NORM, OPS, QK_NORM_ROPE, RMS_NORM, Point
from .gradients import GradientInputs
from .norms import Make


@dataclass(frozen=True)
class Provider:
    name: str
    make: Make
    """Takes (op, weight, gemma) and returns the function."""
    ops: tuple[str, ...] = OPS
    """The operators that it has."""
    gemma: bool = True
    """Whether it can take a zero-centred weight."""
    module: str = ""
    """The module that must be importable; empty for PyTorch."""
    needs: tuple[str, ...] = ()
    """Names that this module must have. Another package may have a module of that name."""
    suites: tuple[str, ...] = ()
    """The suites in which it is measured; if empty, in all."""
    exact: bool = False
    """Whether it must keep this package's error bound. The others round more often."""
    copies: bool = False
    """Whether it only moves the same bytes and computes nothing: the least time that is possible."""
    gradient: Make | None = None
    """Takes (op, weight, gemma) and returns a function with a derivative, for the suites that time the derivative."""
    traffic: Callable[[GradientInputs], gradients.Call] | None = None
    """Makes a call that moves as many bytes as the backward pass of these inputs, and computes no derivative."""
    writes_gradient: bool = False
    """Whether its backward pass writes into the gradient that it is given."""

    @property
    def family(self) -> str:
        return self.name.partition(":")[0]

    def fits(self, point: Point) -> bool:
        """Whether it is measured at this point, if it has the operator."""
        if self.suites and point.suite not in self.suites:
            return False
        traffic = self.traffic is not None and point.work == BACKWARD
        return point.work == FORWARD or self.gradient is not None or traffic


def _with(make: Make, rotate: Make, quantise: Make | None = None) -> Make:
    """``make``, but for the operators that rotate heads, and for those that quantise."""
    others = {QK_NORM_ROPE: rotate}
    if quantise is not None:
        others |= dict.fromkeys(quantised.QUANT_OPS, quantise)
    return lambda op, weight, gemma: others.get(op, make)(op, weight, gemma)


ALL = (*OPS, GATED_RMS_NORM, NORM_ADD_NORM, QK_NORM_ROPE, *quantised.QUANT_OPS)
DERIVED = ("backward", "backward-few", "backward-cpu", "train-host")
"""The suites that time derivatives."""
LIGER: Any = {"module": "liger_kernel.ops", "needs": ("LigerRMSNormFunction",)}
PROVIDERS = {
    p.name: p
    for p in (
        Provider("ours", _with(norms.ours, rotation.ours, quantised.ours), ALL, exact=True, gradient=gradients.ours),
        Provider("ours:rounded", rotation.ours_rounded, (QK_NORM_ROPE,), suites=("qk-rope",)),
        Provider("ours:cache", rotation.ours_cache, (QK_NORM_ROPE,), suites=("qk-rope",)),
        Provider("ours:in_place", rotation.ours_in_place, (QK_NORM_ROPE,), exact=True, suites=("qk-rope",)),
        Provider("ours:norms", rotation.ours_norms, (QK_NORM_ROPE,), suites=("qk-rope",)),
        Provider("ours:norm alone", quantised.norm_alone, quantised.QUANT_OPS, suites=("quant",)),
        Provider("ours:two steps", quantised.two_steps, quantised.QUANT_OPS, suites=("quant",)),
        Provider("ours:two calls", norms.two_calls, (NORM_ADD_NORM,), exact=True, suites=("norm-add",)),
        Provider("ours:torch.ops", norms.ours_op, exact=True, suites=("host",)),
        Provider("ours:module", norms.ours_module, exact=True, suites=("host",)),
        Provider(
            "copy_", _with(norms.copy, rotation.copy, quantised.copy), ALL, copies=True, traffic=gradients.copy_traffic
        ),
        Provider("torch.add", norms.copy, copies=True, suites=DERIVED, traffic=gradients.add_traffic),
        Provider("eager", _with(norms.eager, rotation.eager, quantised.eager), ALL, gradient=norms.eager),
        Provider("F.rms_norm", norms.torch_rms_norm, (*OPS, NORM_ADD_NORM), gemma=False, gradient=norms.torch_rms_norm),
        Provider(
            "torch.compile",
            _with(norms.compiled, rotation.compiled, quantised.compiled),
            ALL,
            gradient=gradients.compiled(norms.compiled),
        ),
        Provider(
            "liger",
            _with(norm_peers.liger, rotation_peers.liger),
            (*OPS, QK_NORM_ROPE),
            gradient=gradients.liger_new,
            **LIGER,
        ),
        Provider(
            "liger:in_place",
            norm_peers.liger,
            gradient=gradients.liger_in_place,
            suites=DERIVED,
            writes_gradient=True,
            **LIGER,
        ),
        Provider("quack", norm_peers.quack, gradient=norm_peers.quack, module="quack", needs=("rmsnorm",)),
        Provider(
            "flashinfer",
            norm_peers.flashinfer_names("flashinfer"),
            (*OPS, NORM_ADD_NORM),
            module="flashinfer",
            needs=("gemma_rmsnorm",),
        ),
        Provider(
            "sgl_kernel",
            norm_peers.flashinfer_names("sgl_kernel"),
            (*OPS, NORM_ADD_NORM),
            module="sgl_kernel",
            needs=("gemma_rmsnorm",),
        ),
        Provider(
            "vllm", norm_peers.vllm, (*OPS, NORM_ADD_NORM), gemma=False, module="vllm._custom_ops", needs=("rms_norm",)
        ),
        Provider(
            "fla",
            norm_peers.fla,
            (GATED_RMS_NORM,),
            module="fla.modules.norm.fused_norm_gate",
            needs=("rms_norm_gated",),
            gradient=norm_peers.fla,
        ),
        Provider("aiter", norm_peers.aiter, gemma=False, module="aiter", needs=("rmsnorm2d_fwd_with_add",)),
        Provider(
            "aiter:norm add norm",
            rotation_peers.aiter_norm_add_norm,
            (NORM_ADD_NORM,),
            module="aiter.ops.triton.normalization.fused_rmsnorm_add_rmsnorm",
            needs=("fused_rmsnorm_add_rmsnorm",),
            suites=("norm-add",),
        ),
        Provider(
            "flashinfer:three kernels",
            rotation_peers.flashinfer,
            (QK_NORM_ROPE,),
            module="flashinfer",
            needs=("gemma_rmsnorm", "apply_rope_with_cos_sin_cache_inplace"),
            suites=("qk-rope",),
        ),
        Provider(
            "sglang",
            rotation_peers.sglang,
            (QK_NORM_ROPE,),
            module="sglang.kernels.ops.attention.fused_qk_rmsnorm_rope_gate",
            needs=("fused_qk_gemma_rmsnorm_rope_gate",),
            suites=("qk-rope",),
        ),
        Provider(
            "vllm:gate",
            rotation_peers.vllm_gate,
            (QK_NORM_ROPE,),
            module="vllm.model_executor.layers.fused_qk_norm_rope",
            needs=("fused_qk_rmsnorm_rope_gate",),
            suites=("qk-rope",),
        ),
        Provider(
            "vllm:in_place",
            rotation_peers.vllm_in_place,
            (QK_NORM_ROPE,),
            gemma=False,
            module="vllm._custom_ops",
            needs=("rms_norm",),
            suites=("qk-rope",),
        ),
        Provider(
            "flashinfer:quant",
            quantised.flashinfer,
            (quantised.NORM[0], quantised.ADD_NORM[0]),
            gemma=False,
            module="flashinfer.norm",
            needs=("rmsnorm_quant",),
        ),
        Provider(
            "vllm:quant",
            quantised.vllm,
            (quantised.NORM[1], quantised.ADD_NORM[1]),
            gemma=False,
            module="vllm._custom_ops",
            needs=("rms_norm_dynamic_per_token_quant",),
        ),
        Provider(
            "transformer_engine",
            norm_peers.transformer_engine,
            (RMS_NORM,),
            module="transformer_engine.pytorch",
            needs=("RMSNorm",),
        ),
    )
}


def why_absent(provider: Provider) -> str:
    """Why the provider cannot be used; empty if it can."""
    if not provider.module:
        return ""
    try:
        module = importlib.import_module(provider.module)
    except Exception as error:  # an import may fail in any way if a device, driver or dependency is missing
        return f"{type(error).__name__}: {error}".splitlines()[0]
    missing = [name for name in provider.needs if not hasattr(module, name)]
    return f"the installed {provider.module} has no {missing[0]}" if missing else ""


def version(provider: Provider) -> str:
    top = provider.module.partition(".")[0]
    for distribution in importlib.metadata.packages_distributions().get(top, ()):
        return f"{distribution} {importlib.metadata.version(distribution)}"
    return top
