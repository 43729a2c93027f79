"""What keeps ``forward_hip`` from calling aiter or vLLM.

Either their result would not be that of docs/contract.md, or the installed version is not one that is known.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from fake_peers import AITER_WITH_FLAG, AITER_WITHOUT_FLAG, FOUR, SIX, VLLM_FOUR, Peer, Vllm, called, make, make_aiter
from gemma_norm import GemmaRMSNorm, RMSNorm, reference, routing
from support import assert_right, assert_same_bits, randn

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
pytestmark = pytest.mark.usefixtures("peers")


@dataclass(frozen=True)
class Objection:
    """A call that a peer is asked about, and what must be said against it."""

    why: str
    x: torch.dtype
    fatal: bool = False  # not even force makes the peer serve it
    weight: torch.dtype | None = None  # None: x's
    hidden: int = 64
    gemma: bool = False
    huge: bool = False  # x has 2^31 elements or more
    peer: dict[str, object] = field(default_factory=dict)  # the limits of routing.Peer; by default there is none

    def __str__(self) -> str:
        return self.why or f"none to {self.x}, hidden {self.hidden}"


ROWS_OF_8 = {"dtypes": (F16,), "multiple": 8}
HEEDS_GEMMA = ROWS_OF_8 | {"gemma_up_to": 128}
ROUNDED = "the float32 weight would be rounded to"
OBJECTIONS = [
    Objection("", BF16, hidden=63),
    Objection("no kernel for bfloat16", BF16, fatal=True, peer={"dtypes": (F16,)}),
    Objection("", F32, peer={"dtypes": (F16, F32), "multiple": 8}),
    Objection("writes beyond rows that are no multiple of 8 long", F16, fatal=True, hidden=68, peer=ROWS_OF_8),
    Objection("32-bit offsets, and x has 2^31 elements or more", F16, fatal=True, huge=True),
    Objection("no gemma_norm flag: 1 + weight would be rounded to float16", F16, gemma=True),
    Objection("", F32, gemma=True),
    Objection("", F16, hidden=128, gemma=True, peer=HEEDS_GEMMA),
    Objection(
        "no gemma_norm flag beyond hidden 128: 1 + weight would be rounded to float16",
        F16,
        hidden=136,
        gemma=True,
        peer=HEEDS_GEMMA,
    ),
    Objection(f"{ROUNDED} float16", F16, weight=F32, gemma=True, peer=HEEDS_GEMMA),
    Objection(f"{ROUNDED} bfloat16", BF16, weight=F32),
]


@pytest.mark.parametrize("case", OBJECTIONS, ids=str)
def test_objections_to_a_peer(case):
    peer = routing.Peer(None, None, **case.peer)
    got = peer.objection(case.x, case.weight or case.x, case.hidden, case.gemma, case.huge)
    assert got == (case.fatal, case.why)


UNKNOWN_AITER = [
    ("rmsnorm2d_fwd", lambda x, weight, epsilon: None),
    ("rmsnorm2d_fwd", lambda *args, **kwargs: None),  # a wrapper, but of no operator
    ("rmsnorm2d_fwd_with_add", lambda out, input, residual_in, weight, epsilon: None),
    ("rmsnorm2d_fwd_with_add", lambda out, x, residual_in, residual_out, weight, epsilon: None),
]
UNKNOWN_VLLM = [
    FOUR.replace("float epsilon", "float eps"),
    SIX.replace("Tensor weight", "Tensor w"),
    FOUR.replace("epsilon)", "epsilon, Tensor out)"),
]


def assert_passed_over(provider: str, message: str) -> None:
    """Plain PyTorch serves in place of the peer, which cannot be forced either."""
    x, module = randn(2, 64, dtype=BF16), make(RMSNorm, 64)
    assert_right(module.forward_hip(x), x, module.weight)
    module.provider = provider
    with pytest.raises(RuntimeError, match=f"cannot be had: {message}"):
        module.forward_hip(x)
    assert not called


@torch.no_grad()
@pytest.mark.parametrize("name, function", UNKNOWN_AITER)
def test_aiter_functions_with_unknown_parameters_are_not_called(peers, monkeypatch, caplog, name, function):
    peers(AITER_WITH_FLAG)
    monkeypatch.setattr(sys.modules["aiter"], name, function)
    assert_passed_over("aiter", "unknown parameters: ")
    assert "aiter: unknown parameters: " in caplog.text


@torch.no_grad()
@pytest.mark.parametrize("schema", UNKNOWN_VLLM)
def test_vllm_operators_with_unknown_schemas_are_not_called(peers, caplog, schema):
    peers(Vllm("an unknown vllm", schema))
    assert_passed_over("vllm", "unknown schemas: ")
    assert "vllm: unknown schemas: " in caplog.text


@torch.no_grad()
@pytest.mark.parametrize("name", ["rmsnorm", "rmsnorm2d_fwd_with_add"])
def test_a_flag_that_only_one_of_aiters_functions_takes_is_none(peers, monkeypatch, name):
    peers(AITER_WITH_FLAG)
    monkeypatch.setattr(sys.modules["aiter"], name, getattr(make_aiter(AITER_WITHOUT_FLAG), name))
    x, module = randn(2, 64, dtype=BF16), make(GemmaRMSNorm, 64)
    assert_right(module.forward_hip(x), x, module.weight, gemma=True)
    assert not called


@torch.no_grad()
def test_a_package_that_fails_to_import_is_passed_over(peers, monkeypatch, caplog, tmp_path):
    peers(VLLM_FOUR)
    (tmp_path / "aiter.py").write_text("raise RuntimeError('no GPU found')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "aiter")
    x, module = randn(2, 64, dtype=BF16), make(RMSNorm, 64)
    assert_right(module.forward_hip(x), x, module.weight)
    assert called == ["vllm"] and "aiter: RuntimeError: no GPU found" in caplog.text


@dataclass(frozen=True)
class RoundedWeight:
    """A peer that can serve a zero-centred norm only with a weight that was rounded, and what is said about it."""

    peer: Peer
    hidden: int
    weight_dtype: torch.dtype
    reason: str
    gemma: bool = False  # the peer adds the one itself, so that the weight alone is rounded

    def __str__(self) -> str:
        return f"{self.peer}, hidden {self.hidden}"

    def rounded(self, weight: Tensor) -> Tensor:
        """The weight that the peer is given."""
        return weight.to(BF16) if self.gemma else (1 + weight.float()).to(BF16)


ROUNDED_WEIGHTS = [
    RoundedWeight(AITER_WITHOUT_FLAG, 64, BF16, "no gemma_norm flag: 1 + weight"),
    RoundedWeight(AITER_WITH_FLAG, 8200, BF16, "no gemma_norm flag beyond hidden 8192: 1 + weight"),
    RoundedWeight(VLLM_FOUR, 64, F32, "no gemma_norm flag: 1 + weight"),
    RoundedWeight(AITER_WITH_FLAG, 64, F32, "the float32 weight", gemma=True),
]


@pytest.mark.parametrize("case", ROUNDED_WEIGHTS, ids=str)
@torch.no_grad()
def test_a_peer_that_needs_a_rounded_weight_is_used_only_by_force(peers, caplog, case):
    peers(case.peer)
    x, residual = randn(5, case.hidden, dtype=BF16), randn(5, case.hidden, dtype=BF16, seed=1)
    module = make(GemmaRMSNorm, case.hidden, case.weight_dtype)
    assert_right(module.forward_hip(x.clone(), residual.clone())[0], x + residual, module.weight, gemma=True)
    assert not called and f"{case.reason} would be rounded to bfloat16" in caplog.text
    module.provider = case.peer.name
    for _ in range(2):
        y, s = module.forward_hip(x.clone(), residual.clone())
        weight = case.rounded(module.weight)
        assert_same_bits(y, reference.rms_norm(s, weight, gemma=case.gemma))
        assert_same_bits(module.forward_hip(x), reference.rms_norm(x, weight, gemma=case.gemma))
        module.weight.mul_(-3)  # The next call must see the new weight, not a rounded copy that was kept.
    assert len(called) == 4
    said = f"{case.peer.name}: asked for, and breaks the contract: {case.reason} would be rounded to bfloat16"
    assert [r.levelname for r in caplog.records if r.message.endswith(f"forward_hip uses {said}")] == ["WARNING"]


@pytest.mark.parametrize("provider", ["auto", "aiter", "vllm", "torch"])
def test_no_peer_serves_while_gradients_are_recorded(peers, monkeypatch, caplog, provider):
    peers(AITER_WITH_FLAG, VLLM_FOUR)
    if provider == "auto":
        monkeypatch.setattr(routing, "PEERS", dict.fromkeys(routing.PEERS))  # To look for a peer would raise.
    module = make(RMSNorm, 64, F16, provider).requires_grad_()
    y, s = module.forward_hip(x := randn(3, 64, dtype=F16), x)
    y.float().sum().backward()
    assert s is not x and bool((module.weight.grad != 0).all()) and not called
    assert_same_bits(x, randn(3, 64, dtype=F16))
    used = "plain PyTorch: asked for" if provider == "torch" else "ours, for peers record no gradient"
    assert [(r.levelname, r.message) for r in caplog.records] == [("INFO", f"gemma_norm: forward_hip uses {used}")]


@torch.no_grad()
def test_rows_beyond_32_bit_offsets(peers, monkeypatch):
    """vLLM's kernels count in 32 bits. The tensors are on the meta device, so that they take no memory."""
    peers(VLLM_FOUR)
    module = RMSNorm(64, device="meta", dtype=BF16, provider="vllm")
    x = torch.empty(2**25, 64, device="meta", dtype=BF16)
    monkeypatch.setattr(reference, "rms_norm", lambda x, *others: x)
    with pytest.raises(RuntimeError, match="'vllm' was asked for and cannot be had: 32-bit offsets, and x has 2\\^31"):
        module.forward_hip(x)
    assert module.forward_hip(x[1:]).shape == (2**25 - 1, 64) and called == ["vllm"]
    module.provider = "auto"
    module.forward_hip(x)
    assert called == ["vllm"]


@dataclass(frozen=True)
class Unserved:
    """A call that no peer computes as the contract says."""

    what: str
    has_weight: bool = True
    round_each_step: bool = False
    x: torch.dtype = BF16  # the weight is bfloat16
    residual: torch.dtype = BF16

    def __str__(self) -> str:
        return self.what


UNSERVED = [
    Unserved("no weight", has_weight=False),
    Unserved("each step rounded", round_each_step=True),
    Unserved("float32 x, 16-bit weight", x=F32, residual=F32),
    Unserved("float32 residual", residual=F32),
]


@pytest.mark.parametrize("case", UNSERVED, ids=str)
@pytest.mark.parametrize("provider", ["auto", "torch"])
@torch.no_grad()
def test_no_peer_serves_what_it_computes_otherwise(peers, case, provider):
    peers(AITER_WITH_FLAG, VLLM_FOUR)
    module = RMSNorm(
        64, dtype=BF16, provider=provider, has_weight=case.has_weight, round_each_step=case.round_each_step
    )
    if module.weight is not None:
        module.weight.copy_(randn(64, dtype=BF16, seed=2))
    x, residual = randn(6, 64, dtype=case.x), randn(6, 64, dtype=case.residual, seed=1)
    expected = reference.add_rms_norm(x, residual, module.weight, round_each_step=case.round_each_step)
    y, s = module.forward_hip(x.clone(), residual.clone())
    assert not called
    assert_same_bits(s, expected[1])
    assert_close_to(y, expected[0])
    if case.residual == case.x:  # Without a residual, there is nothing unusual about the case of a float32 one.
        expected = reference.rms_norm(x, module.weight, round_each_step=case.round_each_step)
        assert_close_to(module.forward_hip(x), expected)
    assert not called


def assert_close_to(y: Tensor, expected: Tensor) -> None:
    """Equal, except where squares that were added in another order tip a rounding."""
    assert y.dtype == expected.dtype and reference.ulp_error(y, expected.double()) <= 4.0
