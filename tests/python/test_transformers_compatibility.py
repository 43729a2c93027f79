"""What writes docs/compatibility.md: it judges families as they are, and says so where a promise is broken."""

from __future__ import annotations

import os
import time

import pytest

import tiny_models  # noqa: F401  skips without transformers
from gemma_norm.integrations import compatibility

GOOD = {
    "norms": 9, "kinds": ["rounds twice"], "left": [], "fused": 8, "rotated": 0, "fused_same": True, "state": True,
    "float32": 1e-7, "restored": True, "calls": [], "equal": 1.0, "ratio": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen3_5_text", "mamba2"])
def test_a_family(family):
    (found,) = [row for row in compatibility.families() if row[0] == family]
    row = compatibility.judge(found[1], found[2], family)
    assert compatibility.passes(row) and row["norms"] >= 9 and row["fused"] and not row["left"] and not row["calls"]


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"float32": 2e-5}, "**llama: float32 2e-05**"),
        ({"restored": False}, "**llama: restored False**"),
        ({"fused_same": False, "state": False}, "**llama: state False, fused_same False**"),
        ({"ratio": 1.2}, "**llama: error 1.2**"),
    ],
)
def test_a_broken_promise_shows(broken, said):
    assert compatibility.passes(GOOD) and not compatibility.passes({**GOOD, **broken})
    text = compatibility.table({"llama": {**GOOD, **broken}, "mistral": GOOD})
    assert f"| {said} |" in text and "| mistral |" in text and "**1 of 2 families" in text


def test_families_that_could_not_be_judged_are_named(monkeypatch):
    text = compatibility.table({"gpt2": {"norms": 0, "kinds": [], "left": []}, "odd": {"error": "ValueError: no"}})
    assert "(1): gpt2." in text and "- odd: ValueError: no" in text
    monkeypatch.setattr(compatibility, "judge", lambda *_: 1 / 0)
    assert compatibility.in_process("odd", None, None, 30)["error"].startswith("ZeroDivisionError")
    monkeypatch.setattr(compatibility, "judge", lambda *_: os._exit(1))
    assert compatibility.in_process("odd", None, None, 30)["error"] == "the process ended"
    monkeypatch.setattr(compatibility, "judge", lambda *_: time.sleep(60))
    assert compatibility.in_process("odd", None, None, 0.1)["error"] == "over 0.1 s"
