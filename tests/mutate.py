"""Plants faults in a copy of the sources, one at a time, and shows which of them the tests notice: make mutate.

A fault is what somebody may mistype: another comparison or operator, a number that is one off, a condition the wrong
way round, two arguments exchanged, a statement left out. In Python it is made by way of the syntax tree, in C++ by
regular expressions. Which ones are tried is drawn with a seed, in turns over the files. Each is tried against the tests
of SUITES, the quick ones first, until one fails. What survives is a gap in the tests, or changes nothing.

The table goes to build/mutants.md. To look at one again: --file <part of its path> --line <number>.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build" / "mutants" / str(os.getpid())
OBJECTS = COPY / "build" / "objects"
QUANT = "test_quant_refused test_quant_formats test_quant test_quant_programs"
# For each file the Python tests that ought to notice, quick ones first. A line's files share all of its tests.
SUITES: list[tuple[str, str]] = [
    ("_checks.py", "test_fuzz test_bad_input test_qk_norm_rope_refused"),
    (
        "_registry.py",
        "test_fuzz test_fallback test_modes test_bad_input test_transforms_writing test_contract test_compile",
    ),
    ("_calls.py", "test_bad_input test_modes test_module_tracing test_contract"),
    ("_sharding.py parallel.py", "test_distributed"),
    ("_ops/rms_norm.py", "test_fuzz test_modes test_bad_input test_autograd test_module_tracing"),
    ("_ops/rms_norm_backward.py", "test_fuzz test_autograd test_backward"),
    ("_ops/rms_norm_add_rms_norm.py", "test_fuzz test_rms_norm_add_rms_norm"),
    ("_ops/gated_rms_norm.py _ops/gated_rms_norm_backward.py", "test_fuzz test_gated test_backward"),
    (
        "_ops/qk_norm_rope.py _ops/qk_norm_rope_backward.py",
        "test_fuzz test_qk_norm_rope_copies test_qk_norm_rope test_qk_norm_rope_programs",
    ),
    ("_ops/quantising.py _ops/rms_norm_quant.py _ops/gated_rms_norm_quant.py", f"test_fuzz {QUANT}"),
    ("module.py gated_module.py _module_checks.py", "test_module test_module_in_place test_module_tracing test_gated"),
    ("routing.py", "test_hip_choice test_hip_exclusions test_hip_results"),
    ("integrations/_rewrite.py", "test_transformers_rewrite test_transformers_residual"),
    ("integrations/_residual.py", "test_transformers_rewrite test_transformers_residual"),
    ("integrations/_rotation.py", "test_transformers_rotation"),
    ("integrations/_semantics.py", "test_transformers_classify test_transformers_patch"),
    ("integrations/_forwards.py integrations/_swap.py", "test_transformers_patch test_transformers_mechanics"),
    ("integrations/sglang.py integrations/_sglang_norms.py", "test_sglang"),
    ("integrations/_sglang_rope.py", "test_sglang_rope"),
    ("integrations/vllm.py integrations/_vllm_rope.py", "test_vllm test_vllm_rope"),
]
PYTEST = ["-xq", "-p", "no:cacheprovider", "--hypothesis-profile=unshrunk"]
# C++: the programs of tests/cpp that need no kernel; then, of the library for the CPU, Python tests.
CASES = ["cases.cpp", "all_cases.cpp"]
CHECKS = ["check_heads_test.cpp", "check_quantized_test.cpp", "check_gradients_test.cpp"]
PROGRAMS = {"check_test": CHECKS, "rows_test": [], "overlap_test": [], "plan_test": CASES}
COMPILE = ["ccache", "g++", "-std=c++17", "-O1", "-Icsrc", "-Itests/cpp", "-Wno-unknown-pragmas", "-c"]
CPP_SUITES = {
    "csrc/core/check.cpp": ("check_test", f"test_fuzz test_bad_input {QUANT}"),
    "csrc/core/check_heads.cpp": ("check_test", "test_fuzz test_qk_norm_rope_refused"),
    "csrc/core/check_quantized.cpp": ("check_test", f"test_fuzz {QUANT}"),
    "csrc/core/collapse.cpp": ("rows_test", f"test_fuzz {QUANT} test_contract"),
    "csrc/core/overlap.cpp": ("overlap_test", "test_fuzz test_bad_input"),
    "csrc/gpu/plan.cpp": ("plan_test", ""),
    "csrc/cpu/backward.cpp": ("", "test_fuzz test_backward test_autograd"),
    "csrc/cpu/entry.cpp": ("", "test_fuzz test_bad_input test_contract"),
    "csrc/torch/bind.h": ("", f"test_fuzz test_bad_input test_modes test_contract {QUANT}"),
    "csrc/torch/arguments.h": ("", f"test_fuzz test_bad_input {QUANT}"),
}


class Mutant(NamedTuple):
    path: str
    line: int
    change: str
    text: str  # of the whole file


# --- Python

SWAPPED = {
    **{ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not"},
    **{ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in", ast.And: "or", ast.Or: "and"},
    **{ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.FloorDiv: "*", ast.Div: "*", ast.Mod: "*"},
}


def python_mutants(path: str, source: str) -> Iterator[Mutant]:
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    data = source.encode()

    def at(node: ast.AST) -> tuple[int, int]:
        assert isinstance(node, ast.expr | ast.stmt)
        assert node.end_lineno is not None and node.end_col_offset is not None
        begin = starts[node.lineno - 1] + node.col_offset
        return begin, starts[node.end_lineno - 1] + node.end_col_offset

    def replaced(node: ast.AST, begin: int, end: int, new: str) -> Mutant:
        old = " ".join(data[begin:end].decode().split())
        line = data[:begin].count(b"\n") + 1
        text = (data[:begin] + new.encode() + data[end:]).decode()
        return Mutant(path, line, f"`{old[:50]}` -> `{' '.join(new.split())[:60]}`", text)

    def between(node: ast.AST, left: ast.AST, right: ast.AST, new: str) -> Iterator[Mutant]:
        """The operator between two operands, with what is around it."""
        begin, end = at(left)[1], at(right)[0]
        gap = data[begin:end].decode()
        word = re.search(r"is not|not in|\w+|[-+*/<>=!%]+", gap)
        if word and "#" not in gap:
            yield replaced(node, begin + word.start(), begin + word.end(), new)

    def of(node: ast.AST) -> str:
        begin, end = at(node)
        return data[begin:end].decode()

    for node in code_of(ast.parse(source)):
        if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED:
            yield from between(node, node.left, node.comparators[0], SWAPPED[type(node.ops[0])])
        elif isinstance(node, ast.BoolOp):
            yield from between(node, node.values[0], node.values[1], SWAPPED[type(node.op)])
        elif isinstance(node, ast.BinOp) and type(node.op) in SWAPPED:
            yield from between(node, node.left, node.right, SWAPPED[type(node.op)])
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield replaced(node, *at(node), of(node.operand))
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield replaced(node, *at(node), str(not node.value))
        elif isinstance(node, ast.Constant) and isinstance(node.value, int):
            yield replaced(node, *at(node), str(node.value + 1))
        elif isinstance(node, ast.If | ast.IfExp | ast.While):
            yield replaced(node, *at(node.test), f"not ({of(node.test)})")
        elif isinstance(node, ast.Call) and len(node.args) > 1:
            first, second = node.args[:2]
            if not any(isinstance(a, ast.Starred) for a in (first, second)):
                middle = data[at(first)[1] : at(second)[0]].decode()
                yield replaced(node, at(first)[0], at(second)[1], of(second) + middle + of(first))
        if isinstance(node, ast.AugAssign | ast.Raise) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        ):
            yield replaced(node, *at(node), "pass")


def code_of(tree: ast.AST) -> Iterator[ast.AST]:
    """All that runs: not annotations and docstrings, which are no calls, and not the arguments of decorators."""
    for name, value in ast.iter_fields(tree):
        for child in value if isinstance(value, list) else [value]:
            runs = isinstance(child, ast.AST) and name not in ("annotation", "returns", "decorator_list")
            if runs and not isinstance(child, ast.JoinedStr):  # which is only said
                yield child
                yield from code_of(child)


# --- C++

CPP = [
    (r"(?<= )<(?= )", "<="), (r"(?<= )>(?= )", ">="), (r"(?<= )<=(?= )", "<"), (r"(?<= )>=(?= )", ">"),
    (r"(?<= )==(?= )", "!="), (r"(?<= )!=(?= )", "=="), (r"(?<= )&&(?= )", "||"), (r"(?<= )\|\|(?= )", "&&"),
    (r"(?<=[\w)\]] )\+(?= [\w(])", "-"), (r"(?<=[\w)\]] )-(?= [\w(])", "+"), (r"(?<=[\w)\]] )/(?= [\w(])", "*"),
    (r"\btrue\b", "false"), (r"\bfalse\b", "true"), (r"(?<=[(\s])!(?=[\w(])", ""), (r"(?<=[\s(\[])\d+\b(?!\.)", "+1"),
]  # fmt: skip


def cpp_mutants(path: str, source: str) -> Iterator[Mutant]:
    lines = source.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        code = re.sub(r'"[^"]*"', lambda s: "~" * len(s[0]), line.partition("//")[0])  # not in what is said
        if re.match(r"\s*(#|template|static_assert|using|case|namespace|extern|__attribute__)", code):
            continue
        for pattern, new in CPP:
            for found in re.finditer(pattern, code):
                word = str(int(found[0]) + 1) if new == "+1" else new
                changed = line[: found.start()] + word + line[found.end() :]
                text = "".join([*lines[: number - 1], changed, *lines[number:]])
                yield Mutant(path, number, f"`{line.strip()[:70]}`: `{found[0]}` -> `{word}`", text)
        if re.match(r"\s+(if \(.*\) )?(\w+(\.|->))?[a-z_]\w*\(.*\);\s*$", code) and "return" not in code:
            text = "".join([*lines[: number - 1], ";\n", *lines[number:]])
            yield Mutant(path, number, f"`{line.strip()[:90]}` left out", text)


# --- Trying one


def run(command: list[str], timeout: float, **environment: str) -> tuple[bool, str]:
    """Whether it succeeds, and what it prints. What takes too long, of a processor, has not; what hangs neither."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (int(timeout), int(timeout) + 1))

    ours = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(COPY / "python"), "CCACHE_BASEDIR": str(COPY)}
    process = subprocess.Popen(
        command,
        cwd=COPY,
        env={**os.environ, **ours, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=limit,
    )
    try:
        said, _ = process.communicate(timeout=4 * timeout)
        return process.returncode == 0, said
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return False, "ERROR it takes too long"


def python_tests(names: str, timeout: float) -> str:
    """The first test that fails, or "" if none does."""
    for name in names.split():
        file = f"tests/python/{name}.py"
        passed, said = run([sys.executable, "-m", "pytest", *PYTEST, file], timeout)
        if not passed:
            failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", said, re.M)
            last = (said.strip().splitlines() or ["it takes too long"])[-1]
            return f"{name}: {failed[1].rpartition('::')[2] if failed else last[:60]}"
    return ""


def compiled(sources: list[str], program: str, timeout: float) -> bool:
    OBJECTS.mkdir(parents=True, exist_ok=True)
    objects = []
    for source in sources:
        objects.append(str(OBJECTS / (source.replace("/", "_") + ".o")))
        if not run([*COMPILE, source, "-o", objects[-1]], timeout)[0]:
            return False
    return run(["g++", *objects, "-lgtest_main", "-lgtest", "-lpthread", "-o", program], timeout)[0]


def cpp_tests(path: str, timeout: float) -> str | None:
    """As python_tests; None if it does not compile."""
    name, python = CPP_SUITES[path]
    if name:
        core = sorted(str(p.relative_to(COPY)) for p in [*COPY.glob("csrc/core/*.cpp"), *COPY.glob("csrc/gpu/*.cpp")])
        tests = [f"tests/cpp/{file}" for file in (f"{name}.cpp", *PROGRAMS[name])]
        if not compiled([*core, "csrc/ops/ops.cpp", *tests], str(OBJECTS / name), timeout):
            return None
        passed, said = run([str(OBJECTS / name)], timeout)
        if not passed:
            failed = re.search(r"\[  FAILED  \] (\w+\.\w+)", said)
            return f"{name}: {failed[1] if failed else 'ended early'}"
    if python:
        passed, _ = run([sys.executable, "setup.py", "build_ext", "--inplace"], 6 * timeout, GEMMA_NORM_BACKENDS="cpu")
        return python_tests(python, timeout) if passed else None
    return ""


def copy() -> None:
    """The files that git knows, and what setup.py has built."""
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    built = [p.relative_to(ROOT) for p in (ROOT / "python/gemma_norm").glob("lib/*_cpu.so")]
    for name in [*files.stdout.split(), "python/gemma_norm/_build_info.py", *built]:
        if (ROOT / name).is_file():
            (COPY / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, COPY / name)


def drawn(arguments: argparse.Namespace) -> list[Mutant]:
    of_file: list[list[Mutant]] = []
    for files, _ in [] if arguments.only == "cpp" else SUITES:
        for name in files.split():
            path = f"python/gemma_norm/{name}"
            of_file.append(list(python_mutants(path, (ROOT / path).read_text())))
    for path in [] if arguments.only == "python" else CPP_SUITES:
        of_file.append(list(cpp_mutants(path, (ROOT / path).read_text())))
    order = random.Random(arguments.seed)
    for mutants in of_file:
        order.shuffle(mutants)
    turns = [m[i] for i in range(max(map(len, of_file))) for m in of_file if i < len(m)]
    if arguments.file:
        turns = [m for m in turns if arguments.file in m.path and arguments.line in (0, m.line)]
    return turns[arguments.skip : arguments.skip + arguments.count]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--skip", type=int, default=0, help="so many of the drawn ones, which an earlier run has tried")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["python", "cpp"])
    parser.add_argument("--file", default="", help="part of a path")
    parser.add_argument("--line", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=240, help="seconds of a file of tests")
    arguments = parser.parse_args()
    copy()
    suites = {f"python/gemma_norm/{name}": tests for files, tests in SUITES for name in files.split()}
    survivors, tried = 0, 0
    with (ROOT / "build" / "mutants.md").open("a") as table:
        for mutant in drawn(arguments):
            begin, file = time.monotonic(), COPY / mutant.path
            original = file.read_text()
            file.write_text(mutant.text)
            if mutant.path in suites:
                caught: str | None = python_tests(suites[mutant.path], arguments.timeout)
            else:
                caught = cpp_tests(mutant.path, arguments.timeout)
            file.write_text(original)
            verdict = "does not compile" if caught is None else caught or "**survived**"
            seconds = time.monotonic() - begin
            line = f"| {mutant.path}:{mutant.line} | {mutant.change.replace('|', '/')} | {verdict} | {seconds:.0f} s |"
            print(line, flush=True)
            print(line, file=table, flush=True)
            tried, survivors = tried + (caught is not None), survivors + (caught == "")
    shutil.rmtree(COPY)
    print(f"{tried} faults, of which the tests noticed {tried - survivors}")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main())
