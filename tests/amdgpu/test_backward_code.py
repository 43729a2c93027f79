"""The machine code of the backward operators' kernels, as test_machine_code.py looks at that of the forward ones."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from assembly import SIZES, BackwardKernel, check
from toolchain import TARGETS, Target

LDS = 65536  # bytes of a compute unit
# How many bytes of x and dout a compute unit must be able to have in flight: what its share of memory's bandwidth and
# the latency ask for (docs/amd.md), by wave width.
IN_FLIGHT = {64: 14 * 1024, 32: 6 * 1024}
TYPES = [("PlainTerms", x, x) for x in ("float", "float16", "bfloat16")]
TYPES += [("PlainTerms", "float", "float16"), ("PlainTerms", "float", "bfloat16")]
TYPES += [("GatedTerms", x, x) for x in ("float", "float16", "bfloat16")]


def rows_kernels(code: list[BackwardKernel]) -> list[BackwardKernel]:
    """All but those that add up dweight."""
    return [k for k in code if not k.sums]


def items(k: BackwardKernel) -> int:
    """Elements of a vector."""
    return 16 // SIZES[k.x]


def is_short_of_registers(k: BackwardKernel, target: Target) -> bool:
    """Blocks of 512 threads leave a lane 192 registers on RDNA (128 where a SIMD has 1024), and on CDNA 256. That is
    too few for four 16-bit vectors each of x and dout, twice, and 32 sums: rows of 8193 to 16384 elements. (CDNA has
    enough without a gate.) With a gate, it is also too few for two such vectors, and for four of float32, on RDNA; so
    are 256 registers for single elements of two vectors. Where a SIMD has 1024, it is too few for four vectors of any
    kind, and 96 registers in blocks of 640 threads are too few for rows of 16-bit elements.
    """
    gated, half = k.terms == "GatedTerms", k.x != "float"
    if target.wave == 64:
        # clang 22 spills float32 with a gate as well, on gfx942. It does not on gfx950.
        newer = target.compiler == "zig, HIP 7" and target.arch != "gfx950"
        return k.vectors == 4 and gated and (half or newer)
    if target.registers == 1024 and (k.vectors == 4 or (k.threads == 640 and half)):
        return True
    return (k.vectors == 4 and (gated or half)) or (k.vectors == 2 and gated and half)


def test_every_instantiation_is_there(backward_code: list[BackwardKernel]) -> None:
    kinds = Counter((k.terms, k.x, k.dout, k.kernel, k.scope, k.aligned) for k in backward_code if k.terms)
    numbers = {("rows", "wave", True): 2, ("rows", "wave", False): 2, ("rows", "block", True): 6}
    numbers |= {("one row", "wave", True): 2, ("one row", "block", True): 5}
    for aligned in (True, False):
        numbers |= {("two passes", "two passes", aligned): 1, ("sum of rows", "block", aligned): 1}
    assert kinds == {(*types, *kind): number for types in TYPES for kind, number in numbers.items()}
    assert len({str(k) for k in backward_code}) == kinds.total() + 1, "the sum of chunks"


def test_aligned_rows_move_16_bytes_at_a_time(backward_code: list[BackwardKernel]) -> None:
    """The only single elements are sums: partial ones of two passes and of a wave, whose threads add up those of
    others, and dweight, of any dtype, where a wave's block has all rows; and the rstd of one row. dweight of 16 bits is
    stored in halves of vectors, since a vector of sums is one of float32.
    """

    def wrong(k: BackwardKernel) -> object:
        accesses = k.all("global_load|global_store")
        if not k.aligned:
            return [line for line in accesses if re.search(r"_(dwordx4|b128)", line)]
        # With a float32 x, dout and the weight may be half as wide.
        widths = r"_(dwordx[24]|b128|b64)" if k.x == "float" else r"_(dwordx4|b128)"
        single = Counter(
            re.sub(
                r"_(dword|b32)$",
                "",
                re.sub(r"_(short|b16).*", " 16", re.sub(r"_(dwordx2|b64)$", " 64", line.split()[0])),
            )
            for line in accesses
            if not re.search(widths, line)
        )
        if k.scope == "two passes":
            sums = {"global_load": items(k), "global_store": items(k)}
        elif k.scope == "wave":
            sums = {"global_store": 2, "global_store 16": 2}  # a partial sum, and dweight in each of its dtypes
        else:
            sums = {} if k.x == "float" else {"global_store 64": 2 * items(k) // 4 * k.vectors}
        if k.kernel == "one row":
            sums["global_store"] = sums.get("global_store", 0) + 1
        tensors = 3 if k.terms == "GatedTerms" else 2
        wide = len(accesses) - single.total()
        enough = wide >= k.vectors * k.rows * (tensors + tensors - 1)
        return (single != Counter(sums) and single) or (not enough and f"{wide} accesses")

    check(rows_kernels(backward_code), wrong)


def test_memory_is_accessed_as_global_and_without_atomics(backward_code: list[BackwardKernel]) -> None:
    """An access whose address space the compiler does not know is slower, and waits for LDS as well."""
    check(backward_code, lambda k: k.all(r"flat_|buffer_(?!\w*inv|gl|wbl2|load|store)|\w*atomic"))


def test_nothing_spills_or_is_called(backward_code: list[BackwardKernel], target: Target) -> None:
    """Scalar registers may spill to lanes of vector registers: this takes no memory, and happens once a row at most."""

    def wrong(k: BackwardKernel) -> object:
        if k.calls() or is_short_of_registers(k, target):
            return k.calls()
        return k.spills() or k.all("buffer_(load|store)")

    check(backward_code, wrong)


def bytes_in_flight(k: BackwardKernel, target: Target) -> int:
    """Of x and dout, that the blocks that a compute unit has room for load at once, a row ahead."""
    simds = 4 if target.wave == 64 or target.arch == "gfx1250" else 2
    waves = target.waves(k.numbers["vgpr_count"]) * simds
    blocks = min(waves * target.wave // k.threads, LDS // max(k.numbers["group_segment_fixed_size"], 1))
    return blocks * k.threads * k.vectors * k.rows * (16 + 16 * SIZES[k.dout] // SIZES[k.x])


def test_enough_bytes_are_in_flight(backward_code: list[BackwardKernel], target: Target) -> None:
    def wrong(k: BackwardKernel) -> object:
        flying = bytes_in_flight(k, target)
        return flying < IN_FLIGHT[target.wave] and f"{flying} bytes, {k.numbers['vgpr_count']} registers"

    check([k for k in backward_code if k.aligned and k.kernel == "rows"], wrong)


def test_the_sum_of_rows_asks_for_all_rows_before_it_waits(backward_code: list[BackwardKernel]) -> None:
    """Compilers may wait once among the loads, where they reuse a register."""

    def wrong(k: BackwardKernel) -> object:
        loads = k.before("global_load_(dwordx[24]|b128|b64)")
        wide = [line for line in loads if re.match("global_load_(dwordx[24]|b128|b64)", line)]
        waits = [line for line in loads if re.match(r"s_waitcnt .*vmcnt|s_wait_loadcnt", line)]
        tensors = 3 if k.terms == "GatedTerms" else 2
        return (len(waits) > 1 and waits) or (len(wide) + 1 != k.rows * tensors and f"{len(wide) + 1} loads")

    check([k for k in backward_code if k.kernel == "sum of rows" and k.aligned], wrong)


def test_lanes_exchange_in_registers(backward_code: list[BackwardKernel], target: Target) -> None:
    def wrong(k: BackwardKernel) -> object:
        steps = k.all(r"v_(add_f32|mov_b32|add_f32_e64)_dpp .*(quad_perm|mirror)")
        rows = k.all("v_readlane_b32") if target.wave == 64 else k.all("v_permlanex16_b32")
        return k.all(r"ds_\w*(permute|swizzle)") or ((len(steps) < 4 or not rows) and f"{len(steps)} steps")

    check([k for k in backward_code if k.kernel != "sum of rows"], wrong)


def test_reciprocal_root_is_correctly_rounded(backward_code: list[BackwardKernel]) -> None:
    """One for each row that a thread has at a time. See the test of the same name in test_machine_code.py."""

    def wrong(k: BackwardKernel) -> object:
        roots, refined, other = k.all("v_rsq_f32"), k.all(".*0x40000001"), k.all("v_sqrt_f32|v_div_")
        return other or (
            (len(roots), len(refined)) != (k.rows, k.rows) and f"{len(roots)} roots, {len(refined)} refined"
        )

    check(rows_kernels(backward_code), wrong)


def test_gpus_that_have_an_instruction_to_round_to_bfloat16_use_it(
    backward_code: list[BackwardKernel], target: Target
) -> None:
    def wrong(k: BackwardKernel) -> object:
        hardware, by_hand = k.all("v_cvt_pk_bf16_f32"), k.all("v_add3_u32 .*0x7fff")
        if target.rounds_to_bfloat16 and k.x == "bfloat16":
            return by_hand or (len(hardware) < items(k) // 2 * k.vectors and f"{len(hardware)} conversions")
        # Where a block has all rows, it rounds dweight, of any dtype.
        of_dweight = 1 if k.scope == "wave" else 0 if k.scope == "two passes" else items(k) // 2 * k.vectors
        return len(hardware) != (of_dweight if target.rounds_to_bfloat16 else 0) and hardware

    check(rows_kernels(backward_code), wrong)


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "gfx1250"], indirect=True)
def test_the_next_rows_are_not_waited_for_before_the_sums(backward_code: list[BackwardKernel], target: Target) -> None:
    """They are asked for at the start of a step, and are to arrive while it adds up the rows that the step has. The
    statistics' root comes after the sums. Left out are kernels that spill, and those with four vectors, which load the
    weights anew in each step; and gfx1250, as in test_loads_come_before_the_stores_of_sums.
    """

    def wrong(k: BackwardKernel) -> object:
        lines = k.code.splitlines()
        root = next(i for i, line in enumerate(lines) if line.startswith("v_rsq"))
        last_load = max(i for i, line in enumerate(lines[:root]) if line.startswith("global_load"))
        return [line for line in lines[last_load:root] if re.match(r"s_waitcnt .*vmcnt|s_wait_loadcnt", line)]

    held = [k for k in backward_code if k.aligned and k.kernel == "rows" and k.vectors < 4]
    assert len(held) >= 30
    check([k for k in held if not is_short_of_registers(k, target)], wrong)
