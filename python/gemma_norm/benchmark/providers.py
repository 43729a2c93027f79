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

import torch
from torch import Tensor
from torch.nn import functional

import gemma_norm

from . import gradients, quantised, rotation, rotation_peers
from .cases import (
    ADD_RMS_NORM,
    BACKWARD,
    EPS,
    FORWARD,
    GATED_RMS_NORM,
    NORM_ADD_NORM,
    OPS,
    QK_NORM_ROPE,
    RMS_NORM,
    Point,
    post_weight,
)
from .gradients import GradientInputs

Outputs = Tensor | tuple[Tensor, ...]
Call = Callable[..., Outputs]
Make = Callable[[str, Tensor, bool], Call]


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


def _with(make: Make, rotate: Make, quantise: Make) -> Make:
    """``make``, but for the operators that rotate heads, and for those that quantise."""
    others = {QK_NORM_ROPE: rotate, **dict.fromkeys(quantised.QUANT_OPS, quantise)}
    return lambda op, weight, gemma: others.get(op, make)(op, weight, gemma)


def _ours(op: str, weight: Tensor, gemma: bool) -> Call:
    norm, add_norm = gemma_norm.rms_norm, gemma_norm.fused_add_rms_norm
    if op == RMS_NORM:
        return lambda x: norm(x, weight, EPS, gemma)
    if op == GATED_RMS_NORM:
        return lambda x, gate: gemma_norm.gated_rms_norm(x, gate, weight, EPS)
    if op == NORM_ADD_NORM:
        return _in_place(gemma_norm.fused_rms_norm_add_rms_norm, post_weight(weight), weight, EPS, gemma)
    return _in_place(add_norm, weight, EPS, gemma)


def _two_calls(op: str, weight: Tensor, gemma: bool) -> Call:
    norm, add_norm, post = gemma_norm.rms_norm, gemma_norm.fused_add_rms_norm, post_weight(weight)
    return _two_kernels(lambda x: norm(x, post, EPS, gemma, out=x), _in_place(add_norm, weight, EPS, gemma))


def _ours_op(op: str, weight: Tensor, gemma: bool) -> Call:
    norm = torch.ops.gemma_norm.rms_norm.default
    add_norm = torch.ops.gemma_norm.fused_add_rms_norm.default
    if op == RMS_NORM:
        return lambda x: norm(x, weight, EPS, gemma)
    return _in_place(add_norm, weight, EPS, gemma)


def _ours_module(op: str, weight: Tensor, gemma: bool) -> Call:
    kind = gemma_norm.GemmaRMSNorm if gemma else gemma_norm.RMSNorm
    module = kind(weight.numel(), EPS, device=weight.device, dtype=weight.dtype)
    assert module.weight is not None
    module.weight.copy_(weight)
    return module


def _copy(op: str, weight: Tensor, gemma: bool) -> Call:
    if op == RMS_NORM:
        return lambda x: torch.empty_like(x).copy_(x)
    if op == GATED_RMS_NORM:  # the bytes of three tensors: two read, one written
        return lambda x, gate: torch.empty_like(both := _half_more(x, gate)).copy_(both)[: x.numel()].view_as(x)
    return lambda x, residual: (torch.empty_like(x).copy_(x), torch.empty_like(residual).copy_(residual))


def _half_more(x: Tensor, gate: Tensor) -> Tensor:
    """x and the first half of gate, which follows it in memory."""
    assert gate.data_ptr() == x.data_ptr() + x.nbytes
    return x.as_strided((x.numel() + x.numel() // 2,), (1,))


def _eager(op: str, weight: Tensor, gemma: bool) -> Call:
    def norm(x: Tensor, weight: Tensor = weight) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)
        y = y * (1.0 + weight.float()) if gemma else y * weight.float()
        return y.type_as(x)

    def add_norm(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        s = x + residual
        return norm(s), s

    def gated_norm(x: Tensor, gate: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)
        return (weight * y.type_as(x) * functional.silu(gate.float())).type_as(x)

    def norm_add_norm(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        s = residual + norm(x, post)
        return norm(s), s

    post = post_weight(weight)
    calls: dict[str, Call] = {
        RMS_NORM: norm,
        ADD_RMS_NORM: add_norm,
        GATED_RMS_NORM: gated_norm,
        NORM_ADD_NORM: norm_add_norm,
    }
    return calls[op]


def _torch_compile(op: str, weight: Tensor, gemma: bool) -> Call:
    torch._dynamo.reset()  # so that each shape is compiled, and none exceeds the recompilation limit
    return torch.compile(_eager(op, weight, gemma), fullgraph=True, dynamic=False)


def _torch_rms_norm(op: str, weight: Tensor, gemma: bool) -> Call:
    shape, norm, post = tuple(weight.shape), functional.rms_norm, post_weight(weight)
    if op == RMS_NORM:
        return lambda x: norm(x, shape, weight, EPS)

    def add_norm(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        s = x + residual
        return norm(s, shape, weight, EPS), s

    if op == NORM_ADD_NORM:
        return lambda x, residual: add_norm(norm(x, shape, post, EPS), residual)
    return add_norm


def _liger(op: str, weight: Tensor, gemma: bool) -> Call:
    ops = importlib.import_module("liger_kernel.ops")
    options = (weight, EPS, 1.0, "gemma", False) if gemma else (weight, EPS, 0.0, "llama", False)
    norm = (ops.LigerRMSNormFunction if op == RMS_NORM else ops.LigerFusedAddRMSNormFunction).apply
    return (lambda x: norm(x, *options)) if op == RMS_NORM else lambda x, residual: norm(x, residual, *options)


def _quack(op: str, weight: Tensor, gemma: bool) -> Call:
    norm, offset = importlib.import_module("quack").rmsnorm, float(gemma)
    if op == RMS_NORM:
        return lambda x: norm(x, weight, eps=EPS, weight_offset=offset)
    return lambda x, residual: norm(x, weight, residual=residual, eps=EPS, prenorm=True, weight_offset=offset)


def _flashinfer_names(module: str) -> Make:
    """For FlashInfer and sgl_kernel, whose functions have the same names."""

    def make(op: str, weight: Tensor, gemma: bool) -> Call:
        prefix, names = "gemma_" if gemma else "", importlib.import_module(module)
        norm: Callable[..., Any] = getattr(names, f"{prefix}rmsnorm")
        add_norm: Callable[..., Any] = getattr(names, f"{prefix}fused_add_rmsnorm")
        if op == RMS_NORM:
            return lambda x: norm(x, weight, EPS)
        if op == NORM_ADD_NORM:
            post = post_weight(weight)
            return _two_kernels(lambda x: norm(x, post, EPS), _in_place(add_norm, weight, EPS))
        return _in_place(add_norm, weight, EPS)

    return make


def _vllm(op: str, weight: Tensor, gemma: bool) -> Call:
    ops = importlib.import_module("vllm._custom_ops")

    def norm(x: Tensor, weight: Tensor = weight) -> Tensor:
        y = torch.empty_like(x)
        ops.rms_norm(y, x, weight, EPS)
        return y

    if op == RMS_NORM:
        return norm
    add_norm, post = _in_place(ops.fused_add_rms_norm, weight, EPS), post_weight(weight)
    return add_norm if op == ADD_RMS_NORM else _two_kernels(lambda x: norm(x, post), add_norm)


def _aiter(op: str, weight: Tensor, gemma: bool) -> Call:
    aiter = importlib.import_module("aiter")
    if op == RMS_NORM:
        return lambda x: aiter.rms_norm(x, weight, EPS)

    def add_norm(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y, s = torch.empty_like(x), torch.empty_like(x)
        aiter.rmsnorm2d_fwd_with_add(y, x, residual, s, weight, EPS)
        return y, s

    return add_norm


def _transformer_engine(op: str, weight: Tensor, gemma: bool) -> Call:
    te = importlib.import_module("transformer_engine.pytorch")
    module = te.RMSNorm(weight.numel(), eps=EPS, zero_centered_gamma=gemma).to(weight.device, weight.dtype)
    module.weight.copy_(weight)
    call: Call = module
    return call


def _fla(op: str, weight: Tensor, gemma: bool) -> Call:
    norm = importlib.import_module("fla.modules.norm.fused_norm_gate").rms_norm_gated
    return lambda x, gate: norm(x, gate, weight, None, eps=EPS)


def _in_place(function: Callable[..., Any], *options: Any) -> Call:
    def call(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        function(x, residual, *options)
        return x, residual

    return call


def _two_kernels(norm: Callable[[Tensor], Tensor], add_norm: Call) -> Call:
    """The norm of x, then the addition and the norm of the sum."""
    return lambda x, residual: add_norm(norm(x), residual)


ALL = (*OPS, GATED_RMS_NORM, NORM_ADD_NORM, QK_NORM_ROPE, *quantised.QUANT_OPS)
DERIVED = ("backward", "backward-few", "backward-cpu", "train-host")
"""The suites that time derivatives."""
LIGER: Any = {"module": "liger_kernel.ops", "needs": ("LigerRMSNormFunction",)}
PROVIDERS = {
    p.name: p
    for p in (
        Provider("ours", _with(_ours, rotation.ours, quantised.ours), ALL, exact=True, gradient=gradients.ours),
        Provider("ours:rounded", rotation.ours_rounded, (QK_NORM_ROPE,), suites=("qk-rope",)),
        Provider("ours:cache", rotation.ours_cache, (QK_NORM_ROPE,), suites=("qk-rope",)),
        Provider("ours:in_place", rotation.ours_in_place, (QK_NORM_ROPE,), exact=True, suites=("qk-rope",)),
        Provider("ours:norms", rotation.ours_norms, (QK_NORM_ROPE,), suites=("qk-rope",)),
        Provider("ours:norm alone", quantised.norm_alone, quantised.QUANT_OPS, suites=("quant",)),
        Provider("ours:two steps", quantised.two_steps, quantised.QUANT_OPS, suites=("quant",)),
        Provider("ours:two calls", _two_calls, (NORM_ADD_NORM,), exact=True, suites=("norm-add",)),
        Provider("ours:torch.ops", _ours_op, exact=True, suites=("host",)),
        Provider("ours:module", _ours_module, exact=True, suites=("host",)),
        Provider(
            "copy_", _with(_copy, rotation.copy, quantised.copy), ALL, copies=True, traffic=gradients.copy_traffic
        ),
        Provider("torch.add", _copy, copies=True, suites=DERIVED, traffic=gradients.add_traffic),
        Provider("eager", _with(_eager, rotation.eager, quantised.eager), ALL, gradient=_eager),
        Provider("F.rms_norm", _torch_rms_norm, (*OPS, NORM_ADD_NORM), gemma=False, gradient=_torch_rms_norm),
        Provider(
            "torch.compile",
            _with(_torch_compile, rotation.compiled, quantised.compiled),
            ALL,
            gradient=gradients.compiled(_torch_compile),
        ),
        Provider(
            "liger",
            (lambda op, weight, gemma: (rotation_peers.liger if op == QK_NORM_ROPE else _liger)(op, weight, gemma)),
            (*OPS, QK_NORM_ROPE),
            gradient=gradients.liger_new,
            **LIGER,
        ),
        Provider(
            "liger:in_place",
            _liger,
            gradient=gradients.liger_in_place,
            suites=DERIVED,
            writes_gradient=True,
            **LIGER,
        ),
        Provider("quack", _quack, gradient=_quack, module="quack", needs=("rmsnorm",)),
        Provider(
            "flashinfer",
            _flashinfer_names("flashinfer"),
            (*OPS, NORM_ADD_NORM),
            module="flashinfer",
            needs=("gemma_rmsnorm",),
        ),
        Provider(
            "sgl_kernel",
            _flashinfer_names("sgl_kernel"),
            (*OPS, NORM_ADD_NORM),
            module="sgl_kernel",
            needs=("gemma_rmsnorm",),
        ),
        Provider("vllm", _vllm, (*OPS, NORM_ADD_NORM), gemma=False, module="vllm._custom_ops", needs=("rms_norm",)),
        Provider(
            "fla",
            _fla,
            (GATED_RMS_NORM,),
            module="fla.modules.norm.fused_norm_gate",
            needs=("rms_norm_gated",),
            gradient=_fla,
        ),
        Provider("aiter", _aiter, gemma=False, module="aiter", needs=("rmsnorm2d_fwd_with_add",)),
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
            _transformer_engine,
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
