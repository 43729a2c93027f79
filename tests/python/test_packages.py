"""A model that is compiled ahead of time, or split by the tracer of pipelines, and then runs elsewhere."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from block_of_norms import Block, inputs


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lower, self.upper = Block(), Block()

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.upper(*self.lower(x, residual))[0]


RUN = """
import sys, torch, gemma_norm
inputs, want = torch.load(sys.argv[2])
got = torch._inductor.aoti_load_package(sys.argv[1])(*(t.clone() for t in inputs))
torch.testing.assert_close(got, want)
"""


def test_ahead_of_time(device: str, tmp_path: Path) -> None:
    """AOTInductor's package, here and in another process, for a number of rows that it was not made with."""
    module = Block().to(device).eval()
    rows = {0: torch.export.Dim("rows", min=2, max=1024)}
    with torch.no_grad():
        program = torch.export.export(module, inputs(4, device), dynamic_shapes={"x": rows, "residual": rows})
        made = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        loaded = torch._inductor.aoti_load_package(made)
        for count in (4, 7):
            given = inputs(count, device)
            want = module(*(t.clone() for t in given))
            torch.testing.assert_close(loaded(*(t.clone() for t in given)), want)
    torch.save((given, want), tmp_path / "case.pt")
    arguments = [sys.executable, "-c", RUN, made, str(tmp_path / "case.pt")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_pipeline_is_split_and_trains(device: str) -> None:
    """By the tracer of torch.distributed.pipelining. test_distributed.py runs the stages in processes of their own."""
    from torch.distributed.pipelining import SplitPoint, pipeline

    module = Model().to(device)
    pipe = pipeline(module, mb_args=inputs(4, device), split_spec={"upper": SplitPoint.BEGINNING})
    assert pipe.num_stages == 2
    stages = [pipe.get_stage_module(i) for i in range(2)]
    for stage in stages:
        called = {str(node.target) for node in flattened(stage)}
        assert {f"gemma_norm.{op}.default" for op in ("add_rms_norm", "rms_norm", "gated_rms_norm")} <= called
    got, want = (run(f, inputs(4, device)) for f in (lambda x, r: stages[1](*stages[0](x, r)), module))
    names = [name for stage in stages for name, _ in stage.named_parameters()]
    got_gradients = torch.autograd.grad(loss(got), [p for stage in stages for p in stage.parameters()])
    want_gradients = torch.autograd.grad(loss(want), [module.get_parameter(name) for name in names])
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_gradients, want_gradients)
    assert sorted(names) == sorted(name for name, _ in module.named_parameters())


def flattened(stage: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """The nodes of the stage and of the modules in it, which are graphs too."""
    return [node for module in stage.modules() if hasattr(module, "graph") for node in module.graph.nodes]


def run(function: Callable[..., Any], given: tuple[Tensor, ...]) -> Tensor:
    result: Tensor = function(*given)
    return result


def loss(y: Tensor) -> Tensor:
    return F.silu(y).square().sum()
