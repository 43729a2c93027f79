"""What make compare-amdgpu is made of, without an emulator, a compiler or the peers."""

from __future__ import annotations

import comparison_report
import composable_kernel
import oracle
import pytest
import torch
from published import FITTED, FROM_HOST, HELD_OUT, TIMINGS
from toolchain import TARGETS

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


DISPATCH = """
if(t.prec_i == "fp16" && t.prec_o == "fp16"){
    if (a.n <= 64) {
        if ((a.n % 8 == 0) && (t.fused_add == 0) && (t.fused_quant == 0) && (t.use_model_sensitive_rmsnorm == 0) )
            r=rmsnorm2d_fwd_<traits_<half, 64, 8, 0>>(s, a);
    }
}
else if(t.prec_i == "bf16" && t.prec_o == "bf16"){
    if (a.n <= 64) {
        if ((a.n % 8 == 0) && (t.fused_add == 0) && (t.fused_quant == 0) && (t.use_model_sensitive_rmsnorm == 0) )
            r=rmsnorm2d_fwd_<traits_<b, 64, 8, 0>>(s, a);
        else if ((a.n % 4 == 0) && (t.fused_add == 0) && (t.fused_quant == 0) && (t.use_model_sensitive_rmsnorm == 0) )
            r=rmsnorm2d_fwd_<traits_<b, 64, 4, 0>>(s, a);
        else if ((a.n % 4 == 0) && (t.fused_add == 1) && (t.fused_quant == 0) && (t.use_model_sensitive_rmsnorm == 0) )
            r=rmsnorm2d_fwd_<traits_<b, 64, 4, 1>>(s, a);
    }
    else  {
        if ((a.n % 8 == 0) && (t.fused_add == 0) && (t.fused_quant == 1) && (t.use_model_sensitive_rmsnorm == 0) )
            r=rmsnorm2d_fwd_<traits_<b, quantised>>(s, a);
        else if ((a.n % 8 == 0) && (t.fused_add == 0) && (t.fused_quant == 0) && (t.use_model_sensitive_rmsnorm == 0) )
            r=rmsnorm2d_fwd_<traits_<b, more, 8, 0>>(s, a);
    }
}
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


def test_measurements_are_of_gpus_that_the_model_has() -> None:
    names = {timing.gpu.name for timings in TIMINGS.values() for timing in timings}
    assert {m.gpu for m in FITTED + HELD_OUT + FROM_HOST} <= names and set(TIMINGS) <= set(TARGETS)
    assert {"MI250X", "MI300X", "MI325X", "MI308X", "MI355X", "RX 7900 XTX", "RX 9070 XT"} <= names
