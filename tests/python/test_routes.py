"""``forward_hip``'s routes give the contract's results, on CPU tensors."""

from __future__ import annotations

import pytest
import torch

from gemma_norm import GemmaRMSNorm, RMSNorm, reference, routing
from peer_packages import FOUR, called, make
from support import Placed, assert_right, assert_same_bits, place, randn

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
pytestmark = pytest.mark.usefixtures("peers")


GEMMA = [("aiter flag", BF16), ("aiter guarded flag", F16), ("aiter opus", F32), ("vllm 4", F32), ("torch", BF16)]
PLAIN_ONES = [("aiter before", BF16), ("aiter guarded opus", F32), ("vllm 4", BF16), ("vllm 6", F16), ("torch", F16)]
ROUTES = [(GemmaRMSNorm, *route) for route in GEMMA] + [(RMSNorm, *route) for route in PLAIN_ONES]


@pytest.mark.parametrize("layout", ["contiguous", "aligned slice of qkv", "heads before tokens", "padded rows"])
@pytest.mark.parametrize("kind, route, dtype", ROUTES, ids=lambda value: getattr(value, "__name__", str(value)))
@torch.no_grad()
def test_every_route_is_right_in_place_and_at_any_stride(peers, kind, route, dtype, layout):
    expected = [] if route == "torch" else route.split()[:1]
    peers(*[route] * len(expected))
    module = make(kind, 64, dtype, "torch" if route == "torch" else "auto")
    values = [randn(6, 4, 64, dtype=dtype, seed=seed) for seed in range(3)]
    q = place(values[0], layout)
    assert_right(module.forward_hip(q.view), values[0], module.weight, gemma=module.gemma)
    assert_same_bits(q.view, values[0])
    assert called == expected
    for post in (None, values[2]):
        called.clear()
        x, residual = place(values[0], layout), place(values[1], layout)
        y, s = module.forward_hip(x.view, residual.view, post)
        assert y is x.view and s is residual.view and called == expected
        assert_same_bits(s, values[0] + (values[1] if post is None else values[1] + post))
        assert_right(y, s, module.weight, gemma=module.gemma)
        x.assert_gaps_intact()
        residual.assert_gaps_intact()
    assert module.forward_hip(q.view[:0]).shape == (0, 4, 64) and called == expected
    with pytest.raises(RuntimeError, match="post_residual_addition needs a residual"):
        module.forward_hip(q.view, None, values[2])
    with pytest.raises(RuntimeError, match=r"^rms_norm: weight must have shape \[32\]"):
        module.forward_hip(values[0][..., :32])
    with pytest.raises(RuntimeError, match=r"^fused_add_rms_norm: weight must have shape \[32\]"):
        module.forward_hip(values[0][..., :32], values[1][..., :32])


@torch.no_grad()
@pytest.mark.parametrize("strided", ["x", "residual", "post", "x residual post"])
@pytest.mark.parametrize("kind, route, dtype", ROUTES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_each_operand_may_be_strided(peers, kind, route, dtype, strided):
    peers(*[route] * (route != "torch"))
    module = make(kind, 64, dtype, "torch" if route == "torch" else "auto")
    values = {name: randn(6, 4, 64, dtype=dtype, seed=seed) for seed, name in enumerate(["x", "residual", "post"])}
    layouts = {name: "q of interleaved q and gate" if name in strided.split() else "offset 1" for name in values}
    placed: dict[str, Placed] = {name: place(values[name], layouts[name]) for name in values}
    y, s = module.forward_hip(*(p.view for p in placed.values()))
    assert y is placed["x"].view and s is placed["residual"].view
    assert_same_bits(s, values["x"] + (values["residual"] + values["post"]))
    assert_right(y, s, module.weight, gemma=kind.gemma)
    assert_same_bits(placed["post"].view, values["post"])
    for p in placed.values():
        p.assert_gaps_intact()


@torch.no_grad()
@pytest.mark.parametrize(
    "why", ["training mode", "inplace=False", "memory that overlaps", "expanded x", "expanded residual"]
)
@pytest.mark.parametrize("with_post", [False, True])
@pytest.mark.parametrize("kind, route, dtype", ROUTES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_every_route_returns_new_tensors_where_it_must_not_write(peers, kind, route, dtype, with_post, why):
    expected = [] if route == "torch" else route.split()[:1]
    peers(*[route] * len(expected))
    module = make(kind, 64, dtype, "torch" if route == "torch" else "auto")
    x, residual, post = (randn(7, 64, dtype=dtype, seed=seed) for seed in range(3))
    both = randn(8, 64, dtype=dtype, seed=4)
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
    assert y is not x and s is not residual and called == expected
    for t, before in zip((x, residual, both), kept, strict=True):
        assert_same_bits(t, before)
    assert_same_bits(s, kept[0] + (kept[1] + post if with_post else kept[1]))
    assert_right(y, s, module.weight, gemma=kind.gemma)


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
    peers("aiter flag")
    x, module = randn(2, 8192, dtype=BF16), make(GemmaRMSNorm, 8192)
    assert_right(module.forward_hip(x.clone(), x.clone())[0], x + x, module.weight, gemma=True)
    assert_right(module.forward_hip(x), x, module.weight, gemma=True)
    assert called == ["aiter"] * 2


@torch.no_grad()
@pytest.mark.parametrize("install", ["aiter opus", "aiter guarded opus"])
@pytest.mark.parametrize("hidden, dtype", [(64, BF16), (8192, F16), (8200, BF16), (100, F16), (769, BF16), (100, F32)])
@pytest.mark.parametrize("kind", [GemmaRMSNorm, RMSNorm])
def test_any_row_that_aiter_serves_since_it_has_two_sets_of_kernels(peers, kind, install, hidden, dtype):
    """Compiled as well, in one graph; the stand-ins refuse what is not theirs, and aliases that aiter's would."""
    peers(install)
    torch._dynamo.reset()
    module = make(kind, hidden, dtype)
    guarded = "guarded" in install  # only then are the first kernels operators, which can be compiled
    compiled = [torch.compile(module.forward_hip, backend="aot_eager", fullgraph=True)] * guarded
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
@pytest.mark.parametrize("install, hidden, copies", [("aiter before", 64, 2), ("aiter flag", 64, 0),
                                                     ("aiter flag", 8200, 2), ("aiter opus", 64, 0),
                                                     ("aiter opus", 8200, 0)])  # fmt: skip
def test_aiter_writes_x_and_residual_itself_where_its_kernels_can(peers, monkeypatch, install, hidden, copies):
    peers(install)
    module = make(RMSNorm, hidden)
    x, residual = randn(3, hidden, dtype=BF16), randn(3, hidden, dtype=BF16, seed=1)
    made, empty_like = [], torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: made.append(1) or empty_like(*args, **kwargs))
    module.forward_hip(x, residual)
    assert called == ["aiter"] and len(made) == copies


@pytest.mark.parametrize("install", ["aiter before 64", "aiter flag 8200", "vllm 4 64", "aiter flag 64"])
@torch.no_grad()
def test_a_rounded_weight_is_used_by_force_alone(peers, caplog, install):
    install, _, hidden = install.rpartition(" ")
    flag, hidden = (install, hidden) == ("aiter flag", "64"), int(hidden)
    peers(install)
    x, residual = randn(5, hidden, dtype=BF16), randn(5, hidden, dtype=BF16, seed=1)
    module = make(GemmaRMSNorm, hidden, F32 if flag or "vllm" in install else BF16)
    assert_right(module.forward_hip(x.clone(), residual.clone())[0], x + residual, module.weight, gemma=True)
    assert not called and f"{'the float32' if flag else '1 +'} weight would be rounded to bfloat16" in caplog.text
    module.provider = install.split()[0]
    for _ in range(2):
        y, s = module.forward_hip(x.clone(), residual.clone())
        rounded = module.weight.to(BF16) if flag else (1 + module.weight.float()).to(BF16)
        assert_same_bits(y, reference.rms_norm(s, rounded, gemma=flag))
        assert_same_bits(module.forward_hip(x), reference.rms_norm(x, rounded, gemma=flag))
        module.weight.mul_(-3)  # counts at once
    assert len(called) == 4
    reason = (
        "the float32 weight" if flag else f"no gemma_norm flag{' beyond hidden 8192' * (hidden == 8200)}: 1 + weight"
    )
    said = f"{module.provider}: asked for, and breaks the contract: {reason} would be rounded to bfloat16"
    assert [r.levelname for r in caplog.records if r.message.endswith(f"forward_hip uses {said}")] == ["WARNING"]


@pytest.mark.parametrize("provider", ["auto", "aiter", "vllm", "torch"])
def test_gradients_are_recorded_by_our_own(peers, monkeypatch, caplog, provider):
    peers("aiter flag", "vllm 4")
    if provider == "auto":
        monkeypatch.setattr(routing, "PEERS", dict.fromkeys(routing.PEERS))  # not even looked for
    module = make(RMSNorm, 64, F16, provider).requires_grad_()
    y, s = module.forward_hip(x := randn(3, 64, dtype=F16), x)
    y.float().sum().backward()
    assert s is not x and bool((module.weight.grad != 0).all()) and not called
    assert_same_bits(x, randn(3, 64, dtype=F16))
    used = "plain PyTorch: asked for" if provider == "torch" else "ours, for peers record no gradient"
    assert [(r.levelname, r.message) for r in caplog.records] == [("INFO", f"gemma_norm: forward_hip uses {used}")]


@torch.no_grad()
def test_rows_beyond_32_bit_offsets(peers, monkeypatch):
    """Meta tensors have sizes alone."""
    peers("vllm 4")
    module = RMSNorm(64, device="meta", dtype=BF16, provider="vllm")
    x = torch.empty(2**25, 64, device="meta", dtype=BF16)
    monkeypatch.setattr(reference, "rms_norm", lambda x, *others: x)
    with pytest.raises(RuntimeError, match="'vllm' was asked for and cannot be had: 32-bit offsets, and x has 2\\^31"):
        module.forward_hip(x)
    assert module.forward_hip(x[1:]).shape == (2**25 - 1, 64) and called == ["vllm"]
    module.provider = "auto"
    module.forward_hip(x)
    assert called == ["vllm"]


@torch.no_grad()
def test_schemas_may_grow_defaults(peers, monkeypatch):
    peers(FOUR.replace("epsilon)", "epsilon, bool later=False)"))
    x, module = randn(2, 64, dtype=BF16), make(RMSNorm, 64)
    y, _ = module.forward_hip(x.clone(), x.clone())
    assert_right(y, x + x, module.weight)
    assert called == ["vllm"]


@pytest.mark.parametrize("mode", ["no weight", "each step rounded", "float32 x, 16-bit weight", "float32 residual"])
@pytest.mark.parametrize("provider", ["auto", "torch"])
@torch.no_grad()
def test_what_peers_compute_otherwise_is_never_theirs(peers, mode, provider):
    peers("aiter flag", "vllm 4")
    options = {"has_weight": mode != "no weight", "round_each_step": mode == "each step rounded"}
    module = RMSNorm(64, dtype=BF16, provider=provider, **options)
    if module.weight is not None:
        module.weight.copy_(randn(64, dtype=BF16, seed=2))
    x = randn(6, 64, dtype=F32 if "float32 x" in mode else BF16)
    residual = randn(6, 64, dtype=F32 if mode == "float32 residual" else x.dtype, seed=1)
    expected = reference.add_rms_norm(x, residual, module.weight, round_each_step=module.round_each_step)
    y, s = module.forward_hip(x.clone(), residual.clone())
    assert not called
    assert_same_bits(s, expected[1])
    assert_close_to(y, expected[0])
    if mode != "float32 residual":
        expected = reference.rms_norm(x, module.weight, round_each_step=module.round_each_step)
        assert_close_to(module.forward_hip(x), expected)
    assert not called


def assert_close_to(y: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for where a sum that was added in another order tips a rounding."""
    assert y.dtype == expected.dtype and reference.ulp_error(y, expected.double()) <= 4.0
