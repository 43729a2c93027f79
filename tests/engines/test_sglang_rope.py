"""SGLang's real fused_qk_gemma_rmsnorm_rope_gate beside ours, on the CPU, in Triton's interpreter.

GEMMA_NORM_ENGINES=folder python -m pytest tests/engines/test_sglang_rope.py

In float16, for the interpreter cuts off what it should round to bfloat16.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import FOLDER

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
FILE = Path(FOLDER or "/nowhere") / "sglang/kernels/ops/attention/fused_qk_rmsnorm_rope_gate.py"
if not FILE.exists():
    pytest.skip("needs SGLang's unpacked wheel: tests/engines/README.md", allow_module_level=True)
pytest.importorskip("triton")

from gemma_norm import reference  # noqa: E402
from gemma_norm.integrations import _sglang_rope  # noqa: E402
from gemma_norm.integrations._engine import Engine  # noqa: E402

TOKENS, HEADS, KV_HEADS, HEAD_DIM, ROTARY = 40, 4, 2, 256, 64


@pytest.fixture(scope="module")
def theirs() -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location("fused_qk_rmsnorm_rope_gate", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    Engine("sglang", "", "").parameters(module, _sglang_rope.NAME, _sglang_rope._PARAMETERS)
    function: Callable[..., Any] = getattr(module, _sglang_rope.NAME)
    return function


@pytest.mark.parametrize("has_gate", [False, True])
@pytest.mark.parametrize("interleaved", [None, False, True], ids=["one position", "sections", "in turns"])
def test_the_results_are_sglangs_but_for_few_last_places(theirs, has_gate, interleaved):
    torch.manual_seed(0)
    sizes = [(1 + has_gate) * HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]
    q_gate, k, _ = torch.randn(TOKENS, sum(sizes)).half().split(sizes, dim=-1)
    weights = (torch.randn(2, HEAD_DIM) / 10).half().unbind()
    positions = torch.randint(0, 50, (TOKENS,) if interleaved is None else (3, TOKENS))
    axes = None if interleaved is None else reference.mrope_axes([11, 11, 10], interleaved)
    arguments = (q_gate, k, *weights, torch.randn(50, ROTARY), positions, 1e-6, HEADS, KV_HEADS, HEAD_DIM, ROTARY)
    calls = []

    def counted(*given: Any, **named: Any) -> Any:
        calls.append(given)
        return theirs(*given, **named)

    want = theirs(*arguments, has_gate=has_gate, mrope_axis_map=axes)
    got = _sglang_rope.ours(counted)(*arguments, has_gate=has_gate, mrope_axis_map=axes)
    assert not calls, "this call was left to SGLang"
    assert (got[2] is None) == (want[2] is None) == (not has_gate)
    for y, w in zip(got[: 2 + has_gate], want[: 2 + has_gate], strict=True):
        assert (y.shape, y.dtype, y.stride()) == (w.shape, w.dtype, w.stride())
        assert int((y != w).sum()) <= 1e-4 * y.numel()  # the root's last place, where it tips a rounding
        torch.testing.assert_close(y, w, rtol=2 * torch.finfo(y.dtype).eps, atol=1e-3)
    if has_gate:
        assert torch.equal(got[2], want[2])
