"""What make compare-amdgpu is made of, without an emulator, a compiler or the peers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import comparison_csv
import comparison_report
import composable_kernel
import oracle
import pytest
import torch
from published import FITTED, FROM_HOST, HELD_OUT, OLDER, TIMINGS
from timing import kernel_us
from toolchain import ROOT, TARGETS

from gemma_norm import reference

BF16 = torch.bfloat16


def test_errors_are_in_units_of_the_last_place() -> None:
    exact = torch.tensor([1.0, -1.0, 3.0]).double()
    got = torch.tensor([1 + 2**-7, -1 + 2**-8, 3.0]).to(BF16)
    assert oracle.ulps(got, exact).tolist() == [1.0, -0.5, 0.0]


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm", "gated_rms_norm"])
def test_the_oracle_rounded_once_is_within_half_a_unit_and_known_as_such(op: str) -> None:
    t = oracle.make(op, BF16, 4, 512)
    want = oracle.expected(op, t, gemma=True)
    once = want["out"].to(BF16)
    assert oracle.ulps(once, want["out"]).abs().max() <= 0.5
    assert oracle.rounding(once, t, gemma=True) == "once"


def test_what_rounds_otherwise_is_named() -> None:
    t = oracle.make("add_rms_norm", BF16, 4, 512)
    ways = oracle.ways(t, gemma=True)
    assert len(ways) == 6
    for name, result in ways.items():
        assert oracle.rounding(result, t, gemma=True) == name
    wrong = oracle.rounding(torch.zeros_like(t["x"]), t, gemma=True)
    assert wrong.endswith("‰ differ)")


@pytest.mark.parametrize("op", ["rms_norm_backward", "gated_rms_norm_backward"])
def test_expected_gradients_are_autograds(op: str) -> None:
    t = {name: value.double() for name, value in oracle.make(op, torch.float32, 4, 64).items()}
    leaves = {name: t[name].clone().requires_grad_() for name in ("x", "weight", "gate") if name in t}
    forward = op.removesuffix("_backward")
    normal = leaves["x"] * torch.rsqrt(leaves["x"].square().mean(-1, keepdim=True) + oracle.EPS)
    gemma = "gated" not in forward
    out = normal * (leaves["weight"] + gemma)
    if not gemma:
        out = out * torch.nn.functional.silu(leaves["gate"])
    out.backward(t["dout"])
    want = oracle.expected(op, t, gemma)
    assert set(want) == {f"d{name}" for name in leaves}
    for name, leaf in leaves.items():
        torch.testing.assert_close(want[f"d{name}"], leaf.grad)


@pytest.mark.parametrize("op", ["rms_norm_quant", "add_rms_norm_quant", "gated_rms_norm_quant"])
def test_the_reference_of_what_is_quantised_is_half_a_code_off_the_oracle_at_most(op: str) -> None:
    t = oracle.make(op, torch.float32, 4, 64)
    gemma = {} if "gated" in op else {"gemma": True}
    want = oracle.expected(op, t, gemma=bool(gemma))
    codes, scale = getattr(reference, op)(**t, eps=oracle.EPS, dtype=torch.int8, **gemma)[:2]
    torch.testing.assert_close(scale.double(), want["scale_out"], rtol=1e-6, atol=0)
    assert (codes.double() - want["out"]).abs().max() < 0.501 and want["out"].abs().max() == 127


def test_the_oracle_rotates_heads_as_the_reference() -> None:
    t = oracle.make("qk_norm_rope", torch.float32, 32, 64)
    names = {"x": "q", "weight": "q_weight"}
    heads = reference.qk_norm_rope(**{names.get(k, k): v for k, v in t.items()}, eps=oracle.EPS, gemma=True)
    for got, want in zip(heads, oracle.expected("qk_norm_rope", t, gemma=True).values(), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def choices(*instances: tuple[int, int, int, str]) -> str:
    """Conditions as aiter's generator writes them: the step of n, fused_add, fused_quant, and the type."""
    return "".join(
        f"{'else ' if i else ''}if ((a.n % {step} == 0) && (t.fused_add == {add}) && (t.fused_quant == {quant}) && "
        f"(t.use_model_sensitive_rmsnorm == 0) )\n    r=rmsnorm2d_fwd_<traits_<{name}>>(s, a);\n"
        for i, (step, add, quant, name) in enumerate(instances)
    )


# The dispatch that composable_kernel.source() has generated, in its form, with fewer instances.
DISPATCH = f"""
if(t.prec_i == "fp16" && t.prec_o == "fp16"){{
if (a.n <= 64) {{
{choices((8, 0, 0, "half, 64, 8, 0"))}}}
}}
else if(t.prec_i == "bf16" && t.prec_o == "bf16"){{
if (a.n <= 64) {{
{choices((8, 0, 0, "b, 64, 8, 0"), (4, 0, 0, "b, 64, 4, 0"), (4, 1, 0, "b, 64, 4, 1"))}}}
else  {{
{choices((8, 0, 1, "b, quantised"), (8, 0, 0, "b, more, 8, 0"))}}}
}}
"""


def test_the_instance_that_aiters_dispatch_picks() -> None:
    def picked(op: str, dtype: str, hidden: int) -> str:
        return composable_kernel.instance(DISPATCH, op, dtype, hidden)

    assert picked("rms_norm", "float16", 64) == "traits_<half, 64, 8, 0>"
    assert picked("rms_norm", "bfloat16", 64) == "traits_<b, 64, 8, 0>"
    assert picked("rms_norm", "bfloat16", 12) == "traits_<b, 64, 4, 0>"
    assert picked("add_rms_norm", "bfloat16", 64) == "traits_<b, 64, 4, 1>"
    assert picked("rms_norm", "bfloat16", 4096) == "traits_<b, more, 8, 0>"
    with pytest.raises(LookupError, match="no instance of add_rms_norm for bfloat16 and 4096"):
        picked("add_rms_norm", "bfloat16", 4096)


def result(**other) -> dict:
    wave = [["load", 16, [], 1024, 1024], ["wait", 0, [["vm", 0]], 0, 0], *[["vector", 0, [], 0, 0]] * 30]
    wave.append(["store", 16, [], 1024, 1024])
    counts = {"load 128": 1, "wait for load": 1, "vector": 30, "store 128": 1, "bytes loaded": 1024,
              "bytes stored": 1024}  # fmt: skip
    launch = {"kernel": "k", "threads": 64, "blocks": 4, "rows": 1, "registers": 40, "lds": 0, "isa": "cdna",
              "counts": counts, "waves": [wave]}  # fmt: skip
    return {"arch": "gfx942", "op": "rms_norm", "dtype": "bfloat16", "hidden": 512, "implementation": "ours",
            "errors": {"out": 0.5}, "rounds": "once", "launches": [launch], **other}  # fmt: skip


def test_tables() -> None:
    """A later result stands for an earlier one, one that failed is named, and times are no less than memory's."""
    (launch,) = result()["launches"]
    counts = {name: 4 * n for name, n in launch["counts"].items()}
    looping = launch | {"rows": 4, "counts": counts, "waves": [4 * launch["waves"][0]]}
    loops = result(implementation="aiter Triton", looping=[looping], loop_blocks="units")
    failed = {k: v for k, v in result(implementation="Liger", error="RuntimeError: no").items() if k != "launches"}
    text = comparison_report.report([result(errors={"out": 98765}), result(), failed, loops])
    assert "98765" not in text and "did not run: RuntimeError: no" in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("rms_norm bfloat16 512 | 32768")]
    assert len(rows) == len(TIMINGS["gfx942"])
    for row in rows:
        memory, *times = (float(n) for n in row[2:] if n)
        assert times and min(times) > memory


def test_few_rows_of_blocks_that_stay_are_those_that_were_traced() -> None:
    (launch,) = result()["launches"]
    loops = result(looping=[launch | {"rows": 4}], loop_blocks=132, exact={"1": [launch | {"blocks": 1}]})
    timing = TIMINGS["gfx942"][0]
    alone = kernel_us(comparison_report.kernel_of(launch, "gfx942"), timing, 1)
    assert comparison_report.predicted_us(loops, timing, 1) == alone < comparison_report.predicted_us(loops, timing, 2)


def test_csv_has_facts_and_a_line_for_each_number_of_rows(tmp_path: Path) -> None:
    failed = {k: v for k, v in result(implementation="Liger", error="RuntimeError: no").items() if k != "launches"}
    comparison_csv.write(tmp_path, [result(), failed], ["liger-kernel==0.8.5"])
    lines = {name: (tmp_path / f"amd-model-{name}.csv").read_text().splitlines() for name in ("times", "counts")}
    for text in lines.values():
        assert text[0].startswith("# date: ") and "# peers: liger-kernel==0.8.5" in text
    times, counts = ([line for line in text if not line.startswith("#")] for text in lines.values())
    assert len(times) == 1 + len(TIMINGS["gfx942"]) * len(comparison_report.ROWS)
    assert counts[1].startswith("gfx942,rms_norm,bfloat16,512,ours,out 0.5,once,64,40,30,")
    assert counts[2] == "gfx942,rms_norm,bfloat16,512,Liger,did not run: RuntimeError: no"


@pytest.mark.parametrize("gemma", [False, True])
def test_a_norm_before_the_addition_is_rounded_as_a_call_of_its_own(gemma: bool) -> None:
    t = oracle.make("rms_norm_add_rms_norm", BF16, 4, 512)
    inner = oracle.expected("rms_norm", {"x": t["x"], "weight": t["post_weight"]}, gemma)["out"].to(BF16)
    outer = oracle.expected("add_rms_norm", {"x": inner, "residual": t["residual"], "weight": t["weight"]}, gemma)
    both = oracle.expected("rms_norm_add_rms_norm", t, gemma)
    assert both.keys() == outer.keys() and all(torch.equal(both[name], outer[name]) for name in both)


def test_measurements_are_of_gpus_that_the_model_has() -> None:
    names = {timing.gpu.name for timings in TIMINGS.values() for timing in timings}
    assert {m.gpu for m in FITTED + HELD_OUT + OLDER + FROM_HOST} <= names and set(TIMINGS) <= set(TARGETS)
    assert {"MI250X", "MI300X", "MI325X", "MI308X", "MI355X", "RX 7900 XTX", "RX 9070 XT"} <= names


def test_it_starts_outside_pytest():
    """pytest puts folders on sys.path, and a program has only its own."""
    command = [sys.executable, ROOT / "tests/amdgpu/compare.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert done.returncode == 0 and "--targets" in done.stdout, done.stderr
