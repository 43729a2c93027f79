"""Goes on with test_fuzz.py's calls for some minutes, with others each time: make fuzz MINUTES=10.

After each thousand of them, one operator is called by way of torch.compile, which takes seconds a call.

Each call that fails, made as simple as hypothesis can, is printed and appended to fuzz_found.jsonl. test_fuzz.py makes
it again in every later run, so that line goes into the commit of the fix.
"""

from __future__ import annotations

import argparse
import collections
import sys
import time
import traceback
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

sys.path.append(str(Path(__file__).resolve().parents[1]))  # as tests/conftest.py does for pytest

import conftest  # noqa: F401  (what it sets in the environment, before torch is imported)
from fuzz_calls import FOUND, MODES, Call, calls
from fuzz_check import check


def one_round(
    number: int, end: float, ops: collections.Counter[str], kinds: collections.Counter[str], compiled: bool = False
) -> dict[str, tuple[str, Call]]:
    """Make the calls of one seed, count them, and return those that fail, by where they do."""
    failures: dict[str, tuple[str, Call]] = {}

    @seed(number)
    @given(call=calls(modes=("compile",) if compiled else MODES))
    @settings(
        max_examples=5 if compiled else 500,
        deadline=None,
        database=None,
        derandomize=False,
        phases=(Phase.generate,) if compiled else (Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    def check_one(call: Call) -> None:
        if time.monotonic() > end + (30 if failures else 0):
            return
        try:
            kinds[check(call)] += 1
            ops[call.op] += 1
        except (Exception, pytest.fail.Exception) as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {str(error)[:400]}"
            # The last of a kind is the simplest, since hypothesis ends with it.
            failures[f"{call.op} {frame.filename} {frame.lineno}"] = text, call
            raise

    try:
        check_one()
    except (Exception, pytest.fail.Exception):
        if not failures:
            raise
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("minutes", type=float, nargs="?", default=10)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32, help="of the first round")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    ops: collections.Counter[str] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    found: dict[str, Call] = {}
    number = arguments.seed
    print(f"seed {number}", flush=True)
    while time.monotonic() < end:
        for where, (text, call) in one_round(number, end, ops, kinds, compiled=number % 3 == 2).items():
            if where not in found:
                found[where] = call
                print(f"FOUND {call.op}: {text}\n      {call.to_json()}", flush=True)
        number += 1
    print(f"{sum(ops.values())} calls in {arguments.minutes:g} minutes")
    print("  " + ", ".join(f"{op} {count}" for op, count in sorted(ops.items())))
    print("  " + ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items())))
    if found:
        with FOUND.open("a") as file:
            file.writelines(call.to_json() + "\n" for call in found.values())
    print(f"{len(found)} failures" + (f", added to {FOUND}" if found else ""))
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
