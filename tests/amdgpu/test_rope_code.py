"""The machine code of qk_norm_rope's kernels, as test_machine_code.py looks at that of the other forward operators."""

from __future__ import annotations

import re
from collections import Counter

from assembly import SIZES, RopeKernel, check
from toolchain import Target

# How many waves a SIMD must hold at least, of the kernels for aligned heads: by its registers, and by the vectors that
# a thread holds.
WAVES = {512: {2: 3, 4: 3}, 1536: {2: 10, 4: 10}, 1024: {2: 7, 4: 7}}


def test_every_instantiation_is_there(rope_code: list[RopeKernel]) -> None:
    halves = ("float16", "bfloat16")
    types = [("float", weight, "float") for weight in ("float", *halves)] * 2
    types += [(x, weight, angles) for x in halves for weight in (x, "float") for angles in (x, "float")]
    assert Counter((k.x, k.weight, k.angles) for k in rope_code) == Counter(types * 4)
    assert {k.vectors for k in rope_code if k.x != "float"} == {2}


def test_aligned_heads_move_16_bytes_at_a_time(rope_code: list[RopeKernel]) -> None:
    """Positions, and angles that are not aligned, are single elements."""

    def wrong(k: RopeKernel) -> object:
        loads, stores = k.all("global_load"), k.all("global_store")
        wide = [line for line in loads if re.search(r"_(dwordx4|b128)", line)]
        if not k.aligned:
            return wide
        narrow = [line for line in stores if not re.search(r"_(dwordx4|b128)", line)]
        return narrow or (len(wide) < 2 * k.vectors and f"{len(wide)} wide loads")

    check(rope_code, wrong)


def test_memory_is_accessed_as_global_and_without_atomics(rope_code: list[RopeKernel]) -> None:
    check(rope_code, lambda k: k.all(r"flat_|buffer_(?!\w*inv|gl|wbl2)|\w*atomic"))


def test_nothing_spills_or_is_called(rope_code: list[RopeKernel]) -> None:
    check(rope_code, lambda k: k.calls() or k.spills())


def test_enough_waves_fit(rope_code: list[RopeKernel], target: Target) -> None:
    def wrong(k: RopeKernel) -> object:
        waves = target.waves(k.numbers["vgpr_count"])
        # On gfx1250, which docs/amd.md does not promise yet, clang 22 takes 150 registers for a kernel of 16-bit heads
        # with float32 weights: one wave fewer.
        fewer = target.arch == "gfx1250" and SIZES[k.weight] > SIZES[k.x]
        enough = waves >= WAVES[target.registers][k.vectors] - fewer
        return not enough and f"{k.numbers['vgpr_count']} registers: {waves} waves"

    check([k for k in rope_code if k.aligned], wrong)


def test_products_and_sums_are_rounded_apart(rope_code: list[RopeKernel]) -> None:
    """The only fused multiply-adds are those of the squares, of the mean and the root, and of the division that finds a
    head's token. The rotation would add one for each element (docs/contract.md, C11.3).
    """

    def wrong(k: RopeKernel) -> object:
        fused = k.all(r"v_(pk_)?(fma|fmac|mad|mac)_(f32|mix)")
        lanes = sum(2 if "pk" in line else 1 for line in fused)
        squares = k.vectors * (4 if k.x == "float" else 8)
        return lanes > squares + 15 and f"{lanes} fused multiply-adds"

    check(rope_code, wrong)


def test_elements_of_other_lanes_come_from_registers(rope_code: list[RopeKernel]) -> None:
    """In place, a lane may already have overwritten what is in memory. (Where elements are read one by one, all lanes
    meet at a barrier before.)
    """
    exchange = [k for k in rope_code if k.all("ds_bpermute")]
    assert {k.partner for k in exchange} == {"other lane"}
    check([k for k in rope_code if k.partner == "other lane"], lambda k: not k.all("ds_bpermute"))
