"""The operators and modules under torch.distributed, in processes of their own: two, or four for meshes of 2 x 2.

They are processes of gloo, on the CPU. Where there are two GPUs, the tests also run on these, with NCCL.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import distributed_checks as checks
from distributed_support import Ranks

DEVICES = ["cpu", *(["cuda"] if torch.cuda.device_count() >= 2 else [])]
FUNCTIONS = list(checks.CALLS)


@pytest.fixture(scope="module", params=DEVICES)
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(request.param, 2, tmp_path_factory.mktemp("two"))
    yield ranks
    ranks.stop()


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks("cpu", 4, tmp_path_factory.mktemp("four"))
    yield ranks
    ranks.stop()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("check", ["rows_are_sharded", "all_is_replicated", "other_placements", "empty_shards"])
def test_rules(two, check, function):
    two.run(check, function)


@pytest.mark.parametrize(
    "check",
    [
        "bfloat16",
        "what_writes_is_refused",
        "modules_do_not_write",
        "modules_with_implicit_replication",
        "sequence_parallel_refusals",
        "local_maps",
        "one_more_operator",
        "fsdp_mixed_precision",
        "a_pipeline",
        "data_parallel",
    ],
)
def test_two_ranks(two, check):
    two.run(check)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("check", ["sequence_parallel_norms", "tensor_parallel"])
def test_sequence_parallel(two, check, compiled):
    two.run(check, compiled)


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_fsdp(two, way):
    two.run("fsdp", way)


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_compiled(two, mode):
    two.run("a_compiled_function", mode)


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("check", ["mesh_of_two_dimensions", "rows_on_a_mesh_of_two_dimensions"])
def test_meshes_of_two_ranks(two, check, mesh):
    two.run(check, *mesh)


@pytest.mark.parametrize("check", ["mesh_of_two_dimensions", "rows_on_a_mesh_of_two_dimensions"])
def test_meshes_of_four_ranks(four, check):
    four.run(check, 2, 2)


def test_first_calls():
    """And that a program without DTensors does not wait for the import of torch.distributed.tensor."""
    script = Path(__file__).with_name("distributed_first_calls.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
