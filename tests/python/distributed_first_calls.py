"""The first calls with DTensors in a process: run by test_distributed.py in a process of its own.

The rules are declared when a program first needs them, so each operator's first call is made in another way here.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

import gemma_norm

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
OPS = torch.ops.gemma_norm
x, gate, weight = torch.randn(4, 6, 32), torch.randn(4, 6, 32), torch.ones(32)
want = gemma_norm.add_rms_norm(x, gate, weight)
gemma_norm.rms_norm(x.to("meta"), weight.to("meta"))  # needs the shape of a result, and no rule
assert not any(name.startswith("torch.distributed.tensor") for name in sys.modules), "import gemma_norm is slow"

import torch.distributed as dist  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import DTensor, Replicate, Shard, experimental  # noqa: E402

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
X, GATE = (DTensor.from_local(t, mesh, [Shard(1)]) for t in (x, gate))
WEIGHT = DTensor.from_local(weight, mesh, [Replicate()])

with torch.inference_mode():
    y = OPS.rms_norm(X, WEIGHT)
assert y.placements == (Shard(1),)
assert torch.equal(y.to_local(), gemma_norm.rms_norm(x, weight))

with torch.inference_mode():
    made = torch.compile(gemma_norm.add_rms_norm, backend="aot_eager", fullgraph=True)(X, GATE, WEIGHT)
assert all(torch.equal(m.to_local(), w) for m, w in zip(made, want, strict=True))

with pytest.raises(RuntimeError, match=r"^fused_add_rms_norm: x is written and must be a plain tensor, got a DTensor"):
    OPS.fused_add_rms_norm(X, GATE, WEIGHT)

del experimental.register_sharding  # as in a PyTorch that has it no more
rule = r"^gated_rms_norm: x must be a plain tensor, got a DTensor: PyTorch \S+ has no torch.distributed.tensor.experim"
with pytest.raises(RuntimeError, match=rf"{rule}ental\.register_sharding, which is needed$"):
    gemma_norm.gated_rms_norm(X, GATE, WEIGHT)
with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
    gemma_norm.rms_norm(X, weight)
dist.destroy_process_group()
