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

import distributed_rules as rules
import distributed_training as training
from distributed_support import Ranks

DEVICES = ["cpu", *(["cuda"] if torch.cuda.device_count() >= 2 else [])]
FUNCTIONS = list(rules.CALLS)


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
@pytest.mark.parametrize(
    "check", [rules.rows_are_sharded, rules.all_is_replicated, rules.other_placements, rules.empty_shards]
)
def test_rules(two, check, function):
    two.run(check, function)


@pytest.mark.parametrize(
    "check",
    [
        rules.one_result_is_used,
        rules.bfloat16,
        rules.what_writes_is_refused,
        rules.modules_do_not_write,
        rules.modules_with_implicit_replication,
        training.sequence_parallel_refusals,
        rules.local_maps,
        rules.rotated_heads,
        rules.one_more_operator,
        training.fsdp_mixed_precision,
        training.a_pipeline,
        training.data_parallel,
    ],
)
def test_two_ranks(two, check):
    two.run(check)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("check", [training.sequence_parallel_norms, training.tensor_parallel])
def test_sequence_parallel(two, check, compiled):
    two.run(check, compiled)


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_fsdp(two, way):
    two.run(training.fsdp, way)


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_compiled(two, mode):
    two.run(rules.a_compiled_function, mode)


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("check", [training.mesh_of_two_dimensions, rules.rows_on_a_mesh_of_two_dimensions])
def test_meshes_of_two_ranks(two, check, mesh):
    two.run(check, *mesh)


@pytest.mark.parametrize("check", [training.mesh_of_two_dimensions, rules.rows_on_a_mesh_of_two_dimensions])
def test_meshes_of_four_ranks(four, check):
    four.run(check, 2, 2)


def test_first_calls():
    """And that a program without DTensors does not wait for the import of torch.distributed.tensor."""
    script = Path(__file__).with_name("distributed_first_calls.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
