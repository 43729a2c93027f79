"""A small decoder in the shape of Qwen3.5, with norms of several makes, and the text that it learns.

Three layers of linear attention are followed by one of softmax attention, whose q and k are normalised and whose output
is gated. All norms of hidden states have a zero-centred weight, and add the residual; the linear attention ends in a
gated norm of each head. Two things are simpler than in Qwen3.5, because no norm sees them: the linear attention decays
and has no delta rule, and there are no rotary embeddings but a learned one for each position.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import gemma_norm

EPS = 1e-6
VOCABULARY = 64


@dataclass(frozen=True)
class Size:
    hidden: int = 256
    layers: int = 4
    head: int = 64
    batch: int = 8
    length: int = 128


class Norm(nn.Module):
    """``norm(x)``, ``norm(x, residual)`` with the sum, and with ``gated`` ``norm(x, gate)``, in plain PyTorch."""

    def __init__(self, size: int, gated: bool = False) -> None:
        super().__init__()
        self.gated = gated
        self.weight = nn.Parameter(torch.ones(size) if gated else torch.zeros(size))

    def forward(self, x: Tensor, other: Tensor | None = None) -> Any:
        if self.gated:
            assert other is not None
            return self.gated_norm(x, other)
        return self.norm(x) if other is None else self.add_norm(x, other)

    def norm(self, x: Tensor) -> Tensor:
        return _eager(x, 1 + self.weight.float())

    def add_norm(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        s = x + residual
        return self.norm(s), s

    def gated_norm(self, x: Tensor, gate: Tensor) -> Tensor:
        return (_eager(x.float(), self.weight.float()) * functional.silu(gate.float())).type_as(x)


def _eager(x: Tensor, weight: Tensor) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS) * weight).type_as(x)


class Float64Norm(Norm):
    """The same with float64 inside: what differs from :class:`Norm` in float32 is rounding alone."""

    def norm(self, x: Tensor) -> Tensor:
        return self._exact(x, 1 + self.weight.double()).type_as(x)

    def gated_norm(self, x: Tensor, gate: Tensor) -> Tensor:
        return (self._exact(x, self.weight.double()) * functional.silu(gate.double())).type_as(x)

    def _exact(self, x: Tensor, weight: Tensor) -> Tensor:
        y = x.double()
        return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS) * weight


class TorchNorm(Norm):
    """``F.rms_norm``, which knows no zero-centred weight: 1 + weight is computed before."""

    def norm(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, 1 + self.weight, EPS)

    def gated_norm(self, x: Tensor, gate: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, EPS) * functional.silu(gate)


class LigerNorm(Norm):
    """Liger's functions, with the options of its Gemma modules. It has no gated norm, so that one is plain PyTorch."""

    def norm(self, x: Tensor) -> Tensor:
        ops: Any = importlib.import_module("liger_kernel.ops")
        y: Tensor = ops.LigerRMSNormFunction.apply(x, self.weight, EPS, 1.0, "gemma", False)
        return y

    def add_norm(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        ops: Any = importlib.import_module("liger_kernel.ops")
        y, s = ops.LigerFusedAddRMSNormFunction.apply(x, residual, self.weight, EPS, 1.0, "gemma", False)
        return y, s


def our_norm(size: int, gated: bool = False) -> nn.Module:
    if gated:
        return gemma_norm.GatedRMSNorm(size, EPS)
    return gemma_norm.GemmaRMSNorm(size, EPS)


Make = Callable[..., nn.Module]
NORMS: dict[str, Make] = {
    "eager": Norm,
    "float64": Float64Norm,
    "F.rms_norm": TorchNorm,
    "liger": LigerNorm,
    "ours": our_norm,
}


class LinearAttention(nn.Module):
    def __init__(self, size: Size, make: Make) -> None:
        super().__init__()
        self.heads = size.hidden // size.head
        self.into = nn.Linear(size.hidden, 4 * size.hidden + self.heads, bias=False)
        self.norm = make(size.head, gated=True)
        self.out = nn.Linear(size.hidden, size.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        *parts, decay = self.into(x).split([hidden] * 4 + [self.heads], -1)
        q, k, v, gate = (p.view(batch, length, self.heads, -1).transpose(1, 2) for p in parts)
        log = functional.logsigmoid(decay.float() + 4).transpose(1, 2).cumsum(-1)
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        kept = (log.unsqueeze(-1) - log.unsqueeze(-2)).masked_fill(~causal, -torch.inf).exp()
        # Positive, because a score that passes through 0 would turn a normalised row around at once.
        q, k = (functional.normalize(functional.elu(t) + 1, dim=-1) for t in (q, k))
        scores = (q @ k.transpose(-1, -2)) * kept.type_as(x)
        y = self.norm(scores @ v, gate)
        result: Tensor = self.out(y.transpose(1, 2).reshape(batch, length, hidden))
        return result


class Attention(nn.Module):
    def __init__(self, size: Size, make: Make) -> None:
        super().__init__()
        self.heads = size.hidden // size.head
        self.into = nn.Linear(size.hidden, 4 * size.hidden, bias=False)
        self.q_norm, self.k_norm = make(size.head), make(size.head)
        self.out = nn.Linear(size.hidden, size.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        *parts, gate = self.into(x).chunk(4, -1)
        q, k, v = (p.view(batch, length, self.heads, -1) for p in parts)
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: Tensor = self.out(y.transpose(1, 2).reshape(batch, length, hidden) * gate.sigmoid())
        return result


class Layer(nn.Module):
    def __init__(self, size: Size, make: Make, linear: bool) -> None:
        super().__init__()
        self.before, self.after = make(size.hidden), make(size.hidden)
        self.mixer = (LinearAttention if linear else Attention)(size, make)
        self.up = nn.Linear(size.hidden, 6 * size.hidden, bias=False)
        self.down = nn.Linear(3 * size.hidden, size.hidden, bias=False)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` is still to be added to the residual; so is the x that is returned."""
        y, residual = self.before(x, residual)
        y, residual = self.after(self.mixer(y), residual)
        gate, up = self.up(y).chunk(2, -1)
        return self.down(functional.silu(gate) * up), residual


class Decoder(nn.Module):
    def __init__(self, size: Size, make: Make) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, size.hidden)
        self.positions = nn.Embedding(size.length, size.hidden)
        self.layers = nn.ModuleList(Layer(size, make, linear=i % 4 != 3) for i in range(size.layers))
        self.norm = make(size.hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        """The loss of predicting each token from those before it."""
        x = self.tokens(tokens[:, :-1])
        residual = self.positions.weight[: x.shape[1]].expand_as(x).contiguous()
        for layer in self.layers:
            x, residual = layer(x, residual)
        x, _ = self.norm(x, residual)
        logits = functional.linear(x, self.tokens.weight)
        return functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def build(size: Size, make: Make, seed: int, device: str, dtype: torch.dtype) -> Decoder:
    """With the same weights for every make of norm: they are drawn in float32 on the CPU."""
    torch.manual_seed(seed)
    model = Decoder(size, make)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            generator = torch.Generator().manual_seed(seed * 1000 + sum(map(ord, name)))
            std = 0.02 if name.startswith(("tokens", "positions")) else size.hidden**-0.5 / 2
            nn.init.normal_(parameter, std=std, generator=generator)
    return model.to(device, dtype)


class Text:
    """Batches of a synthetic language: each token follows from the two before it, or, one in ten, from chance."""

    def __init__(self, size: Size, seed: int) -> None:
        self.size = size
        self.generator = torch.Generator().manual_seed(seed)
        self.next = torch.randint(VOCABULARY, (4, VOCABULARY), generator=torch.Generator().manual_seed(0))

    def batch(self) -> Tensor:
        rows, length = self.size.batch, self.size.length + 1
        noise = torch.randint(VOCABULARY, (rows, length), generator=self.generator)
        chance = torch.rand(rows, length, generator=self.generator) < 0.1
        tokens = noise.clone()
        for i in range(2, length):
            follows = self.next[tokens[:, i - 2] % 4, tokens[:, i - 1]]
            tokens[:, i] = torch.where(chance[:, i], noise[:, i], follows)
        return tokens
