"""Shows what a wheel's libraries need, and fails if that is more than PyTorch and the C and C++ runtime: the path to
them (RPATH) must be left to PyTorch, and symbols of new glibc versions would keep the wheel from older systems.

    python tests/check_wheel.py <wheel> [newest glibc that may be needed, such as 2.28]
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ALLOWED = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "libgcc_s.so.1", "libstdc++.so.6"}
ALLOWED |= {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1", "libtorch.so", "libtorch_cpu.so", "libc10.so"}


def faults(library: Path, newest: str | None) -> list[str]:
    def readelf(*options: str) -> str:
        return subprocess.run(["readelf", *options, library], capture_output=True, text=True, check=True).stdout

    dynamic = readelf("-dW")
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    glibc = {tuple(map(int, v.split("."))) for v in re.findall(r"GLIBC_([\d.]+)", readelf("-VW"))}
    oldest = ".".join(map(str, max(glibc, default=(0,))))
    print(f"{library.name}: needs {', '.join(needed)}; glibc {oldest}; {library.stat().st_size / 1e6:.1f} MB")
    found = [f"{library.name} needs {name}" for name in needed if name not in ALLOWED]
    found += [f"{library.name} has a path: {line.strip()}" for line in dynamic.splitlines() if "PATH)" in line]
    if newest and max(glibc, default=(0,)) > tuple(map(int, newest.split("."))):
        found.append(f"{library.name} needs glibc {oldest}, later than {newest}")
    return found


def main(wheel: str, newest: str | None = None) -> int:
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        libraries = sorted(Path(folder).rglob("*.so*"))
        found = [fault for library in libraries for fault in faults(library, newest)]
        if not libraries:
            found.append(f"{wheel} has no library")
    print("\n".join(found) or "nothing but PyTorch and the C and C++ runtime")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
