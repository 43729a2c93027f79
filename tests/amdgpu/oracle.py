"""The operators in float64, and what a result rounds: which of several ways to compute it gives the same numbers."""

from __future__ import annotations

import torch

EPS = 1e-6
HEADS_OF_TOKEN, POSITIONS = 8, 64
Tensors = dict[str, torch.Tensor]


def make(op: str, dtype: torch.dtype, rows: int, hidden: int) -> Tensors:
    """Numbers with a few large ones, as activations have; weights around zero."""
    random = torch.Generator().manual_seed(hidden + rows)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    if op == "qk_norm_rope":
        tokens, k_heads = rows // HEADS_OF_TOKEN, 2
        heads = normal(tokens, HEADS_OF_TOKEN, hidden) * torch.exp(normal(tokens, HEADS_OF_TOKEN, 1))
        angles = torch.arange(POSITIONS)[:, None] / 10000 ** (torch.arange(0, hidden, 2) / hidden)
        t = {"x": heads[:, k_heads:].clone(), "k": heads[:, :k_heads].clone()}
        t |= {name: 0.3 * normal(hidden) for name in ("weight", "k_weight")}
        t = {name: value.to(dtype) for name, value in t.items()}
        positions = torch.randint(POSITIONS, (tokens,), generator=random)
        return t | {"cos_sin_cache": torch.cat([angles.cos(), angles.sin()], -1), "positions": positions}
    t = {"x": normal(rows, hidden) * torch.exp(normal(rows, 1)), "weight": 0.3 * normal(hidden)}
    if "add_rms_norm" in op:
        t["residual"] = normal(rows, hidden)
    if op == "rms_norm_add_rms_norm":
        t["post_weight"] = 0.3 * normal(hidden)
    if "gated" in op:
        t["gate"] = normal(rows, hidden)
    if "backward" in op:
        t["dout"] = normal(rows, hidden)
    t = {name: value.to(dtype) for name, value in t.items()}
    if "backward" in op:
        t["rstd"] = torch.rsqrt(t["x"].double().square().mean(-1) + EPS).float()
    return t


def added(t: Tensors, gemma: bool) -> torch.Tensor:
    """What is added to the residual: x, or the norm of x, rounded to its dtype as a call of its own would."""
    x = t["x"].double()
    if "post_weight" not in t:
        return x
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    return (x * rstd * (t["post_weight"].double() + gemma)).to(t["x"].dtype).double()


def rotated(t: Tensors, heads: str, weight: str, gemma: bool) -> torch.Tensor:
    """The norm of each head, rotated: the elements of a pair are half a head apart."""
    x = t[heads].double()
    n = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * (t[weight].double() + gemma)
    cos, sin = t["cos_sin_cache"][t["positions"]].double()[:, None].chunk(2, -1)
    a, b = n.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def expected(op: str, t: Tensors, gemma: bool) -> Tensors:
    """In float64, rounded nowhere but the sum of x (or its norm) and residual, which is an output too. What is to be
    quantised is divided by its scale and not rounded.
    """
    if op == "qk_norm_rope":
        return {"out": rotated(t, "x", "weight", gemma), "k_out": rotated(t, "k", "k_weight", gemma)}
    d = {name: value.double() for name, value in t.items()}
    scale = d["weight"] + 1 if gemma else d["weight"]
    s = d["x"]
    result = {}
    if "residual" in t:
        result["residual_out"] = added(t, gemma) + d["residual"]
        s = result["residual_out"].to(t["x"].dtype).double()
    rstd = torch.rsqrt(s.square().mean(-1, keepdim=True) + EPS)
    if "backward" not in op:
        out = s * rstd * scale
        result["out"] = out * torch.nn.functional.silu(d["gate"]) if "gated" in op else out
        if op.endswith("quant"):
            result["scale_out"] = result["out"].abs().amax(-1, keepdim=True) / torch.iinfo(torch.int8).max
            result["out"] /= result["scale_out"]
        return result
    dout = d["dout"]
    normalised = s * rstd
    if "gated" in op:
        logistic = torch.sigmoid(d["gate"])
        result["dgate"] = dout * normalised * scale * logistic * (1 + d["gate"] * (1 - logistic))
        dout = dout * d["gate"] * logistic
    result["dweight"] = (dout * normalised).sum(0)
    g = dout * scale
    result["dx"] = rstd * (g - normalised * (g * normalised).mean(-1, keepdim=True))
    return result


def ulps(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """How far a result is from the exact one, in units of the last place of its dtype, with sign: positive is further
    from zero.
    """
    info = torch.finfo(got.dtype)
    exponent = torch.floor(torch.log2(want.abs().clamp(min=info.tiny)))
    return (got.double() - want) * torch.sign(want) / (torch.exp2(exponent) * info.eps)


def truncated(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The lower bits cut off, where the dtype is the upper half of float32."""
    if dtype != torch.bfloat16:
        return value.to(dtype)
    return (value.float().view(torch.int32) & -65536).view(torch.float32).to(dtype)


def ways(t: Tensors, gemma: bool) -> dict[str, torch.Tensor]:
    """Results of a forward norm that rounds more, or otherwise, than once at the end."""
    x, weight = t["x"], t["weight"]
    scale = weight.double() + 1 if gemma else weight.double()
    exact = added(t, gemma) + t["residual"].double() if "residual" in t else x.double()
    found = {}
    for name, s in {"": exact.to(x.dtype).double(), ", of the sum before it is rounded": exact}.items():
        rstd = torch.rsqrt(s.square().mean(-1, keepdim=True) + EPS)
        last = torch.nn.functional.silu(t["gate"].double()) if "gate" in t else 1.0
        found["once" + name] = (s * rstd * scale * last).to(x.dtype)
        found["truncates" + name] = truncated(s * rstd * scale * last, x.dtype)
        found["the normalised x too" + name] = ((s * rstd).to(x.dtype).double() * scale * last).to(x.dtype)
    return found


def rounding(got: torch.Tensor, t: Tensors, gemma: bool) -> str:
    """Which way fits best, and how many results of a thousand are other numbers than its."""
    other = {name: float((got != result).double().mean()) for name, result in ways(t, gemma).items()}
    best = min(other, key=lambda name: other[name])
    return f"{best} ({1000 * other[best]:.0f} ‰ differ)" if other[best] > 0.0005 else best
