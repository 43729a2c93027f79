"""The machine code of the kernels that quantise, as test_machine_code.py looks at that of the others."""

from __future__ import annotations

import re

from assembly import Kernel, check
from toolchain import Target

# The targets with instructions that convert to float8.
CONVERTS = ("gfx942", "gfx950", "gfx1200", "gfx1201")


def test_every_instantiation_is_there(quant_code: list[Kernel]) -> None:
    halves = ("float16", "bfloat16")
    weights = [("float", w, False) for w in ("float", "NoWeight", *halves)]
    narrow = [(x, w, False) for x in halves for w in (x, "float", "NoWeight")] + [(x, x, True) for x in halves]
    weighted = [v for v in (*weights, *narrow) if v[1] != "NoWeight"]
    expected = {("AddToFloat32RmsNormQuant", *v) for v in narrow}
    expected |= {(form, *v) for form in ("GatedRmsNormQuant", "GatedInputRmsNormQuant") for v in weighted}
    expected |= {(form, *v) for form in ("RmsNormQuant", "AddRmsNormQuant") for v in (*weights, *narrow)}
    held = [k for k in quant_code if k.scope != "two passes"]
    assert {(k.form, k.x, k.weight, k.round_each_step) for k in held} == expected
    passes = [(k.form, k.x, k.weight, k.round_each_step) for k in quant_code if k.scope == "two passes"]
    assert sorted(passes) == sorted(expected)  # one for each, for all rows that no kernel holds
    assert all(k.aligned for k in held)
    assert len({str(k) for k in quant_code}) == len(quant_code)


def test_nothing_spills_or_is_called(quant_code: list[Kernel]) -> None:
    check(quant_code, lambda k: k.calls() or k.spills())


def test_lanes_exchange_in_registers(quant_code: list[Kernel]) -> None:
    check(quant_code, lambda k: k.all("ds_bpermute|ds_swizzle"))


def test_rows_are_read_in_whole_vectors_and_written_in_half_ones(quant_code: list[Kernel]) -> None:
    """A vector of 16-bit elements has 8, and so many bytes has its result; one of float32 has 4. Where 16-bit elements
    are gated in float32 before the norm, half a vector of theirs is read at a time.
    """

    def wrong(k: Kernel) -> object:
        halves = k.x != "float" and k.form == "GatedInputRmsNormQuant"
        loads = [
            line for line in k.all("global_load") if re.search("_(dwordx2|b64)" if halves else "_(dwordx4|b128)", line)
        ]
        half = k.x != "float" and k.form not in ("AddToFloat32RmsNormQuant", "GatedInputRmsNormQuant")
        stores = k.all("global_store_(dwordx2|b64)" if half else "global_store_(dword|b32) ")
        return (len(loads) < k.vectors or len(stores) < k.vectors) and f"{len(loads)} loads, {len(stores)} stores"

    check([k for k in quant_code if k.scope != "two passes"], wrong)


def test_float8_is_made_by_instructions_where_there_are_some(quant_code: list[Kernel], target: Target) -> None:
    def wrong(k: Kernel) -> object:
        has = bool(k.all("v_cvt_pk_fp8_f32"))
        return has != (target.arch in CONVERTS) and ("has them" if has else "has none")

    check([k for k in quant_code if k.scope != "two passes"], wrong)
