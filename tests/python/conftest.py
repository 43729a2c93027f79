"""Every test that takes ``device`` runs on the CPU and on each kind of GPU that this PyTorch sees."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

# It must be set before torch is imported. Else threads that wait for one another keep their CPU busy, which takes
# minutes where CPUs are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import Phase, settings

import gemma_norm
from benchmark_support import earlier as earlier
from emulated_device import emulated as emulated  # fixtures, for every test
from fake_peers import hip as hip
from fake_peers import peers as peers

settings.register_profile("default", deadline=None, derandomize=True, max_examples=60, print_blob=True)
settings.register_profile("unshrunk", settings.get_profile("default"), phases=(Phase.explicit, Phase.generate))
settings.load_profile("default")

# A shell starts what it puts into the background deaf to Ctrl-C, which processes inherit. Tests of Ctrl-C send it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=[False, True], ids=["plain", "gemma"])
def gemma(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(params=[gemma_norm.RMSNorm, gemma_norm.GemmaRMSNorm], ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> type[gemma_norm.RMSNorm]:
    return request.param


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def inductor_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each run has a cache of its own, so that a kernel that another run compiled cannot hide a failure."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))
