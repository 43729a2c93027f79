"""``forward_hip`` gives the results of docs/contract.md, whichever provider serves it. All tensors are on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from fake_peers import (
    AITER_WITH_FLAG,
    AITER_WITH_OPUS,
    AITER_WITHOUT_FLAG,
    FOUR,
    GUARDED_AITER_WITH_FLAG,
    GUARDED_AITER_WITH_OPUS,
    VLLM_FOUR,
    VLLM_SIX,
    Peer,
    Vllm,
    called,
    make,
)
from gemma_norm import GemmaRMSNorm, RMSNorm
from support import Placed, assert_right, assert_same_bits, place, randn

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
pytestmark = pytest.mark.usefixtures("peers")


@dataclass(frozen=True)
class Route:
    """A call of ``forward_hip`` and the peer that serves it."""

    kind: type[RMSNorm]
    peer: Peer | None  # None: plain PyTorch, by force
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.kind.__name__}, {self.peer or 'plain PyTorch'}, {str(self.dtype)[6:]}"

    @property
    def peers(self) -> list[Peer]:
        """Those to install."""
        return [self.peer] if self.peer else []

    @property
    def called(self) -> list[str]:
        """What one call leaves in fake_peers.called."""
        return [peer.name for peer in self.peers]

    def module(self) -> RMSNorm:
        return make(self.kind, 64, self.dtype, "auto" if self.peer else "torch")


ROUTES = [
    Route(GemmaRMSNorm, AITER_WITH_FLAG, BF16),
    Route(GemmaRMSNorm, GUARDED_AITER_WITH_FLAG, F16),
    Route(GemmaRMSNorm, AITER_WITH_OPUS, F32),
    Route(GemmaRMSNorm, VLLM_FOUR, F32),
    Route(GemmaRMSNorm, None, BF16),
    Route(RMSNorm, AITER_WITHOUT_FLAG, BF16),
    Route(RMSNorm, GUARDED_AITER_WITH_OPUS, F32),
    Route(RMSNorm, VLLM_FOUR, BF16),
    Route(RMSNorm, VLLM_SIX, F16),
    Route(RMSNorm, None, F16),
]
every_route = pytest.mark.parametrize("route", ROUTES, ids=str)


@pytest.mark.parametrize("layout", ["contiguous", "aligned slice of qkv", "heads before tokens", "padded rows"])
@every_route
@torch.no_grad()
def test_every_route_is_right_in_place_and_at_any_stride(peers, route, layout):
    peers(*route.peers)
    module, dtype = route.module(), route.dtype
    values = [randn(6, 4, 64, dtype=dtype, seed=seed) for seed in range(3)]
    q = place(values[0], layout)
    assert_right(module.forward_hip(q.view), values[0], module.weight, gemma=module.gemma)
    assert_same_bits(q.view, values[0])
    assert called == route.called
    for post in (None, values[2]):
        called.clear()
        x, residual = place(values[0], layout), place(values[1], layout)
        y, s = module.forward_hip(x.view, residual.view, post)
        assert y is x.view and s is residual.view and called == route.called
        assert_same_bits(s, values[0] + (values[1] if post is None else values[1] + post))
        assert_right(y, s, module.weight, gemma=module.gemma)
        x.assert_gaps_intact()
        residual.assert_gaps_intact()
    assert module.forward_hip(q.view[:0]).shape == (0, 4, 64) and called == route.called
    with pytest.raises(RuntimeError, match="post_residual_addition needs a residual"):
        module.forward_hip(q.view, None, values[2])
    with pytest.raises(RuntimeError, match=r"^rms_norm: weight must have shape \[32\]"):
        module.forward_hip(values[0][..., :32])
    with pytest.raises(RuntimeError, match=r"^fused_add_rms_norm: weight must have shape \[32\]"):
        module.forward_hip(values[0][..., :32], values[1][..., :32])


@torch.no_grad()
@pytest.mark.parametrize("strided", [("x",), ("residual",), ("post",), ("x", "residual", "post")], ids=" ".join)
@every_route
def test_each_operand_may_be_strided(peers, route, strided):
    peers(*route.peers)
    module, names = route.module(), ("x", "residual", "post")
    values = {name: randn(6, 4, 64, dtype=route.dtype, seed=seed) for seed, name in enumerate(names)}
    layouts = {name: "q of interleaved q and gate" if name in strided else "offset 1" for name in names}
    placed: dict[str, Placed] = {name: place(values[name], layouts[name]) for name in names}
    y, s = module.forward_hip(*(p.view for p in placed.values()))
    assert y is placed["x"].view and s is placed["residual"].view
    assert_same_bits(s, values["x"] + (values["residual"] + values["post"]))
    assert_right(y, s, module.weight, gemma=module.gemma)
    assert_same_bits(placed["post"].view, values["post"])
    for p in placed.values():
        p.assert_gaps_intact()


@torch.no_grad()
@pytest.mark.parametrize(
    "why", ["training mode", "inplace=False", "memory that overlaps", "expanded x", "expanded residual"]
)
@pytest.mark.parametrize("with_post", [False, True])
@every_route
def test_every_route_returns_new_tensors_where_it_must_not_write(peers, route, with_post, why):
    peers(*route.peers)
    module = route.module()
    x, residual, post = (randn(7, 64, dtype=route.dtype, seed=seed) for seed in range(3))
    both = randn(8, 64, dtype=route.dtype, seed=4)
    if why == "training mode":
        module.train()
    elif why == "inplace=False":
        module.inplace = False
    elif why == "memory that overlaps":
        x, residual = both[1:], both[:-1]
    elif why == "expanded x":
        x = both[:1].expand(7, 64)
    else:
        residual = both[:1].expand(7, 64)
    kept = x.clone(), residual.clone(), both.clone()
    y, s = module.forward_hip(x, residual, post if with_post else None)
    assert y is not x and s is not residual and called == route.called
    for t, before in zip((x, residual, both), kept, strict=True):
        assert_same_bits(t, before)
    assert_same_bits(s, kept[0] + (kept[1] + post if with_post else kept[1]))
    assert_right(y, s, module.weight, gemma=module.gemma)


@torch.no_grad()
def test_plain_pytorch_keeps_a_float32_weight_and_compiles():
    module = make(GemmaRMSNorm, 64, F32, "torch")
    compiled = torch.compile(module.forward_hip, backend="eager", fullgraph=True, dynamic=True)
    for forward in (module.forward_hip, compiled):
        for rows in (2, 3):
            x, residual = randn(rows, 64, dtype=BF16), randn(rows, 64, dtype=BF16, seed=1)
            y, s = forward(x, residual)
            assert_same_bits(s, randn(rows, 64, dtype=BF16) + randn(rows, 64, dtype=BF16, seed=1))
            assert_right(y, s, module.weight, gemma=True)
            assert_right(forward(s), s, module.weight, gemma=True)
    with pytest.raises(Exception, match=r"residual.* must have x's shape"):
        compiled(randn(2, 64, dtype=BF16), randn(3, 64, dtype=BF16))


@torch.no_grad()
def test_the_longest_rows_for_which_aiter_heeds_its_flag(peers):
    peers(AITER_WITH_FLAG)
    x, module = randn(2, 8192, dtype=BF16), make(GemmaRMSNorm, 8192)
    assert_right(module.forward_hip(x.clone(), x.clone())[0], x + x, module.weight, gemma=True)
    assert_right(module.forward_hip(x), x, module.weight, gemma=True)
    assert called == ["aiter"] * 2


@torch.no_grad()
@pytest.mark.parametrize("aiter", [AITER_WITH_OPUS, GUARDED_AITER_WITH_OPUS], ids=str)
@pytest.mark.parametrize("hidden, dtype", [(64, BF16), (8192, F16), (8200, BF16), (100, F16), (769, BF16), (100, F32)])
@pytest.mark.parametrize("kind", [GemmaRMSNorm, RMSNorm])
def test_aiter_with_both_sets_of_kernels_serves_every_row(peers, kind, aiter, hidden, dtype):
    """Each stand-in refuses the rows of the other set of kernels, and the aliases that aiter's own kernel refuses."""
    peers(aiter)
    torch._dynamo.reset()
    module = make(kind, hidden, dtype)
    compiled = []
    if aiter.guarded:  # Only then are the kernels of the first set operators, which torch.compile can call.
        compiled.append(torch.compile(module.forward_hip, backend="aot_eager", fullgraph=True))
    for forward in (module.forward_hip, *compiled):
        called.clear()
        x, residual = randn(3, hidden, dtype=dtype), randn(3, hidden, dtype=dtype, seed=1)
        kept = x.clone(), residual.clone()
        assert_right(forward(x), x, module.weight, gemma=module.gemma)
        y, s = forward(x, residual)
        assert_same_bits(s, kept[0] + kept[1])
        assert_right(y, s, module.weight, gemma=module.gemma)
        in_place = forward not in compiled
        assert_same_bits(x, y if in_place else kept[0])
        assert_same_bits(residual, s if in_place else kept[1])
        assert called == ["aiter"] * 2


@torch.no_grad()
@pytest.mark.parametrize(
    "aiter, hidden, new_tensors",
    [
        (AITER_WITHOUT_FLAG, 64, 2),
        (AITER_WITH_FLAG, 64, 0),
        (AITER_WITH_FLAG, 8200, 2),
        (AITER_WITH_OPUS, 64, 0),
        (AITER_WITH_OPUS, 8200, 0),
    ],
    ids=str,
)
def test_aiter_writes_x_and_residual_itself_where_its_kernels_can(peers, monkeypatch, aiter, hidden, new_tensors):
    peers(aiter)
    module = make(RMSNorm, hidden)
    x, residual = randn(3, hidden, dtype=BF16), randn(3, hidden, dtype=BF16, seed=1)
    made, empty_like = [], torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: made.append(1) or empty_like(*args, **kwargs))
    module.forward_hip(x, residual)
    assert called == ["aiter"] and len(made) == new_tensors


@torch.no_grad()
def test_a_schema_with_a_further_argument_that_has_a_default_is_known(peers):
    peers(Vllm("a later vllm", FOUR.replace("epsilon)", "epsilon, bool later=False)")))
    x, module = randn(2, 64, dtype=BF16), make(RMSNorm, 64)
    y, _ = module.forward_hip(x.clone(), x.clone())
    assert_right(y, x + x, module.weight)
    assert called == ["vllm"]
