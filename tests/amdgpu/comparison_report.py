"""Tables of what compare.py measured, in Markdown."""

from __future__ import annotations

from statistics import geometric_mean

from oracle import HEADS_OF_TOKEN
from published import FITTED, FROM_HOST, HELD_OUT, OLDER, TIMINGS, Measured
from timing import Kernel, Timing, kernel_us, looping_us
from toolchain import TARGETS
from wave_trace import Event, Op

ROWS = (1, 64, 1024, 8192, 32768)  # of the tables of times; times HEADS for rows of heads
HEADS = 16
WIDTHS = (128, 64, 32, 16)
KINDS = ["vector", "packed", "transcendental", "scalar", "scalar load", "lds", "barrier"]
WAITS = ["load", "store", "lds", "scalar load", "nothing"]


def kernel_of(record: dict, arch: str) -> Kernel:
    def event(unit: str, width: int, waits: list, size: int, fresh: int) -> Event:
        return Event(Op(unit, width, tuple((counter, left) for counter, left in waits)), size, fresh)

    waves = [[event(*e) for e in wave] for wave in record["waves"]]
    return Kernel(record["isa"], waves, TARGETS[arch].waves(record["registers"]), record["lds"])


def predicted_us(result: dict, timing: Timing, rows: int) -> float:
    """Of all kernels of a call."""
    arch = result["arch"]
    if "looping" not in result:
        return sum(
            kernel_us(kernel_of(record, arch), timing, -(-rows // max(1, round(record["rows"]))))
            for record in result["launches"]
        )
    if str(rows) in result.get("exact", {}):
        return sum(
            kernel_us(kernel_of(record, arch), timing, record["blocks"]) for record in result["exact"][str(rows)]
        )
    most = timing.gpu.units if result["loop_blocks"] == "units" else result["loop_blocks"]
    blocks = min(rows, most)
    (few, *_), (more, *rest) = result["launches"], result["looping"]
    loops = [(kernel_of(record, arch), record["rows"]) for record in (few, more)]
    loops_us = looping_us(*loops, timing, blocks, rows / blocks)
    # Loads of one row overlap the previous row's work, so a short loop can look faster than memory. Over many rows it
    # cannot be, so memory's time is the least.
    counts = per_row(result)
    moved = sum(counts.get(k, 0) for k in ("bytes loaded", "bytes stored")) * rows
    by_memory = timing.launch_us + moved / timing.share(1) / 1e3
    return max(loops_us, by_memory if rows > blocks else 0) + sum(
        kernel_us(kernel_of(record, arch), timing, record["blocks"]) for record in rest
    )


def per_row(result: dict) -> dict[str, float]:
    """Counts of a row, of all kernels. Where blocks loop, those of a further row of a loop."""
    if "looping" not in result:
        counts = [(record["counts"], record["rows"]) for record in result["launches"]]
        return {k: sum(c.get(k, 0) / rows for c, rows in counts) for k in {k for c, _ in counts for k in c}}
    few, more = result["launches"][0], result["looping"][0]
    rows = more["rows"] - few["rows"]
    return {k: (n - few["counts"].get(k, 0)) / rows for k, n in more["counts"].items()}


def _number(n: float) -> str:
    return f"{n:.1f}".rstrip("0").rstrip(".") if n < 100 else f"{n:.0f}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [" | ".join(head), "|".join(["---"] * len(head)), *(" | ".join(row) for row in rows), ""]


def _name(result: dict) -> str:
    return f"{result['op']} {result['dtype']} {result['hidden']}"


def counts_table(results: list[dict]) -> list[str]:
    head = ["", "", "largest error, ulp or codes", "rounds", "threads", "registers", "waves a SIMD", *KINDS]
    head += ["loads of 128/64/32/16 bits", "stores", f"waits for {'/'.join(WAITS)}", "KB read", "again", "written"]
    rows = []
    for r in results:
        if "error" in r:
            rows.append([_name(r), r["implementation"], f"did not run: {r['error'][:80]}"] + [""] * (len(head) - 3))
            continue
        n, first = per_row(r), (r.get("looping") or r["launches"])[0]
        errors = ", ".join(f"{name} {error:g}" for name, error in r["errors"].items())
        widths = ["/".join(_number(n.get(f"{unit} {bits}", 0)) for bits in WIDTHS) for unit in ("load", "store")]
        waits = "/".join(_number(n.get(f"wait for {kind}", 0)) for kind in WAITS)
        bytes_ = [_number(n.get(k, 0) / 1024) for k in ("bytes loaded", "bytes loaded again", "bytes stored")]
        registers = first["registers"]
        rows.append(
            [_name(r), r["implementation"], errors, r["rounds"], str(first["threads"]), str(registers),
             str(TARGETS[r["arch"]].waves(registers)), *(_number(n.get(k, 0)) for k in KINDS), *widths, waits, *bytes_]
        )  # fmt: skip
    return _table(head, rows)


def row_bytes(result: dict) -> float:
    """What memory has to move for a row, of all that the operator takes and gives. The cosines and sines of a token, in
    float32, serve all its heads.
    """
    tensors = {"rms_norm": 2, "add_rms_norm": 4, "rms_norm_add_rms_norm": 4, "gated_rms_norm": 3,
               "rms_norm_backward": 3, "gated_rms_norm_backward": 5, "qk_norm_rope": 2, "rms_norm_quant": 1,
               "add_rms_norm_quant": 3, "gated_rms_norm_quant": 2}  # fmt: skip
    other = 1 if result["op"].endswith("quant") else 4 / HEADS_OF_TOKEN if result["op"] == "qk_norm_rope" else 0
    size = 4 if result["dtype"] == "float32" else 2
    return (tensors[result["op"]] * size + other) * result["hidden"]


def row_counts(result: dict) -> list[int]:
    return [n * (HEADS if result["hidden"] <= 256 else 1) for n in ROWS]


def times_table(results: list[dict], timing: Timing) -> list[str]:
    head = [timing.gpu.name, "rows", "memory alone", *(names := sorted({r["implementation"] for r in results}))]
    rows = []
    for name in dict.fromkeys(_name(r) for r in results):
        found = {r["implementation"]: r for r in results if _name(r) == name and "error" not in r}
        if not found:
            continue
        any_one = next(iter(found.values()))
        for count in row_counts(any_one):
            memory = row_bytes(any_one) * count / timing.share(1) / 1e3
            times = [f"{predicted_us(found[k], timing, count):.2f}" if k in found else "" for k in names]
            rows.append([name, str(count), f"{memory:.2f}", *times])
    return _table(head, rows)


def check(measured: list[Measured], results: list[dict]) -> tuple[list[str], list[float]]:
    """Measured and predicted times, and the second over the first."""
    rows, ratios = [], []
    for m in measured:
        for arch, timings in TIMINGS.items():
            for timing in timings:
                wanted = (m.implementation, m.op, m.dtype, m.hidden)
                for r in results:
                    found = (r["implementation"], r["op"], r["dtype"], r["hidden"]) == wanted and r["arch"] == arch
                    if found and timing.gpu.name == m.gpu and "error" not in r:
                        us = predicted_us(r, timing, m.rows)
                        ratios.append(us / m.us)
                        shape = f"{m.op} {m.dtype} {m.rows} x {m.hidden}"
                        rows.append([m.gpu, m.implementation, shape, f"{m.us:.2f}", f"{us:.2f}",
                                     f"{us / m.us:.2f}", m.source])  # fmt: skip
    return _table(["", "", "", "measured us", "model us", "ratio", "source"], rows), ratios


def spread(ratios: list[float]) -> str:
    if not ratios:
        return "none of these kernels was compared"
    off = [max(r, 1 / r) for r in ratios]
    return f"{len(ratios)} times, off by a factor of {geometric_mean(off):.2f} on average, {max(off):.2f} at most"


def latest(results: list[dict]) -> list[dict]:
    """Without those that a later result of the same call replaces."""
    return list({(r["arch"], _name(r), r["implementation"]): r for r in results}.values())


def report(results: list[dict]) -> str:
    lines = []
    results = latest(results)
    for arch in dict.fromkeys(r["arch"] for r in results):
        here = [r for r in results if r["arch"] == arch]
        lines += [f"## {arch}", "", "Wave instructions a row:", "", *counts_table(here)]
        for timing in TIMINGS[arch]:
            lines += ["Microseconds, by the model:", "", *times_table(here, timing)]
    published = {"fitted": FITTED, "held out": HELD_OUT, "perhaps of an older kernel": OLDER}
    for title, measured in (published | {"timed from the host": FROM_HOST}).items():
        table, ratios = check(measured, results)
        lines += [f"## The model beside published measurements, {title}", "", spread(ratios), "", *table]
    return "\n".join(lines)
