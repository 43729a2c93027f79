"""GPUs as the timing model takes them, and published measurements of kernels that the comparison holds.

Units, clocks and bandwidths are those of AMD's data sheets (model.py). How much of its bandwidth a memory gives, a
load's latency and a launch are effective values: those of MI308X and MI350X are fitted to FITTED, and the others are
taken from these two or assumed, as the comments say.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from model import GPUS
from timing import Timing


@dataclass(frozen=True)
class Measured:
    gpu: str
    implementation: str
    op: str
    dtype: str
    rows: int
    hidden: int
    us: float
    source: str


def _gpu(arch: str, name: str, **constants: float) -> Timing:
    return Timing(next(gpu for gpu in GPUS[arch] if gpu.name == name), **constants)


_MI308X = _gpu("gfx942", "MI308X", reached=0.5, load_ns=700, launch_us=1.1, alone_us=0.4)
_MI350X = _gpu(
    "gfx950", "MI350X", reached=0.73, load_ns=400, store_ns=200, launch_us=1.9, alone_us=1.1, lds_kilobytes=160
)
_RDNA = {"load_ns": 500, "launch_us": 1.0, "alone_us": 1.0, "scalar_cycles": 1, "unit_bytes": 64}

TIMINGS: dict[str, list[Timing]] = {
    # Of one of the two dies that HIP shows as GPUs. Latency and launch assumed, as those of the MI308X.
    "gfx90a": [_gpu("gfx90a", "MI250X", reached=0.8, load_ns=700, launch_us=1.1, alone_us=0.4)],
    "gfx942": [
        _MI308X,
        # The same die, more of them: bandwidth reached as published for streaming, 70 to 80 %.
        replace(_MI308X, gpu=GPUS["gfx942"][0], reached=0.77),
        replace(_MI308X, gpu=GPUS["gfx942"][1], reached=0.77),
    ],
    "gfx950": [_MI350X, replace(_MI350X, gpu=GPUS["gfx950"][0])],
    # Bandwidth reached, latency and launch assumed.
    "gfx1100": [_gpu("gfx1100", "RX 7900 XTX", reached=0.85, **_RDNA)],
    "gfx1201": [_gpu("gfx1201", "RX 9070 XT", reached=0.85, **_RDNA)],
}

_FLYDSL = "ROCm/FlyDSL#848"
_FITTED = {  # aiter's Triton kernel in bfloat16: by GPU and hidden size, rows and microseconds
    ("MI308X", 512): {1: 1.71, 16: 2.26, 128: 3.10, 1024: 10.59, 8192: 84.95},
    ("MI308X", 1024): {1: 1.83, 16: 2.43, 128: 3.13, 1024: 10.45, 8192: 68.89},
    ("MI350X", 512): {1: 1.92, 16: 2.78, 128: 2.79, 1024: 4.38, 8192: 18.49},
    ("MI350X", 1024): {1: 1.91, 16: 2.83, 128: 2.92},
}
FITTED = [
    Measured(gpu, "aiter Triton", "rms_norm", "bfloat16", rows, hidden, us, _FLYDSL)
    for (gpu, hidden), times in _FITTED.items()
    for rows, us in times.items()
]
# Not used in fitting.
HELD_OUT = [
    Measured("MI308X", "aiter CK", "rms_norm", "bfloat16", 16, 256, 3.02, "ROCm/aiter#3747"),
    Measured("MI308X", "aiter CK", "add_rms_norm", "bfloat16", 16, 256, 3.10, "ROCm/aiter#3747"),
    Measured("MI308X", "aiter CK", "rms_norm", "bfloat16", 16, 512, 3.04, "ROCm/aiter#3747"),
    Measured("MI308X", "aiter CK", "add_rms_norm", "bfloat16", 16, 512, 3.37, "ROCm/aiter#3747"),
    Measured("MI308X", "aiter Triton", "rms_norm", "bfloat16", 16, 256, 2.75, "ROCm/aiter#3747"),
    Measured("MI308X", "aiter Triton", "add_rms_norm", "bfloat16", 16, 256, 3.24, "ROCm/aiter#3747"),
    Measured("MI308X", "aiter Triton", "rms_norm", "bfloat16", 16, 512, 2.60, "ROCm/aiter#3747"),
    Measured("MI308X", "aiter Triton", "add_rms_norm", "bfloat16", 16, 512, 2.82, "ROCm/aiter#3747"),
    Measured("MI308X", "aiter CK", "rms_norm", "bfloat16", 16, 2000, 3.47, "ROCm/aiter#3747"),
    Measured("MI308X", "aiter Triton", "rms_norm", "bfloat16", 16, 2000, 2.95, "ROCm/aiter#3747"),
]
# Of aiter's Triton norm before that change; whether PyPI's package has the same one is not known. The last is of a GPU
# that is called MI35XX there.
OLDER = [
    Measured("MI308X", "aiter Triton", "rms_norm", "float16", 364800, 128, 2692.84, "ROCm/aiter#1350"),
    Measured("MI308X", "aiter Triton", "rms_norm", "float16", 16380, 1536, 148.24, "ROCm/aiter#1350"),
    Measured("MI350X", "aiter Triton", "rms_norm", "float16", 364800, 128, 1004.10, "ROCm/aiter#1350"),
]
# Of the same kernels, but timed from the host, the launch included: at 1024 elements these take 15 and 37 us.
FROM_HOST = [
    Measured("MI300X", "Liger", "rms_norm", "float16", 2048, 8192, 30.16, "meta-pytorch/tritonbench#191"),
    Measured("MI300X", "Liger", "rms_norm", "float16", 2048, 16384, 56.68, "meta-pytorch/tritonbench#191"),
    Measured("MI300X", "aiter Triton", "rms_norm", "float16", 2048, 8192, 39.53, "meta-pytorch/tritonbench#191"),
    Measured("MI300X", "aiter Triton", "rms_norm", "float16", 2048, 16384, 69.26, "meta-pytorch/tritonbench#191"),
]
