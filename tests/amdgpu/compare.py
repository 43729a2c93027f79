"""This library's kernels beside those of Liger, SGLang and aiter, as AMD machine code, on a machine without an AMD GPU.

python compare.py [--targets gfx942,...] [--cases OP:HIDDEN,...] [--dtype bfloat16] [--out FILE]

Peers come from PyPI into build/amdgpu/peers, once. Their kernels and ours are compiled, run in the emulator of hipemu
(TINYGRAD=<a checkout of github.com/tinygrad/tinygrad>), compared with float64 and counted, and their traces are played
on models of GPUs (timing.py). The tables are written as Markdown, what they are made of as JSON lines beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # as tests/conftest.py does for pytest

import comparison_csv
import comparison_report
import composable_kernel
import toolchain

HERE = Path(__file__).parent
PEERS = toolchain.BUILD / "peers"
PACKAGES = ["triton==3.9.0", "liger-kernel==0.8.5", "sglang==0.5.23", "amd-aiter==0.1.7.post2.dev18"]
TARGETS = ["gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"]
IMPLEMENTATIONS = ["ours", "Liger", "SGLang", "aiter Triton", "aiter CK"]
FORWARD = ("rms_norm", "add_rms_norm")
CASES = [(op, hidden) for op in FORWARD for hidden in (128, 256, 2048, 4096, 8192, 16384)]
CASES += [("rms_norm_add_rms_norm", hidden) for hidden in (128, 2048, 4096)]
CASES += [("gated_rms_norm", 128), ("rms_norm_backward", 4096), ("gated_rms_norm_backward", 128)]
CASES += [("qk_norm_rope", 128), ("qk_norm_rope", 256)]
CASES += [("rms_norm_quant", 4096), ("add_rms_norm_quant", 4096), ("gated_rms_norm_quant", 128)]  # int8, a scale a row
# The kernels that published.py has measured times of, by target.
MEASURED = {
    "gfx942": [
        ("rms_norm", "bfloat16", 512, ["ours", "aiter Triton", "aiter CK"]),
        ("rms_norm", "bfloat16", 1024, ["ours", "aiter Triton"]),
        ("add_rms_norm", "bfloat16", 512, ["ours", "aiter Triton", "aiter CK"]),
        ("rms_norm", "bfloat16", 2000, ["ours", "aiter Triton", "aiter CK"]),
        *(("rms_norm", "float16", hidden, ["ours", "aiter Triton"]) for hidden in (128, 1536)),
        *(("rms_norm", "float16", hidden, ["ours", "Liger", "aiter Triton"]) for hidden in (8192, 16384)),
    ],
    "gfx950": [
        *(("rms_norm", "bfloat16", hidden, ["ours", "aiter Triton"]) for hidden in (512, 1024)),
        ("rms_norm", "float16", 128, ["ours", "aiter Triton"]),
    ],
}


def rows_for(hidden: int) -> int:
    """A few blocks' worth."""
    return 32 if hidden <= 512 else 4


def cases(
    target: str, chosen: list[tuple[str, int]], dtype: str, measured: bool, implementations: list[str]
) -> list[dict]:
    plan = [(op, dtype, hidden, IMPLEMENTATIONS) for op, hidden in chosen]
    plan += MEASURED.get(target, []) if measured else []
    return [
        {"op": op, "dtype": dtype, "hidden": hidden, "rows": rows_for(hidden),
         "implementations": [name for name in names if name in implementations]}
        for op, dtype, hidden, names in plan
    ]  # fmt: skip


def install_peers() -> None:
    installed = PEERS / "installed.txt"
    if not installed.exists() or installed.read_text().splitlines() != PACKAGES:
        shutil.rmtree(PEERS, ignore_errors=True)  # pip leaves what is there, whatever its version
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--only-binary", ":all:", "--target"]
        subprocess.run([*pip, str(PEERS), *PACKAGES], check=True)
        installed.write_text("\n".join(PACKAGES))


def composable(target: str, plan: list[dict]) -> str:
    """The library of aiter's HIP norms for these cases, or -."""
    wanted = [
        (case["op"], case["dtype"], case["hidden"])
        for case in plan
        if "aiter CK" in case["implementations"] and case["op"] in composable_kernel.OPS
    ]
    wanted = [case for case in wanted if case[1] in composable_kernel.NAMES]
    if target not in composable_kernel.ARCHES or not wanted:
        return "-"
    source, includes = composable_kernel.source(PEERS, toolchain.BUILD / "composable_kernel", sorted(set(wanted)))
    headers = [f"-I{toolchain.hip_7_headers(PEERS)}", "--hip-version=7.1"]
    command = [*toolchain.clang(), *headers, f"--offload-arch={target}", "-w", *includes, "-c", str(source)]
    built = toolchain.build("composable_kernel.o", command, source.read_text())
    return str(toolchain.build("composable_kernel.so", ["g++", "-shared", str(built)], source.read_text()))


def run(target: str, plan: list[dict]) -> list[dict]:
    """Compiles and measures. One process a target, so that two targets go on two processors."""
    # Of gfx90a the assembly is clang 15's, which the newer assembler of code_object() need not take.
    in_library = target in ("gfx90a", "gfx942")
    library = toolchain.hip_library("clang", [target] if in_library else ["gfx942"])
    code_object = "-" if in_library else str(toolchain.code_object(target))
    arguments = [target, str(library), code_object, str(PEERS), composable(target, plan), json.dumps(plan)]
    environment = os.environ | {
        "PYTHONPATH": str(PEERS),
        "TRITON_CACHE_DIR": str(toolchain.BUILD / "triton"),
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    worker = [sys.executable, "-W", "ignore", str(HERE / "compare_worker.py"), *arguments]
    with subprocess.Popen(worker, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        results = []
        for line in process.stdout:
            results.append(json.loads(line))
            done = results[-1]
            print(target, done["op"], done["hidden"], done["implementation"], done.get("error", ""), file=sys.stderr)
    if process.returncode:
        sys.exit(f"{target}: ended early, {process.returncode}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="default: %(default)s")
    default = ",".join(f"{op}:{hidden}" for op, hidden in CASES)
    parser.add_argument("--cases", default=default, help="OP:HIDDEN,...; default: %(default)s")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--no-measured", action="store_true", help="leave out what published measurements are of")
    parser.add_argument("--implementations", default=",".join(IMPLEMENTATIONS), help="default: %(default)s")
    parser.add_argument("--keep", action="store_true", help="add to the JSON lines there are, in place of older ones")
    parser.add_argument("--csv", type=Path, metavar="FOLDER", help="write times and counts as CSV there, too")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=toolchain.BUILD / "comparison.md")
    parser.add_argument("--report", action="store_true", help="only make the tables anew, of the JSON lines there are")
    options = parser.parse_args()
    lines = options.out.with_suffix(".jsonl")
    if not options.report:
        if not os.environ.get("TINYGRAD"):
            parser.error("TINYGRAD=<a checkout of github.com/tinygrad/tinygrad> is not set")
        install_peers()
        chosen = [(op, int(hidden)) for op, hidden in (case.split(":") for case in options.cases.split(","))]
        implementations = options.implementations.split(",")
        if unknown := set(implementations) - set(IMPLEMENTATIONS):
            parser.error(f"--implementations has {', '.join(sorted(unknown))}; there are {', '.join(IMPLEMENTATIONS)}")
        plans = {
            t: cases(t, chosen, options.dtype, not options.no_measured, implementations)
            for t in options.targets.split(",")
        }
        toolchain.hip_library("clang", ["gfx942"])  # before two targets make it at the same time
        lines.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(options.jobs) as pool, lines.open("a" if options.keep else "w") as file:
            for found in pool.map(run, plans, plans.values()):
                file.writelines(json.dumps(result) + "\n" for result in found)
    results = comparison_report.latest([json.loads(line) for line in lines.read_text().splitlines()])
    options.out.write_text(comparison_report.report(results))
    if options.csv:
        comparison_csv.write(options.csv, results, PACKAGES)
    print(options.out.read_text())


if __name__ == "__main__":
    main()
