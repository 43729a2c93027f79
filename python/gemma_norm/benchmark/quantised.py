"""The suite quant: a norm that gives 8 bits to the next matrix product. Who has it, its bytes, and its check.

An operator is the norm and how it is quantised, such as "rms_norm_quant: a scale a token". The format is float8_e4m3fn.
A call takes x, or x and residual, or x and gate, and returns (q, scale) or (q, scale, sum).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import gemma_norm
from gemma_norm import reference

EPS = 1e-6
Call = Callable[..., tuple[Tensor, ...]]
LARGEST = 448.0
STATIC, TOKEN, GROUP = "a given scale", "a scale a token", "a scale a group of 128"
SCHEMES = (STATIC, TOKEN, GROUP)
NORM, ADD_NORM = (tuple(f"{name}: {scheme}" for scheme in SCHEMES) for name in ("rms_norm_quant", "add_rms_norm_quant"))
GATED_NORM = f"gated_rms_norm_quant: {TOKEN}"
"""Its rows are the heads of tokens."""
QUANT_OPS = (*NORM, *ADD_NORM, GATED_NORM)
GIVEN = 0.02
UNITS = 1.05
"""By how many halves of float8's unit a result may be off. The others round to 16 bits first."""


def scheme_of(op: str) -> str:
    return op.partition(": ")[2]


def adds(op: str) -> bool:
    return op in ADD_NORM


def bytes_of(op: str, rows: int, hidden: int, itemsize: int) -> int:
    """x is read, q and its scales are written; with a residual, that is read and the sum written; a gate is read."""
    groups = {STATIC: 0, TOKEN: 1, GROUP: hidden // 128}[scheme_of(op)]
    tensors = 3 if adds(op) else 2 if op == GATED_NORM else 1
    return rows * (hidden * (itemsize * tensors + 1) + 4 * groups) + hidden * itemsize


def ours(op: str, weight: Tensor, gemma: bool) -> Call:
    scheme, norm, add_norm = scheme_of(op), gemma_norm.rms_norm_quant, gemma_norm.fused_add_rms_norm_quant
    scale = torch.tensor(GIVEN, device=weight.device) if scheme == STATIC else None
    size = 128 if scheme == GROUP else None

    def call(x: Tensor) -> tuple[Tensor, ...]:
        return norm(x, weight, scale, EPS, gemma, scale_group_size=size)

    def add_call(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        return (*add_norm(x, residual, weight, scale, EPS, gemma, scale_group_size=size), residual)

    if op == GATED_NORM:
        return lambda x, gate: gemma_norm.gated_rms_norm_quant(x, gate, weight, eps=EPS)
    return add_call if adds(op) else call


def _quantise(op: str, y: Tensor) -> tuple[Tensor, Tensor]:
    """In plain PyTorch, as engines do it where they have no kernel."""
    if scheme_of(op) == STATIC:
        return (y * (1 / GIVEN)).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), y.new_tensor(GIVEN)
    groups = y.reshape(len(y), -1, 128 if scheme_of(op) == GROUP else y.shape[-1])
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-10) / LARGEST
    q = (groups / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return q.flatten(-2), scale.squeeze(-1)


def eager(op: str, weight: Tensor, gemma: bool) -> Call:
    def quantised_norm(x: Tensor) -> tuple[Tensor, ...]:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)
        return _quantise(op, y * (1.0 + weight.float()) if gemma else y * weight.float())

    def with_sum(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        s = x + residual
        return (*quantised_norm(s), s)

    def with_gate(x: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS) * weight.float()
        return _quantise(op, y * functional.silu(gate.float()))

    return with_sum if adds(op) else with_gate if op == GATED_NORM else quantised_norm


def compiled(op: str, weight: Tensor, gemma: bool) -> Call:
    torch._dynamo.reset()
    call: Call = torch.compile(eager(op, weight, gemma), fullgraph=True, dynamic=False)
    return call


def two_steps(op: str, weight: Tensor, gemma: bool) -> Call:
    """Our norm in 16 bits, then a kernel of torch.compile that quantises."""
    torch._dynamo.reset()
    quantise = torch.compile(lambda y: _quantise(op, y.float()), fullgraph=True, dynamic=False)

    def with_sum(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        y, s = gemma_norm.add_rms_norm(x, residual, weight, EPS, gemma)
        return (*quantise(y), s)

    if op == GATED_NORM:
        return lambda x, gate: quantise(gemma_norm.gated_rms_norm(x, gate, weight, EPS))
    return with_sum if adds(op) else lambda x: quantise(gemma_norm.rms_norm(x, weight, EPS, gemma))


def norm_alone(op: str, weight: Tensor, gemma: bool) -> Call:
    """Our norm, which writes 16 bits and no scale: what the quantisation adds is the difference."""

    def with_sum(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        gemma_norm.fused_add_rms_norm(x, residual, weight, EPS, gemma)
        return x, residual

    if op == GATED_NORM:
        return lambda x, gate: (gemma_norm.gated_rms_norm(x, gate, weight, EPS),)
    return with_sum if adds(op) else lambda x: (gemma_norm.rms_norm(x, weight, EPS, gemma),)


def copy(op: str, weight: Tensor, gemma: bool) -> Call:
    """As many bytes, half of them read and half written."""

    def call(x: Tensor, *residual: Tensor) -> tuple[Tensor, ...]:
        total = bytes_of(op, len(x), x.shape[-1], x.element_size()) // 2
        parts = (x, *residual)
        whole = [t.view(torch.uint8).flatten()[: total - i * x.nbytes] for i, t in enumerate(parts)]
        return tuple(torch.empty_like(t).copy_(t) for t in whole)

    return call


def flashinfer(op: str, weight: Tensor, gemma: bool) -> Call:
    """It has a given scale only, and no zero-centred weight."""
    module = importlib.import_module("flashinfer.norm")
    scale = torch.tensor([GIVEN], device=weight.device)

    def call(x: Tensor) -> tuple[Tensor, ...]:
        q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
        module.rmsnorm_quant(q, x, weight, scale, EPS)
        return q, scale

    def with_sum(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
        module.fused_add_rmsnorm_quant(q, x, residual, weight, scale, EPS)
        return q, scale, residual

    return with_sum if adds(op) else call


def vllm(op: str, weight: Tensor, gemma: bool) -> Call:
    """It has no zero-centred weight."""
    ops: Any = importlib.import_module("vllm._custom_ops")

    def call(x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
        q, scale = ops.rms_norm_dynamic_per_token_quant(x, weight, EPS, torch.float8_e4m3fn, residual=residual)
        return (q, scale) if residual is None else (q, scale, residual)

    return call


def error(op: str, outputs: tuple[Tensor, ...], sources: tuple[Tensor, ...], weight: Tensor, gemma: bool) -> float:
    """How far ``q * scale`` is from the exact norm, in halves of a unit in the last place of float8 at that number."""
    q, scale, *sums = outputs
    s = sources[0] + sources[1] if sums else sources[0]
    if sums and not torch.equal(sums[0], s):
        return float("inf")
    rows = torch.linspace(0, len(s) - 1, min(len(s), 64), dtype=torch.float64, device=s.device).round().long()
    exact = reference.oracle(s[rows], weight, EPS, gemma and op != GATED_NORM)
    if op == GATED_NORM:
        exact = exact * functional.silu(sources[1][rows].double())
    scales = scale.double().reshape(1, 1) if scale.numel() == 1 else scale.double()[rows]
    scales = scales.repeat_interleave(s.shape[-1] // scales.shape[-1], -1)
    want = (exact / scales).clamp(-LARGEST, LARGEST)
    unit = torch.ldexp(torch.ones_like(want), torch.frexp(want.abs().clamp_min(2.0**-6))[1] - 4)
    return float(((q[rows].double() - want).abs() / (unit / 2)).max())
