"""Runs norms of this library and of peers on one emulated GPU, and prints a line of JSON for each.

python compare_worker.py ARCH LIBRARY CODE_OBJECT|- PEERS COMPOSABLE_KERNEL|- CASES

CASES is JSON, a list of {op, dtype, hidden, rows, implementations}. See compare.py for what comes back.
"""

from __future__ import annotations

import ctypes
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import emulated_triton
import hipemu
import oracle
import peers
import torch
from hipemu.tracer import BlockTracer
from probe import DTYPES, OPERANDS, WHOLE_ROW, Call, Tensor, options
from wave_trace import count

UNITS = 2  # that the GPU has for peers who ask: blocks that stay, one a unit, soon have several rows
LOOP_ROWS = (1, 4)  # of each block that stays, in two calls
OUR_LOOP_ROWS = (2, 6)  # the same of ours: whole steps of two rows; blocks with one row have a kernel without a loop
LOOP_HEADS = (64, 256)  # the same where a block has many short rows at once
FEW_ROWS, FEW_HEADS = (1, 64), (16, 1024)  # as the tables have them (comparison_report.py)
BLOCKS_STAY = ("aiter Triton", "rms_norm_backward", "gated_rms_norm_backward")  # implementations, operators
Tensors = dict[str, torch.Tensor]


def operand(t: torch.Tensor) -> Tensor:
    return Tensor.at(t.data_ptr(), t.shape, t.stride(), str(t.dtype).removeprefix("torch."), t)


def results(op: str, t: Tensors) -> Tensors:
    """Memory for what the operator gives."""
    like = {"out": "x"}
    if "backward" in op:
        like = {"dx": "x", "dweight": "weight"} | ({"dgate": "gate"} if "gate" in t else {})
    if "residual" in t:
        like["residual_out"] = "residual"
    if "k" in t:
        like["k_out"] = "k"
    made = {name: torch.empty_like(t[of]) for name, of in like.items()}
    if op.endswith("quant"):
        made["out"] = torch.empty_like(t["x"], dtype=torch.int8)
        made["scale_out"] = torch.empty(*t["x"].shape[:-1], 1)
    return made


def ours(hip: ctypes.CDLL, op: str) -> Callable[[Tensors], Tensors]:
    kept: list[torch.Tensor] = []
    allocate = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)

    @allocate
    def scratch(_, size: int) -> int:
        kept.append(torch.empty(size + 64, dtype=torch.uint8))
        return kept[-1].data_ptr() + -kept[-1].data_ptr() % 64

    def run(t: Tensors) -> Tensors:
        given = {name: value for name, value in t.items() if name in OPERANDS}
        made = results(op, t)
        quantised = {"dtype": DTYPES["int8"], "dtype_name": b"int8", "scale_group_size": WHOLE_ROW,
                     "scale_dtype_name": b"float32"} if op.endswith("quant") else {}  # fmt: skip
        hip.gemma_norm_op.restype = ctypes.c_void_p
        call = Call(
            op=hip.gemma_norm_op(op.encode()), options=options(eps=oracle.EPS, gemma="gated" not in op, **quantised)
        )
        call.scratch = ctypes.cast(scratch, ctypes.c_void_p)
        for name, tensor in (given | made).items():
            call.tensors[OPERANDS.index(name)] = ctypes.pointer(operand(tensor))
        message = ctypes.create_string_buffer(512)
        if hip.gemma_norm_hip(ctypes.byref(call), None, message):
            raise RuntimeError(message.value.decode() or ", ".join(hipemu.refused))
        return made

    return run


def traced(run: Callable[[Tensors], Tensors], t: Tensors, wants: Callable[[int, int], bool]) -> tuple[Tensors, list]:
    """Results, and a record of each launch."""
    hipemu.launches.clear()
    hipemu.tracer = BlockTracer(wants)
    out = run(t)
    hipemu.tracer = None
    return out, list(hipemu.launches)


def judge(op: str, t: Tensors, gemma: bool, got: Tensors) -> tuple[dict[str, float], str]:
    """The largest error of each result in units of the last place, and what the operator rounds. An error of a gradient
    is measured in units of the largest element's last place of its row, as its terms cancel; that of a rotated head
    likewise. An error of int8 is in codes: half of one is the least that rounding leaves.
    """
    errors = {}
    for name, want in oracle.expected(op, t, gemma).items():
        if got[name].dtype == torch.int8:
            error = (got[name].double() - want).abs()
        elif name.startswith("d") or "rope" in op:
            scale = want.abs().amax(-1, keepdim=True).expand_as(want)
            error = (got[name].double() - want).abs() / (scale * torch.finfo(got[name].dtype).eps)
        else:
            error = oracle.ulps(got[name], want).abs()
        errors[name] = round(float(error.max()), 2) if error.isfinite().all() else float("inf")
    known = not any(kind in op for kind in ("backward", "quant", "rope"))
    return errors, oracle.rounding(got["out"], t, gemma) if known else ""


def record(launch: dict, rows: int, isa: str) -> dict:
    """Of the last block that ran."""
    meta, waves = launch["meta"], launch["blocks"][-1]
    blocks = launch["grid"][0] * launch["grid"][1]
    return {
        "kernel": launch["kernel"], "threads": launch["block"][0], "blocks": blocks, "rows": rows / blocks,
        "registers": meta[".vgpr_count"], "lds": launch["lds"], "counts": count(waves, isa), "isa": isa,
        "waves": [[[op.unit, op.width, op.waits, size, fresh] for op, size, fresh in wave] for wave in waves],
    }  # fmt: skip


def is_last_two(index: int, blocks: int) -> bool:
    """Only the last block is recorded. The one before is run too, which brings the weight to the cache."""
    return index >= blocks - 2


def measure(arch: str, run: Callable[[Tensors], Tensors], implementation: str, case: dict) -> dict:
    op, dtype, hidden, rows = case["op"], getattr(torch, case["dtype"]), case["hidden"], case["rows"]
    isa = hipemu.ARCHES[arch][0]
    gemma = "gated" not in op and implementation not in peers.PLAIN_WEIGHT
    if implementation not in BLOCKS_STAY and op not in BLOCKS_STAY:
        t = oracle.make(op, dtype, rows, hidden)
        got, launches = traced(run, t, lambda *_: True)
        errors, rounds = judge(op, t, gemma, got)
        return {"errors": errors, "rounds": rounds, "launches": [record(x, rows, isa) for x in launches]}
    # A peer starts as many blocks as the GPU has units. Ours starts a fixed number, of which only the last two are run
    # and traced; its results are therefore checked in a third call, of three rows.
    own = implementation == "ours"
    blocks, wants = (ours_blocks(run, op, dtype, hidden), is_last_two) if own else (UNITS, lambda *_: True)
    loops = []
    for rows in LOOP_HEADS if hidden <= 1024 else OUR_LOOP_ROWS if own else LOOP_ROWS:
        t = oracle.make(op, dtype, rows * blocks, hidden)
        got, launches = traced(run, t, wants)
        loops.append([record(x, rows * blocks, isa) for x in launches])
    exact = {}
    if own:
        # Fewer rows than blocks: there are as many blocks as rows need, and if that is one, no second kernel.
        for few in FEW_ROWS if hidden > 1024 else FEW_HEADS:
            launches = traced(run, oracle.make(op, dtype, few, hidden), is_last_two)[1]
            exact[few] = [record(x, few, isa) for x in launches]
        t = oracle.make(op, dtype, 3, hidden)
        got = run(t)
    errors, rounds = judge(op, t, gemma, got)
    return {"errors": errors, "rounds": rounds, "launches": loops[0], "looping": loops[1],
            "loop_blocks": blocks if own else "units", "exact": exact}  # fmt: skip


def ours_blocks(run: Callable[[Tensors], Tensors], op: str, dtype: torch.dtype, hidden: int) -> int:
    """How many blocks a backward operator has at most."""
    return traced(run, oracle.make(op, dtype, 4096, hidden), lambda index, _: not index)[1][0]["grid"][0]


def main(arch: str, library: str, code_object: str, folder: str, composable: str, cases: str) -> None:
    hip = hipemu.load(library, arch, None if code_object == "-" else code_object)
    peers.find_in(Path(folder))
    emulated_triton.pretend(arch, UNITS)
    for case in json.loads(cases):
        functions = {"ours": ours(hip, case["op"])} | peers.RUN[case["op"]]
        if composable != "-":
            import composable_kernel

            functions |= composable_kernel.functions(composable, case["op"], case["dtype"], case["hidden"])
        for name, run in functions.items():
            if name not in case["implementations"]:
                continue
            try:
                result = measure(arch, run, name, case)
            except Exception as error:
                traceback.print_exc()
                result = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps({"arch": arch, **case, "implementation": name, **result}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
