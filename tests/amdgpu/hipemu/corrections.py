"""tinygrad's instruction emulator, with the faults corrected that its commit a9069c177a has."""

from __future__ import annotations

import inspect
import os
import re
import sys

sys.path.insert(0, os.environ["TINYGRAD"])
os.environ.setdefault("DEV", "CPU")
os.environ["CC"] = "clang-19"  # which the tests need anyway; the emulator's own choice is "clang"

from test.mockgpu.amd import emu
from tinygrad.uop.ops import Ops, UOp

# The slot of a kernel's buffers in which an exchange between lanes finds the registers as they were before it.
SHADOW = 5


def exchanges_lanes(inst) -> bool:
    return hasattr(type(inst), "dpp") or "PERMLANE" in emu._op_name(inst)


def _read_from_shadow(handler):
    """The emulator does one lane after another, so `v_add_f32_dpp v0, v0, v0` would read what it has just written."""

    def compile_instruction(inst, ctx):
        sink = handler(inst, ctx)
        if not exchanges_lanes(inst):
            return sink
        shadow = UOp.param(SHADOW, ctx.vgpr.dtype, (256 * ctx.wave_size,))
        reads = {
            u: u.replace(src=(u.src[0].replace(src=(shadow, *u.src[0].src[1:])), *u.src[1:]))
            for u in sink.toposort()
            if u.op is Ops.LOAD and u.src[0].op is Ops.INDEX and u.src[0].src[0] is ctx.vgpr
        }
        return sink.substitute(reads)

    return compile_instruction


def _rewritten(function, *changes: tuple[str, str]):
    """The emulator's function with these patterns replaced in its source."""
    source = inspect.getsource(function)
    for pattern, replacement in changes:
        source, replaced = re.subn(pattern, replacement, source)
        if not replaced:
            raise NotImplementedError("another version of tinygrad")
    exec(compile(source, emu.__file__, "exec"), emu.__dict__)
    return emu.__dict__[function.__name__]


# On RDNA, v128 to v255 of a 16-bit operand name upper halves of v0 to v127. The emulator thinks so of CDNA too.
_HALVES = (r"bits\['\w+'\] == 16", r"(ctx.wave_size == 32 and \g<0>)")
# The emulator reads LDS in the lanes that are not active as well, wherever their addresses point.
_ACTIVE_READS = (r"'_lds': mem, ", r"\g<0>'_active': _lane_active(exec_mask, lane), ")
_ACTIVE_WRITES = (r"mem\.index\(addr >> addr_shift\)", r"mem.index((addr >> addr_shift).valid(active))")
# CDNA's row_bcast:15 gives the last lane of a row to the next row, row_bcast:31 lane 31 to the upper half of the wave.
# The emulator gives a row its own first lane.
_BROADCAST = (
    r"(op == 'row_bcast': )src_lane = row_base",
    r"\1src_lane, valid = (row_base - _c(1, dtypes.int) if arg == 15 else _c(31, dtypes.int)), "
    r"lane_i > _c(arg, dtypes.int)",
)
# Its numbers of the exchanges within a row that begin at 0x150 are not the hardware's: these give every lane of a row
# the value of one of them (row_share on RDNA, row_newbcast on CDNA), and those from 0x160 on exchange by exclusive
# or (row_xmask).
_WITHIN_ROWS = (
    r"elif op == 'wave_shl'",
    r"elif dpp & 0x1f0 == 0x150: src_lane = row_base + _c(dpp & 15, dtypes.int)\n"
    r"    elif dpp & 0x1f0 == 0x160: src_lane = row_base + (lane_in_row ^ _c(dpp & 15, dtypes.int))\n"
    r"    \g<0>",
)
# It moves whole words in buffer instructions of bytes and of 16 bits.
_LOADED = (
    r"val = in_bounds\.where\(mem\.index\(word_addr\.cast\(dtypes\.int64\)\.valid\(in_bounds\)\).*\n",
    r"\g<0>      val = _part_loaded(val, addr, op_name)\n",
)
_STORED = (
    r"stores\.append\(idx\.store\(in_bounds\.where\(_to_u32\(val\), idx\)\)\)",
    r"stores += _part_stored(mem, addr + UOp.const(i * 4, dtypes.uint64), _to_u32(val), in_bounds, op_name)",
)


def _bits_of(name: str) -> int:
    return 8 if "BYTE" in name else 16 if "SHORT" in name else 32


def _part_loaded(value, address, name: str):
    if _bits_of(name) == 32:
        return value
    if "D16" in name or "_S" in name.removeprefix("BUFFER_LOAD"):
        raise NotImplementedError(name)
    shift = (address.cast(emu.dtypes.uint32) & emu._c(3)) * emu._c(8)
    return (value >> shift) & emu._c((1 << _bits_of(name)) - 1)


def _part_stored(memory, address, value, active, name: str):
    if "D16_HI" in name:
        value = value >> emu._c(16)
    return emu._mem_store(memory, address, value, active, 64, _bits_of(name))


emu._part_loaded, emu._part_stored = _part_loaded, _part_stored
_rewritten(emu._load_vsrc0, _HALVES)
_rewritten(emu._dpp16_ctrl, _BROADCAST, _WITHIN_ROWS)
_corrected = {
    emu._compile_vop12: _rewritten(emu._compile_vop12, _HALVES),
    emu._compile_mem_op: _rewritten(emu._compile_mem_op, _ACTIVE_READS, _ACTIVE_WRITES),
    emu._compile_mubuf: _rewritten(emu._compile_mubuf, _LOADED, _STORED),
}
for _kind, _handler in list(emu._INST_HANDLERS.items()):
    emu._INST_HANDLERS[_kind] = _read_from_shadow(_corrected.get(_handler, _handler))


def _keeping_nan(to_bfloat16):
    """The emulator's v_cvt_pk_bf16_f32 adds to the bits without a look, and makes zero of 0x7fffffff."""

    def convert(value):
        number = value if value.dtype == emu.dtypes.float32 else value.bitcast(emu.dtypes.float32)
        return emu._FUNCS["isNAN"](number).where(UOp.const(0x7FC0, emu.dtypes.uint16), to_bfloat16(value))

    return convert


emu._FUNCS["f32_to_bf16"] = _keeping_nan(emu._FUNCS["f32_to_bf16"])


def _limiting(to_int32):
    """The emulator's v_cvt_i32_f32 is C's conversion, which is undefined for what 32 bits cannot hold. The hardware
    limits numbers to those of 32 bits, and makes 0 of a NaN (llvm/llvm-project#174726 and #200960).
    """

    def convert(value):
        number = value if value.dtype == emu.dtypes.float32 else value.bitcast(emu.dtypes.float32)
        least, too_large = (UOp.const(limit, emu.dtypes.float32) for limit in (-(2.0**31), 2.0**31))
        number_or_least = (number < least).where(least, number)
        fits = number_or_least < too_large  # a NaN does not
        converted = to_int32(fits.where(number_or_least, UOp.const(0.0, emu.dtypes.float32)))
        limited = fits.where(converted, UOp.const(2**31 - 1, emu.dtypes.int))
        return emu._FUNCS["isNAN"](number).where(UOp.const(0, emu.dtypes.int), limited)

    return convert


emu._FUNCS["f32_to_i32"] = _limiting(emu._FUNCS["f32_to_i32"])
