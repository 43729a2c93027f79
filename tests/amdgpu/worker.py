"""Runs cases on one emulated GPU: python worker.py ARCH LIBRARY CODE_OBJECT|- CASES_LIBRARY SHARD/SHARDS STRIDE

Writes a line of JSON before and after each case, so that whoever reads knows the case that ended the process: an access
beyond an operand meets a guard page.
"""

from __future__ import annotations

import ctypes
import json
import sys

import hipemu


def main(arch: str, library: str, code_object: str, cases_library: str, shard: str, stride: str) -> None:
    hip = hipemu.load(library, arch, None if code_object == "-" else code_object)
    cases = ctypes.CDLL(cases_library)
    cases.describe_case.restype = cases.check_case.restype = ctypes.c_char_p
    cases.runs_backwards.restype = cases.is_chosen.restype = ctypes.c_bool
    hipemu.backwards = cases.runs_backwards
    entry = ctypes.cast(hip.gemma_norm_hip, ctypes.c_void_p)
    first, step = map(int, shard.split("/"))
    chosen = [i for i in range(cases.case_count()) if cases.is_chosen(ctypes.c_int64(i), ctypes.c_int64(int(stride)))]
    for index in chosen[first::step]:
        print(json.dumps({"begin": index, "case": cases.describe_case(ctypes.c_int64(index)).decode()}), flush=True)
        bits = ctypes.c_uint64()
        error = cases.check_case(entry, ctypes.c_int64(index), ctypes.byref(bits)).decode()
        perturbed = sum(launch["perturbed"] for launch in hipemu.launches)
        refused = sorted(set(hipemu.refused))
        result = {"bits": None, "error": ""} if refused else {"bits": bits.value, "error": error}
        print(json.dumps({"end": index, **result, "perturbed": perturbed, "refused": refused}), flush=True)
        hipemu.launches.clear()
        hipemu.refused.clear()


if __name__ == "__main__":
    main(*sys.argv[1:])
