"""SGLang's fused_qk_gemma_rmsnorm_rope_gate, served by gemma_norm, on a stand-in for SGLang."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import engine_rope_support as engine
from engine_rope_support import HEAD_DIM, HEADS, ROTARY
from gemma_norm import reference
from gemma_norm.integrations import sglang as integration
from sglang_stand_in import install_sglang
from stand_ins import THEIRS
from support import assert_same_bits, randn

NAME = "fused_qk_gemma_rmsnorm_rope_gate"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ModuleType]]:
    """That of the function's definition, and that of a model which has imported it."""
    install_sglang(monkeypatch)
    with torch.no_grad():
        names = ("kernels.ops.attention.fused_qk_rmsnorm_rope_gate", "srt.models.qwen3_5")
        yield [sys.modules[f"sglang.{name}"] for name in names]
    integration.uninstall()


def arguments(
    dtype: torch.dtype, has_gate: bool = True, positions: torch.dtype = torch.int64, **others: Any
) -> dict[str, Any]:
    """The cache is in float32."""
    return engine.arguments(dtype, torch.float32, has_gate, positions) | {"has_gate": has_gate} | others


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("has_gate", [True, False])
def test_it_is_ours(modules, dtype, index, has_gate):
    integration.install()
    a = arguments(dtype, has_gate, index)
    want = engine.definition(a, gemma=True)
    for module in modules:
        got = getattr(module, NAME)(**a)
        assert [t.shape for t in got[:2]] == [(7, 4 * HEAD_DIM), (7, 2 * HEAD_DIM)]
        assert got[2] is None if not has_gate else got[2].shape == (7, 4, HEAD_DIM) and got[2].is_contiguous()
        for y, w in zip(got[: 2 + has_gate], want, strict=False):
            assert_same_bits(y, w)


@pytest.mark.parametrize(("sizes", "interleaved"), [([4, 4, 4], True), ([6, 3, 3], True), ([3, 4, 5], False)])
def test_three_positions_by_sglangs_axis_map(modules, sizes, interleaved):
    integration.install()
    positions = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(0))
    axis_map = reference.mrope_axes(sizes, interleaved)
    a = arguments(torch.bfloat16, positions=torch.int64) | {"positions": positions}
    want = engine.definition(a, gemma=True, mrope_section=sizes, mrope_interleaved=interleaved)
    for _ in range(2):  # the second finds what the first has read
        for y, w in zip(getattr(modules[1], NAME)(**a, mrope_axis_map=axis_map), want, strict=True):
            assert_same_bits(y, w)


def test_what_is_not_ours_is_sglangs(modules):
    integration.install()
    half = torch.bfloat16
    other_map = {"mrope_axis_map": torch.tensor([2, 1, 0] * 4), "positions": torch.zeros(3, 7, dtype=torch.int64)}
    for a in (
        arguments(torch.float32),
        arguments(half, cos_sin_cache=randn(11, ROTARY, dtype=half)),
        arguments(half, q_weight=randn(HEAD_DIM)),
        arguments(half, q_gate=randn(7, 4 * HEADS[0] * HEAD_DIM, dtype=half)[:, ::2]),
        arguments(half, positions=torch.int16),
        arguments(half, rotary_dim=16),
        arguments(half) | other_map,
        {n: t.to("meta") if isinstance(t, Tensor) else t for n, t in arguments(half).items()},
    ):
        assert getattr(modules[1], NAME)(**a) is THEIRS


def test_uninstall_gives_every_module_its_own_back(modules):
    engine.assert_every_module_gets_its_own_back(integration, modules, NAME)


def test_an_sglang_without_it(modules, monkeypatch):
    engine.assert_nothing_is_replaced_without_it(integration, modules, NAME, monkeypatch)


def test_other_parameters_are_an_error_and_nothing_is_changed(modules, monkeypatch):
    engine.assert_other_parameters_are_an_error(integration, modules, NAME, monkeypatch)
    assert "forward_plugin" not in vars(sys.modules["sglang.srt.layers.layernorm"].GemmaRMSNorm)
