"""Every operator on whatever hypothesis can think of: shapes, strides, memory, dtypes, options, modes, and flaws.

``make fuzz MINUTES=10`` goes on for longer, with other calls each time. What it finds is a line of fuzz_found.jsonl,
which is tried here from then on. It alone compiles calls with torch.compile, which takes seconds each.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

import gemma_norm
from fuzz_calls import FOUND, OPERATORS, Call, calls
from fuzz_check import check
from fuzz_memory import Memory
from fuzz_oracle import norm
from support import bits, randn


def found() -> list[Call]:
    return [Call.from_json(line) for line in FOUND.read_text().splitlines()] if FOUND.exists() else []


@pytest.mark.parametrize("op", OPERATORS)
def test_any_call(op: str) -> None:
    @given(call=calls(op))
    @settings(max_examples=12)
    def each(call: Call) -> None:
        check(call)

    each()


@pytest.mark.parametrize("number", range(len(found())))
def test_what_was_found_before(number: int) -> None:
    check(found()[number])


@pytest.mark.parametrize("off", [-2, 2])
def test_a_result_that_is_two_units_off_is_noticed(dtype: torch.dtype, off: int) -> None:
    """Float32 arithmetic may make a float32 result wrong by a few units, and the bounds are that far apart."""
    x, weight = randn(3, 40, dtype=dtype), randn(40, dtype=dtype, seed=1)
    y = gemma_norm.rms_norm(x, weight)
    bound = norm(x, weight, {"eps": 1e-6}, dtype)
    bound.assert_holds(y)
    y[1, 7] = (bits(y[1, 7]) + off * (16 if dtype == torch.float32 else 1)).view(dtype)
    with pytest.raises(AssertionError, match=r"at \[1, 7\], not in"):
        bound.assert_holds(y)


def test_no_kind_of_call_is_rare() -> None:
    """Else test_any_call would pass for not doing anything."""
    kinds: dict[str, int] = {}

    @given(call=calls())
    @settings(max_examples=400)
    def draw(call: Call) -> None:
        kind = call.flaw[0] if call.flaw else "memory" if call.same_memory else "right"
        kinds[kind] = kinds.get(kind, 0) + 1

    draw()
    assert kinds["right"] > 160 and {"memory", "dtype", "shape", "option", "meta", "requires_grad"} <= set(kinds)


def test_a_call_is_the_same_after_it_was_saved() -> None:
    @given(call=calls())
    @settings(max_examples=30)
    def saved(call: Call) -> None:
        line = call.to_json()
        assert Call.from_json(line).to_json() == line
        for a, b in itertools.zip_longest(Memory(call).bases, Memory(Call.from_json(line)).bases):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))

    saved()


def test_the_command_starts():
    """It is no test itself, so pytest's paths are not there for it."""
    command = [sys.executable, str(Path(__file__).with_name("fuzz.py")), "0"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "0 calls in 0 minutes" in run.stdout, run.stdout + run.stderr
