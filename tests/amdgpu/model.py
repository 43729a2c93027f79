"""How long a row takes on a GPU, by arithmetic: its bytes at the memory's speed, and its instructions at the SIMDs'
speed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    name: str
    units: int  # compute units
    simds: int  # of a unit
    ghz: float
    terabytes: float  # a second, by the data sheet
    vector_cycles: int  # that a SIMD takes for a wave's vector instruction
    root_cycles: int  # and for a root or a reciprocal

    def memory_ns(self, size: int) -> float:
        return size / self.terabytes / 1e3

    def issue_ns(self, per_row: dict[str, float]) -> float:
        """Of vector instructions alone: scalar ones, loads, stores and waits of other waves are issued at the same
        time.
        """
        roots = per_row.get("transcendental", 0)
        vector = sum(n for kind, n in per_row.items() if kind.startswith("vector"))
        return (vector * self.vector_cycles + roots * self.root_cycles) / (self.units * self.simds * self.ghz)


GPUS = {  # of each target; table() is of the first
    "gfx90a": [
        Gpu("MI210", 104, 4, 1.7, 1.6, 4, 16),
        Gpu("MI250X", 110, 4, 1.7, 1.6, 4, 16),  # one of its two dies, each of which is a GPU to HIP
    ],
    "gfx942": [
        Gpu("MI300X", 304, 4, 2.1, 5.3, 4, 16),
        Gpu("MI325X", 304, 4, 2.1, 6.0, 4, 16),
        Gpu("MI300A", 228, 4, 2.1, 5.3, 4, 16),
        Gpu("MI308X", 80, 4, 2.1, 5.3, 4, 16),
    ],
    "gfx950": [Gpu("MI355X", 256, 4, 2.4, 8.0, 4, 16), Gpu("MI350X", 256, 4, 2.2, 8.0, 4, 16)],
    "gfx1100": [Gpu("RX 7900 XTX", 96, 2, 2.3, 0.96, 1, 4)],
    "gfx1102": [Gpu("RX 7600", 32, 2, 2.25, 0.288, 1, 4)],
    "gfx1151": [Gpu("Radeon 8060S", 40, 2, 2.9, 0.256, 1, 4)],
    "gfx1201": [Gpu("RX 9070 XT", 64, 2, 2.4, 0.64, 1, 4), Gpu("RX 9060 XT", 32, 2, 2.53, 0.32, 1, 4)],
}
# GPUs on which memory takes less than twice as long as instructions for some call, and the least ratio of the two.
# docs/amd.md names them.
LEAST_MARGINS = {"MI308X": 0.7, "MI350X": 1.9}


def row_bytes(call: dict) -> int:
    """Bytes read and written. The weight comes from caches and does not count."""
    return call["hidden"] * (4 if call["dtype"] == "float32" else 2) * (4 if call["add"] else 2)


def least_margin(gpu: Gpu, calls: list[dict]) -> float:
    """How many times as long as its instructions a call's memory takes, of the call for which it is least."""
    return min(gpu.memory_ns(row_bytes(c)) / gpu.issue_ns(c["per_row"]) for c in calls)


def table(arch: str, calls: list[dict]) -> str:
    gpu, *others = GPUS[arch]
    kinds = ["vector", "vector dpp", "transcendental", "load", "store", "lds", "scalar", "scalar load", "wait"]
    lines = [" | ".join([f"{arch}, {gpu.name}", "threads", *kinds, "all", "issue ns", "memory ns", "margin"])]
    lines.append("|".join(["---"] * (len(kinds) + 6)))
    for c in calls:
        issue, memory = gpu.issue_ns(c["per_row"]), gpu.memory_ns(row_bytes(c))
        numbers = [f"{c['per_row'].get(kind, 0):.4g}" for kind in kinds] + [f"{sum(c['per_row'].values()):.4g}"]
        name = f"{'add ' if c['add'] else ''}{c['dtype']} {c['hidden']}"
        row = [name, str(c["block"]), *numbers, f"{issue:.2f}", f"{memory:.2f}", f"{memory / issue:.1f}"]
        lines.append(" | ".join(row))
    lines += [f"least margin on {g.name}: {least_margin(g, calls):.2f}" for g in [gpu, *others]]
    return "\n".join(lines)
