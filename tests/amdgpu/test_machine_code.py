"""The assembly and metadata that compilers make of every kernel for AMD GPUs. No GPU is needed.

WAVES says how many waves a SIMD must hold: enough to keep memory busy several times over (docs/amd.md).
"""

from __future__ import annotations

import itertools
import re

import pytest
from assembly import AnyKernel, Kernel, check
from toolchain import TARGETS, Target

# How many waves a SIMD must hold at least: by its registers, by whether rows are aligned, since single elements take
# more registers, and by the vectors that a thread holds.
WAVES = {
    512: {True: {1: 8, 2: 8, 4: 5, 8: 4}, False: {1: 8, 2: 5, 4: 3}},
    1536: {True: {1: 16, 2: 16, 4: 16, 8: 10}, False: {1: 16, 2: 16, 4: 10}},
    1024: {True: {1: 16, 2: 16, 4: 10, 8: 8}, False: {1: 16, 2: 10, 4: 7}},
}
# The same for the gated norm's kernels, which compute activations and hold gates beside the row.
GATED_WAVES = {
    512: {True: {1: 6, 2: 5, 4: 4, 8: 3}, False: {1: 5, 2: 4, 4: 3}},
    1536: {True: {1: 16, 2: 12, 4: 12, 8: 9}, False: {1: 12, 2: 12, 4: 9}},
    1024: {True: {1: 9, 2: 9, 4: 7, 8: 6}, False: {1: 8, 2: 7, 4: 5}},
}
# The same for kernels in which x has a norm of its own: a thread holds two rows, and weights of two norms.
TWO_NORMS_WAVES = {
    512: {True: {1: 8, 2: 7, 4: 4, 8: 3}, False: {1: 8, 2: 5}},
    1536: {True: {1: 16, 2: 16, 4: 12, 8: 12}, False: {1: 16, 2: 16}},
    1024: {True: {1: 16, 2: 12, 4: 9, 8: 7}, False: {1: 12, 2: 9}},
}
NON_TEMPORAL = {"gfx90a": " glc slc", "gfx94": " nt", "gfx95": " nt", "gfx11": " slc dlc", "gfx12": "th:TH_"}
LOAD, STORE = r"(global|flat|buffer)_load", r"(global|flat|buffer)_store"


def variants() -> set[tuple[str, str, str, bool]]:
    """Form, x, weight and round_each_step of every kernel."""
    halves = ["float16", "bfloat16"]
    weights = {"float": ["float", *halves], "float16": ["float16", "float"], "bfloat16": ["bfloat16", "float"]}
    found = set()
    forms = ("RmsNorm", "AddRmsNorm", "AddToFloat32RmsNorm", "GatedRmsNorm", "GatedInputRmsNorm", "RmsNormAddRmsNorm")
    for form in forms:
        for x in halves if form == "AddToFloat32RmsNorm" else weights:
            found |= {(form, x, weight, False) for weight in weights[x]}
            found |= {(form, x, x, True)} if x in halves else set()
            found |= {(form, x, "NoWeight", False)} if form in forms[:3] else set()
    return found


def test_every_instantiation_is_there(code: list[Kernel]) -> None:
    there = {(k.form, k.x, k.weight, k.round_each_step, k.scope, k.aligned) for k in code}
    expected = itertools.product(variants(), ["wave", "block", "two passes"], [False, True])
    assert there == {(*v, scope, aligned) for v, scope, aligned in expected if aligned or scope != "block"}
    assert len({str(k) for k in code}) == len(code)


def test_aligned_rows_move_16_bytes_at_a_time(code: list[Kernel]) -> None:
    def wrong(k: Kernel) -> object:
        accesses = k.all(r"global_|flat_|buffer_")
        if any(line.startswith(("flat_", "buffer_")) for line in accesses if "_inv" not in line):
            return "not through global instructions"
        if not k.aligned:
            return [line for line in accesses if re.search(r"_(dwordx4|b128)", line)]
        loads, stores = k.all("global_load"), k.all("global_store")
        widths = r"_(dwordx[24]|b128|b64)" if k.narrow_accesses else r"_(dwordx4|b128)"
        narrow = [line for line in loads + stores if not re.search(widths, line)]
        least_loads = k.vectors * (1 + k.add + k.gated + k.norms * k.weight_vectors)
        least_stores = k.vectors * (1 + k.add)
        enough = len(loads) >= least_loads and len(stores) >= least_stores
        return narrow or (not enough and f"{len(loads)} loads, {len(stores)} stores")

    check(code, wrong)


def test_what_is_touched_once_is_not_kept_in_caches(code: list[Kernel], target: Target) -> None:
    (mark,) = (m for family, m in NON_TEMPORAL.items() if target.arch.startswith(family))

    def marked(line: str) -> bool:
        return mark in line

    def wrong(k: Kernel) -> object:
        if not k.aligned:
            return None
        streamed = [line for line in k.all("global_load") if marked(line)]
        weights = [line for line in k.all("global_load") if not marked(line)]
        kept = [line for line in k.all("global_store") if not marked(line)]
        if target.compiler == "hipcc" and not streamed:
            return kept  # clang 15 loses the mark of loads where the code chooses between two paths.
        if k.weight_vectors and not weights:
            return "no weight is kept"
        return kept or (len(streamed) < k.vectors and "x is kept")

    check(code, wrong)


def test_lanes_exchange_in_registers(code: list[Kernel], target: Target) -> None:
    def wrong(k: Kernel) -> object:
        through_lds = k.all(r"ds_\w*(permute|swizzle)")
        steps = sum(
            "quad_perm" in line or "mirror" in line for line in k.all(r"v_add_f32_dpp|v_mov_b32_dpp|v_add_f32_e64_dpp")
        )
        rows = k.all("v_readlane_b32") if target.wave == 64 else k.all("v_permlanex16_b32")
        if through_lds or steps < 4 or not rows:
            return through_lds or f"{steps} steps inside rows, {len(rows)} between rows"
        lds = k.all("ds_")
        return lds if k.scope == "wave" else not k.all("ds_(write|store)_b32") and "no partial sum is stored"

    check(code, wrong)


def waits_for_stores(lines: list[str]) -> list[str]:
    """The waits that end only when a store is done, although no load that follows the store is waited for.

    CDNA counts loads and stores in one counter, in order. A wait for all but the n latest waits for the one before
    those. RDNA has a counter of its own for stores, for which nothing needs to wait before a kernel's end.
    """
    pending: list[str] = []
    waits = []
    for line in lines:
        if not line.startswith(("global_", "flat_", "buffer_", "s_wait")):
            continue  # Most lines are something else.
        if matched := re.match(f"{LOAD}|{STORE}", line):
            pending.append("store" if "_store" in matched[0] else "load")
        elif re.match("s_waitcnt_vscnt|s_wait_storecnt|s_wait_loadcnt_storecnt", line) and "store" in pending:
            waits.append(line)
        elif matched := re.match(r"s_waitcnt .*vmcnt\((\d+)\)", line):
            left = int(matched[1])
            if pending[: len(pending) - left][-1:] == ["store"]:
                waits.append(line)
            pending = pending[max(0, len(pending) - left) :]
    return waits


def test_no_wait_for_stores_is_overlooked() -> None:
    store, load = "global_store_dwordx4 v0, v[2:5], s[0:1] nt", "global_load_dwordx4 v[2:5], v[0:1], off"
    for wait in [
        "s_waitcnt vmcnt(0)",
        "s_waitcnt vmcnt(0) lgkmcnt(0)",
        "s_waitcnt_vscnt null, 0x0",
        "s_wait_storecnt 0x0",
        "s_wait_storecnt_dscnt 0x0",
    ]:
        assert waits_for_stores([load, store, wait]) == [wait]
        assert waits_for_stores([load, wait]) == waits_for_stores([load, store, "s_waitcnt lgkmcnt(0)"]) == []
    assert waits_for_stores([load, load, store, "s_waitcnt vmcnt(1)"]) == []
    assert waits_for_stores([load, store, store, "s_waitcnt vmcnt(1)"]) == ["s_waitcnt vmcnt(1)"]
    assert waits_for_stores([store, load, "s_waitcnt vmcnt(0)"]) == []


def is_short_of_registers(k: Kernel, target: Target) -> bool:
    """Rows beyond 32768 elements of 16 bits, which no model has, take blocks of 1024 threads. On some GPUs these have
    64 registers each: too few for eight vectors of s and either gates or a second rounding.
    """
    return target.arch in ("gfx1102", "gfx1150") and k.threads == 1024 and (k.gated or k.round_each_step)


def test_no_kernel_waits_for_the_sums_that_it_stores(code: list[Kernel], target: Target) -> None:
    """It does not wait for them before the root, that is, while it adds squares and exchanges the sums of a block.
    csrc/device/hip.h says how.
    """
    assert sum(k.add and "store" in " ".join(k.before("v_rsq")) for k in code) == sum(k.add for k in code)
    check(code, lambda k: not is_short_of_registers(k, target) and waits_for_stores(k.before("v_rsq")))


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "gfx1250"], indirect=True)
def test_loads_come_before_the_stores_of_sums(code: list[Kernel]) -> None:
    """Kernels that hold x, residual and weight at once load all of them before they store a sum: a load behind a store
    would arrive only after the store.

    gfx1250 is left out. It counts stores apart from loads, and would need 50 registers more.
    """
    whole = [k for k in code if k.add and k.aligned and k.scope != "two passes" and k.threads < 1024]
    early = [k for k in whole if k.vectors == 2 or not k.wide_weight]

    def wrong(k: Kernel) -> object:
        lines = k.before("v_rsq")
        first = next(i for i, line in enumerate(lines) if re.match(STORE, line))
        return [line for line in lines[first:] if re.match(LOAD, line)]

    assert len(early) >= 25
    check(early, wrong)


@pytest.mark.parametrize("target", [t for t in TARGETS if TARGETS[t].wave == 64], indirect=True)
def test_arguments_arrive_together(code: list[Kernel]) -> None:
    """Before the first load of a row, a kernel waits once for its arguments: none is loaded behind that wait. Compilers
    for RDNA still wait twice in some kernels.
    """

    def wrong(k: Kernel) -> object:
        lines = k.code.splitlines()
        first_load = next(i for i, line in enumerate(lines) if line.startswith("global_load"))
        first_wait = next(i for i, line in enumerate(lines) if re.match(r"s_waitcnt .*lgkmcnt", line))
        return [line for line in lines[first_wait:first_load] if line.startswith("s_load")]

    check([k for k in code if k.aligned and k.scope != "two passes"], wrong)


def test_nothing_spills_or_is_called(code: list[Kernel], target: Target) -> None:
    def wrong(k: Kernel) -> object:
        if k.calls() or is_short_of_registers(k, target):
            return k.calls()
        return k.spills() or (k.numbers.get("sgpr_spill_count") and "scalar registers spill")

    check(code, wrong)


def test_enough_waves_fit(code: list[Kernel], target: Target) -> None:
    def wrong(k: Kernel) -> object:
        registers = k.numbers["vgpr_count"]
        table = GATED_WAVES if k.gated else TWO_NORMS_WAVES if k.norms == 2 else WAVES
        planned = table[target.registers][k.aligned][k.vectors]
        return (
            target.waves(registers) < planned
            and f"{registers} registers: {target.waves(registers)} waves, not {planned}"
        )

    check(code, wrong)


def test_gpus_that_have_an_instruction_to_round_to_bfloat16_use_it(code: list[Kernel], target: Target) -> None:
    def wrong(k: Kernel) -> object:
        hardware, by_hand = k.all("v_cvt_pk_bf16_f32"), k.all("v_add3_u32 .*0x7fff")
        if target.rounds_to_bfloat16 and k.x == "bfloat16":
            return by_hand or (len(hardware) < k.items // 2 * k.vectors and f"{len(hardware)} conversions")
        return hardware

    check(code, wrong)


@pytest.mark.parametrize("target", [t for t in TARGETS if TARGETS[t].wave == 64], indirect=True)
def test_cdna_computes_pairs(code: list[Kernel], target: Target) -> None:
    halves = [k for k in code if k.aligned and k.x != "float"]
    squares = [k for k in halves if k.s != "float"]
    check(squares, lambda k: len(k.all("v_pk_fma_f32")) < 4 * k.vectors and "squares are computed one by one")
    outputs = [k for k in squares if k.x == "bfloat16" and not k.gated]

    def products(k: Kernel) -> int:
        """Multiplications for each output, by rstd and by the weight. Where the first is rounded, it is not counted."""
        return 2 if k.weight_vectors and not k.round_each_step else 1

    check(
        outputs,
        lambda k: len(k.all("v_pk_mul_f32")) < 4 * products(k) * k.vectors and "outputs are computed one by one",
    )
    # hipcc's clang 15 finds fewer pairs in so much code.
    gated = [k for k in halves if k.form == "GatedInputRmsNorm" and target.compiler != "hipcc"]
    check(gated, lambda k: len(k.all("v_pk_fma_f32")) < 12 * 2 * k.vectors and "activations are computed one by one")


def test_reciprocal_root_is_correctly_rounded(code: list[Kernel]) -> None:
    """The hardware's root is good to one unit in the last place, so that it must be refined as in
    csrc/device/reciprocal_root.h. The refinement is known by its factor of 2.
    """

    def wrong(k: Kernel) -> object:
        roots, refined, other = k.all("v_rsq_f32"), k.all(".*0x40000001"), k.all("v_sqrt_f32|v_div_")
        each = (k.norms, k.norms)
        return other or ((len(roots), len(refined)) != each and f"{len(roots)} roots, {len(refined)} refined")

    check(code, wrong)


def test_no_instruction_makes_plus_zero_of_minus_zero(all_code: list[AnyKernel]) -> None:
    """The instruction that multiplies and rounds to float16 also adds. If it adds +0, -0 becomes +0."""
    check(all_code, lambda k: k.all(r"v_(fma|mad)_mix(lo|hi)_f16 .*, 0\b"))


def test_subnormals_are_kept(all_code: list[AnyKernel]) -> None:
    check(
        all_code,
        lambda k: {k.numbers["float_denorm_mode_32"], k.numbers["float_denorm_mode_16_64"]} != {3} and "flushed",
    )


def test_waves_are_as_wide_as_planned(all_code: list[AnyKernel], target: Target) -> None:
    check(all_code, lambda k: k.numbers["wavefront_size"] != target.wave and k.numbers["wavefront_size"])
