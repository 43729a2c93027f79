"""What qk_norm_rope and its fused form refuse, and in which words."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, ones

import gemma_norm
from gemma_norm import _registry
from rope_support import Arguments, good, in_turn
from support import assert_same_bits, randn, warnings_are

OPS = torch.ops.gemma_norm
FUSED = OPS.fused_qk_norm_rope.default


def positions_of(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def cache(positions: Callable[[], Tensor] = lambda: positions_of(3), **more: Any) -> Callable[[], Arguments]:
    return lambda: {"cos": None, "sin": None, "cos_sin_cache": ones(5, 8), "positions": positions(), **more}


EVEN = "must have a last dimension that is even and from 2 to q's 16, got shape"
EITHER = "either cos and sin or cos_sin_cache and positions must be given, got"
SECTION = "mrope_section must be three sizes that add up to half of cos_sin_cache's last dimension, 4, got"
BAD: dict[str, tuple[str, Callable[[], Arguments]]] = {
    "q: one dimension": (
        "q must have at least two dimensions, heads and their elements, got shape [16]",
        lambda: {"q": ones(16)},
    ),
    "q: long": (
        "q must have a last dimension of 1 to 512, got shape [3, 4, 513]",
        lambda: {"q": ones(3, 4, 513)},
    ),
    "q: dtype": (
        "q must have dtype float32, float16 or bfloat16, got int64",
        lambda: {"q": ones(3, 4, 16, dtype=torch.int64)},
    ),
    "q: no head": ("q must have at least one head, got shape [3, 0, 16]", lambda: {"q": ones(3, 0, 16)}),
    "q: strided": (
        "q must have a contiguous last dimension (stride 1), got stride 2",
        lambda: {"q": ones(3, 4, 32)[..., ::2]},
    ),
    "q_weight: dtype": (
        "q_weight must have dtype float32, float16 or bfloat16, got float64",
        lambda: {"q_weight": ones(16).double()},
    ),
    "q_weight: shape": ("q_weight must have shape [16], got [8]", lambda: {"q_weight": ones(8)}),
    "k: tokens": (
        "k must have q's shape [3, 4, 16], but for the number of heads, got [2, 2, 16]",
        lambda: {"k": ones(2, 2, 16)},
    ),
    "k: head_dim": (
        "k must have q's shape [3, 4, 16], but for the number of heads, got [3, 2, 8]",
        lambda: {"k": ones(3, 2, 8)},
    ),
    "k: dtype": ("k must have q's dtype float32, got float16", lambda: {"k": ones(3, 2, 16).half()}),
    "k: no head": ("k must have at least one head, got shape [3, 0, 16]", lambda: {"k": ones(3, 0, 16)}),
    "k_weight: dtype": (
        "k_weight must have q_weight's dtype float32, got float16",
        lambda: {"k_weight": ones(16).half()},
    ),
    "one weight": (
        "q_weight and k_weight must both be given or both be None, got one of them",
        lambda: {"k_weight": None},
    ),
    "the other weight": (
        "q_weight and k_weight must both be given or both be None, got one of them",
        lambda: {"q_weight": None},
    ),
    "cos: tokens": ("cos must have shape [3, rotary], got [4, 8]", lambda: {"cos": ones(4, 8)}),
    "cos: heads": ("cos must have shape [3, rotary], got [3, 1, 8]", lambda: {"cos": ones(3, 1, 8)}),
    "cos: odd": (f"cos {EVEN} [3, 7]", lambda: {"cos": ones(3, 7)}),
    "cos: wide": (f"cos {EVEN} [3, 18]", lambda: {"cos": ones(3, 18)}),
    "cos: none": (f"cos {EVEN} [3, 0]", lambda: {"cos": ones(3, 0)}),
    "cos: dtype": ("cos must have dtype float32, got float16", lambda: {"cos": ones(3, 8).half()}),
    "sin: shape": ("sin must have cos's shape [3, 8], got [3, 6]", lambda: {"sin": ones(3, 6)}),
    "sin: dtype": (
        "sin must have cos's dtype float32, got float16",
        lambda: {"sin": ones(3, 8).half()},
    ),
    "no sin": (f"{EITHER} cos", lambda: {"sin": None}),
    "no angles": (f"{EITHER} none", lambda: {"cos": None, "sin": None}),
    "both": (f"{EITHER} cos and sin and cos_sin_cache", lambda: {"cos_sin_cache": ones(5, 8)}),
    "cache: shape": (
        "cos_sin_cache must have shape [positions, rotary], got [5, 1, 8]",
        cache(cos_sin_cache=ones(5, 1, 8)),
    ),
    "cache: empty": (
        "cos_sin_cache must have at least one row, got shape [0, 8]",
        cache(cos_sin_cache=ones(0, 8)),
    ),
    "cache: odd": (f"cos_sin_cache {EVEN} [5, 7]", cache(cos_sin_cache=ones(5, 7))),
    "positions: dtype": (
        "positions must have dtype int32 or int64, got float32",
        cache(lambda: ones(3)),
    ),
    "positions: shape": ("positions must have shape [3], got [4]", cache(lambda: positions_of(4))),
    "positions: no axes": (
        "positions must have shape [3, 3], got [3]",
        cache(mrope_section=[2, 1, 1]),
    ),
    "mrope_section: two": (
        f"{SECTION} [2, 2]",
        cache(lambda: positions_of(3, 3), mrope_section=[2, 2]),
    ),
    "mrope_section: sum": (
        f"{SECTION} [2, 2, 2]",
        cache(lambda: positions_of(3, 3), mrope_section=[2, 2, 2]),
    ),
    "mrope_section: negative": (
        f"{SECTION} [5, -1, 0]",
        cache(lambda: positions_of(3, 3), mrope_section=[5, -1, 0]),
    ),
    **{
        f"mrope_section: {sizes}": (
            f"{SECTION} {sizes}",
            cache(lambda: positions_of(3, 3), mrope_section=sizes),
        )
        for sizes in ([4, 1, -1], [4, -1, 1], [-1, 4, 1])
    },
    "mrope_section without positions": (
        "mrope_section must be None without positions, got [2, 1, 1]",
        lambda: {"mrope_section": [2, 1, 1]},
    ),
    "mrope_interleaved alone": (
        "mrope_interleaved must be False without mrope_section, got True",
        cache(mrope_interleaved=True),
    ),
    "eps": ("eps must be finite in float32 and at least 0, got -1", lambda: {"eps": -1.0}),
    "gemma without weights": (
        "gemma must be False without a weight, got True",
        lambda: {"q_weight": None, "k_weight": None, "gemma": True},
    ),
    "round_each_step alone": (
        "round_rotation must be True with round_each_step=True, got False",
        lambda: {"round_each_step": True},
    ),
}


def message(kernel: Callable[..., Any], arguments: Arguments) -> str:
    kept = {n: t.clone() for n, t in arguments.items() if isinstance(t, Tensor)}
    with pytest.raises(RuntimeError) as caught, warnings_are("ignore"):
        kernel(**arguments)
    if all(t.device.type != "meta" for t in kept.values()):
        assert all(torch.equal(t, arguments[n]) for n, t in kept.items()), "something was written"
    return str(caught.value).partition("\n")[0]


@pytest.mark.parametrize(("expected", "replace"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", ["qk_norm_rope", "fused_qk_norm_rope"])
def test_a_bad_argument_is_named_alike_by_every_implementation(device, name, expected, replace):
    native = getattr(OPS, name).default
    for kind, kernel in ((device, native), (device, _registry.OPERATORS[name].plain), ("meta", native)):
        arguments = good() | replace()
        arguments = {n: t.to(kind) if isinstance(t, Tensor) else t for n, t in arguments.items()}
        if kind == "cpu" or "stride 2" not in expected:  # a copy to another device is contiguous
            assert message(kernel, arguments) == f"{name}: {expected}"


def test_memory_that_must_not_overlap(device):
    qkv = randn(3, 6, 16, device=device)
    cases: list[tuple[str, Arguments]] = [
        (
            "k must not overlap q, which is also written, got overlapping memory",
            {"q": qkv[:, :4], "k": qkv[:, 3:5]},
        ),
        (
            "q is written and must not overlap itself, got a tensor with shared elements",
            {"q": qkv[:1, :4].expand(3, 4, 16)},
        ),
        (
            "q is written and must not overlap q_weight, got overlapping memory",
            {"q": qkv[:, :4], "q_weight": qkv[1, 2]},
        ),
        ("k is written and must not overlap cos, got overlapping memory", {"k": qkv[:, :2], "cos": qkv[:, 1, :8]}),
    ]
    for expected, replace in cases:
        arguments = {n: t.to(device) for n, t in good().items()} | replace
        for kernel in (FUSED, _registry.OPERATORS["fused_qk_norm_rope"].plain):
            assert message(kernel, arguments) == f"fused_qk_norm_rope: {expected}"
    view = qkv.clone()
    arguments = {n: t.to(device) for n, t in good().items()} | {"q": view[:, :4], "k": view[:, 4:]}
    want = gemma_norm.qk_norm_rope(**arguments)
    gemma_norm.fused_qk_norm_rope(**arguments)
    assert_same_bits(view[:, :4], want[0])
    assert_same_bits(view[:, 4:], want[1])


@pytest.mark.parametrize("name", ["q", "k", "q_weight", "k_weight", "cos", "sin"])
def test_gradients_are_not_lost_in_silence(name):
    arguments = good()
    arguments[name].requires_grad_()
    expected = f"fused_qk_norm_rope: {name} must not require grad while grad mode is enabled"
    assert message(FUSED, arguments).startswith(expected)
    with pytest.raises(RuntimeError, match="fused_qk_norm_rope: writing into an argument is not available"):
        torch.func.vmap(lambda q: gemma_norm.fused_qk_norm_rope(q, *in_turn(good())[1:]))(ones(2, 3, 4, 16))


def test_what_is_of_the_wrong_type_is_named():
    for replace, expected in (
        ({"q": None}, "q must be a tensor, got None"),
        ({"k": 1.0}, "k must be a tensor, got 1.0"),
        ({"positions": 3}, "positions must be a tensor, got 3"),
        ({"interleaved": "yes"}, "interleaved must be a bool, got 'yes'"),
        ({"mrope_section": 3}, "mrope_section must be a list of three integers or None, got 3"),
        ({"mrope_section": [2.0, 1, 1]}, "mrope_section must be a list of three integers or None, got [2.0, 1, 1]"),
        ({"mrope_section": [2**64, 1, 1]}, f"mrope_section must be an integer of at most 64 bits, got [{2**64}, 1, 1]"),
        (
            {"eps": torch.tensor(0.1, requires_grad=True)},
            "eps must be a plain number, since it has no derivative, got a tensor that requires grad",
        ),
        (
            cache(lambda: torch.ones(1, 1, 1, dtype=torch.int64).to_sparse())(),
            "positions must be a dense tensor, got layout torch.sparse_coo",
        ),
        ({"cos": torch.tensor(1.0), "sin": torch.tensor(1.0)}, "cos must have shape [3, rotary], got []"),
        (cache(lambda: positions_of(4), mrope_section=[2, 1, 1])(), "positions must have shape [3, 3], got [4]"),
    ):
        with pytest.raises(RuntimeError, match=f"^qk_norm_rope: {re.escape(expected)}$"):
            gemma_norm.qk_norm_rope(**good() | replace)


def test_an_eps_with_a_derivative_is_refused_by_all():
    eps = torch.tensor(0.1, requires_grad=True)
    for op, function in (
        ("qk_norm_rope", lambda: gemma_norm.qk_norm_rope(**good(), v=ones(3, 1, 16), eps=eps)),
        ("fused_qk_norm_rope", lambda: gemma_norm.fused_qk_norm_rope(**good(), eps=eps)),
    ):
        with pytest.raises(RuntimeError, match=f"{op}: eps must be a plain number, since it has no derivative"):
            function()


@pytest.mark.parametrize("name", ["q", "cos", "positions"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_tensors_are_named(name):
    """Those of the older kind, which have no sizes to ask for."""
    arguments = good() | (cache()() if name == "positions" else {})
    arguments[name] = torch.nested.nested_tensor([ones(2, 8), ones(3, 8)])
    with pytest.raises(RuntimeError, match=f"^qk_norm_rope: {name} must be a dense tensor, got a nested tensor"):
        gemma_norm.qk_norm_rope(**arguments)
