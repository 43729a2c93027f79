"""Traces and the timing model, on traces written by hand: no emulator, compiler or GPU needed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from model import Gpu
from timing import Kernel, Timing, kernel_us, looping_us, unit_ns
from wave_trace import Event, Op, count, decode, waited_for

# One wave of a block: a load, a wait for it, arithmetic, a store.
LOAD, STORE = Event(Op("load", 16), 1024, 1024), Event(Op("store", 16), 1024, 1024)
WAIT = Event(Op("wait", 0, (("vm", 0),)))
VECTOR, BARRIER = Event(Op("vector")), Event(Op("barrier"))
NORM = [LOAD, WAIT, *[VECTOR] * 10, STORE]

GPU = Gpu("a GPU", 10, 4, 2.0, 1.0, 4, 16)  # 10 units of 4 SIMDs at 2 GHz, 1000 bytes a nanosecond
TIMING = Timing(GPU, reached=0.5, load_ns=500, launch_us=1, alone_us=0.5, store_ns=300)


def kernel(*waves: list[Event], waves_a_simd: int = 8, lds: int = 0) -> Kernel:
    return Kernel("cdna", waves, waves_a_simd, lds)


@pytest.mark.parametrize(
    "name, simm, isa, op",
    [
        ("GLOBAL_LOAD_DWORDX4", 0, "cdna", Op("load", 16)),
        ("BUFFER_LOAD_USHORT", 0, "cdna", Op("load", 2)),
        ("BUFFER_STORE_SHORT_D16_HI", 0, "cdna", Op("store", 2)),
        ("GLOBAL_STORE_B128", 0, "rdna3", Op("store", 16)),
        ("GLOBAL_LOAD_D16_HI_B16", 0, "rdna3", Op("load", 2)),
        ("S_LOAD_B256", 0, "rdna4", Op("scalar load", 32)),
        ("DS_READ2_B32", 0, "cdna", Op("lds", 8)),
        ("DS_BPERMUTE_B32", 0, "cdna", Op("lds", 4)),
        ("V_PK_FMA_F32", 0, "cdna", Op("packed")),
        ("V_DUAL_MUL_F32", 0, "rdna3", Op("packed")),
        ("V_RSQ_F32_E32", 0, "cdna", Op("transcendental")),
        ("V_FREXP_EXP_I32_F32_E32", 0, "cdna", Op("vector")),
        ("S_WAITCNT", 0x0F70, "cdna", Op("wait", 0, (("vm", 0),))),  # vmcnt(0)
        ("S_WAITCNT", 0xC07F, "cdna", Op("wait", 0, (("lgkm", 0),))),  # lgkmcnt(0)
        ("S_WAITCNT", 0x4F72, "cdna", Op("wait", 0, (("vm", 18),))),  # vmcnt(18)
        ("S_WAITCNT", 0xFC07, "rdna3", Op("wait", 0, (("lgkm", 0),))),
        ("S_WAITCNT_VSCNT", 0, "rdna3", Op("wait", 0, (("vs", 0),))),
        ("S_WAIT_LOADCNT", 1, "rdna4", Op("wait", 0, (("load", 1),))),
        ("S_WAIT_LOADCNT_DSCNT", 0x0200, "rdna4", Op("wait", 0, (("load", 2), ("ds", 0)))),
        ("S_WAIT_ALU", 0, "rdna4", Op("idle")),
        ("S_BARRIER_SIGNAL", 0, "rdna4", Op("idle")),
        ("S_BARRIER_WAIT", 0, "rdna4", Op("barrier")),
        ("S_ADD_U32", 0, "cdna", Op("scalar")),
    ],
)
def test_instructions_are_known_by_name(name: str, simm: int, isa: str, op: Op) -> None:
    assert decode(name, simm, isa) == op


def test_a_wait_for_a_load_is_one_for_the_stores_before_it_on_cdna_alone() -> None:
    events = [STORE, LOAD, WAIT, WAIT]
    assert waited_for(events, "cdna") == ["load", "nothing"]
    assert waited_for([LOAD, STORE, WAIT], "cdna") == ["load"]
    assert waited_for([STORE, WAIT], "cdna") == ["store"]
    assert waited_for([STORE, WAIT], "rdna3") == ["nothing"]
    one_left = Event(Op("wait", 0, (("vm", 1),)))
    assert waited_for([LOAD, STORE, one_left, WAIT], "cdna") == ["load", "store"]


def test_counts_are_of_all_waves() -> None:
    again = Event(Op("load", 16), 1024, 0)
    counts = count([NORM, [again, *NORM]], "cdna")
    assert counts == {"load 128": 3, "bytes loaded": 2048, "bytes loaded again": 1024, "vector": 20, "store 128": 2,
                      "bytes stored": 2048, "wait for load": 2, "instructions": 27}  # fmt: skip


def test_one_block_takes_its_latency() -> None:
    """The store is waited for by the kernel's end. Moving the bytes and computing come on top of the latency."""
    time = unit_ns(kernel(NORM), TIMING, 1, TIMING.share(1))
    assert 800 < time < 900
    assert unit_ns(kernel(NORM), replace(TIMING, load_ns=600), 1, TIMING.share(1)) == pytest.approx(time + 100)
    without_wait = [event for event in NORM if event != WAIT]
    assert unit_ns(kernel(without_wait), TIMING, 1, TIMING.share(1)) < time - 300


def test_many_blocks_take_their_bytes_where_enough_are_in_flight() -> None:
    blocks = 100_000
    by_memory = blocks * 2048 / (1000 * 0.5) / 1e3
    assert kernel_us(kernel(NORM), TIMING, blocks) == pytest.approx(1 + by_memory, rel=0.1)
    alone = kernel_us(kernel(NORM, waves_a_simd=1, lds=60_000), TIMING, blocks)  # one block a unit
    assert alone == pytest.approx(blocks / 10 * 0.56, rel=0.05)  # a block starts when the last has its load


def test_arithmetic_is_the_bound_where_there_is_enough_of_it() -> None:
    busy = [LOAD, WAIT, *[VECTOR] * 1000, STORE]
    blocks = 40_000
    by_issue = blocks * 1000 * 4 / (10 * 4 * 2.0) / 1e3
    assert kernel_us(kernel(busy), TIMING, blocks) == pytest.approx(1 + by_issue, rel=0.1)


def test_what_a_cache_has_costs_no_bandwidth() -> None:
    again = Event(Op("load", 16), 1024, 0)
    blocks = 100_000
    more = kernel_us(kernel([again, *NORM]), TIMING, blocks)
    assert more == pytest.approx(kernel_us(kernel(NORM), TIMING, blocks), rel=0.1)


def test_a_barrier_waits_for_the_slowest_wave() -> None:
    slow = [*[VECTOR] * 100, BARRIER, LOAD, WAIT]
    quick = [BARRIER, LOAD, WAIT]
    one = unit_ns(kernel(slow), TIMING, 1, TIMING.share(1))
    assert unit_ns(kernel(slow, quick), TIMING, 1, TIMING.share(1)) == pytest.approx(one, rel=0.02)


def test_a_store_that_is_waited_for_takes_a_latency_on_cdna() -> None:
    """RDNA counts stores apart, so that the same wait is only for the load."""
    slow_stores = replace(TIMING, store_ns=900)
    trace = kernel([LOAD, STORE, WAIT, *[VECTOR] * 1000])
    late, early = (unit_ns(replace(trace, isa=isa), slow_stores, 1, TIMING.share(1)) for isa in ("cdna", "rdna3"))
    assert late == pytest.approx(early + 400, rel=0.01)


def test_rows_of_a_loop_take_as_long_as_those_that_were_traced() -> None:
    loops = [(kernel(NORM * rows), rows) for rows in (1, 4, 32)]
    expected = kernel_us(loops[2][0], TIMING, 10)
    assert looping_us(loops[0], loops[1], TIMING, 10, 32) == pytest.approx(expected, rel=0.05)


def test_blocks_that_fit() -> None:
    assert kernel(NORM).resident(TIMING) == 32
    assert kernel(NORM, NORM).resident(TIMING) == 16
    assert kernel(*[NORM] * 8, waves_a_simd=4).resident(TIMING) == 2
    assert kernel(NORM, lds=40_000).resident(TIMING) == 1
