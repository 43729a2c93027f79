"""fuse_rotation and a gate beside each head of q: which statements are known, and that the gate is what it was."""

from __future__ import annotations

import pytest
import torch

from gemma_norm.integrations.transformers import patch, unpatch
from test_transformers_rotation import Attention, Rotations, whole
from tiny_models import logits, model


class Gated(Attention):
    """q is [batch, tokens, heads, 2 * head_dim], each head's q before its gate."""

    def forward(self, q, k, cos, sin):
        sizes = q.shape[:-2]
        q, gate = torch.chunk(q, 2, dim=-1)
        gate = gate.reshape(*sizes, -1)
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        q, k = whole(q, k, cos, sin)
        return q, k, gate


class GateBetween(Attention):
    def forward(self, q, k, cos, sin):
        sizes = q.shape[:-2]
        q, gate = torch.chunk(q, 2, dim=-1)
        q = self.q_norm(q).transpose(1, 2)
        gate = gate.reshape(*sizes, -1)
        k = self.k_norm(k).transpose(1, 2)
        q, k = whole(q, k, cos, sin)
        return q, k, gate * 2


class GateRead(Attention):
    def forward(self, q, k, cos, sin):
        sizes = q.shape[:-2]
        q, gate = torch.chunk(q, 2, dim=-1)
        gate = gate.reshape(*sizes, -1)
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        twice = gate * 2
        q, k = whole(q, k, cos, sin)
        return q, k, twice


class GateOfOtherSizes(Attention):
    def forward(self, q, k, cos, sin):
        sizes = q.shape[:-2]
        q, gate = torch.chunk(q, 2, dim=-1)
        gate = gate.reshape(*sizes, -1)
        sizes = sizes[:1]
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        q, k = whole(q, k, cos, sin)
        return q, k, gate * len(sizes)


class GateInRows(Attention):
    def forward(self, q, k, cos, sin):
        q, gate = torch.chunk(q, 2, dim=-1)
        gate = gate.reshape(-1, 16)
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        q, k = whole(q, k, cos, sin)
        return q, k, gate * 2


class GateUnderACondition(Attention):
    def forward(self, q, k, cos, sin):
        sizes = q.shape[:-2]
        q, gate = torch.chunk(q, 2, dim=-1)
        if sizes:
            gate = gate.reshape(*sizes, -1)
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        q, k = whole(q, k, cos, sin)
        return q, k, gate * 2


class GateOfThree(Attention):
    def forward(self, q, k, cos, sin):
        sizes = q.shape[:-2]
        q, gate, _ = torch.split(q, [16, 8, 8], dim=-1)
        gate = gate.reshape(*sizes, -1)
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        q, k = whole(q, k, cos, sin)
        return q, k, gate * 2


def gated_arguments(heads: int) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    sizes = (2, 5, heads, 32), (2, 5, 2, 16), (2, 5, 16), (2, 5, 16)
    return tuple(torch.randn(*size, generator=random).bfloat16() for size in sizes)


# The name that the report gives, and whether the operator then copies the gate of four heads.
GATES = {
    Gated: ("gate", True),
    GateBetween: ("gate", True),
    GateRead: ("", False),
    GateOfOtherSizes: ("", False),
    GateInRows: ("gate", False),
    GateUnderACondition: ("", False),
    GateOfThree: ("", False),
}


@pytest.mark.parametrize("kind", GATES)
def test_which_gates_are_known(kind):
    attention, arguments = kind().bfloat16(), gated_arguments(4)
    patch(attention)
    want = attention(*arguments)
    unpatch(attention)
    report = patch(attention, fuse_rotation=True)
    name, copied = GATES[kind]
    assert [row.gate for row in report.rotated] == [name]
    with Rotations() as seen:
        got = attention(*arguments)
    assert (seen.calls, seen.gates) == (1, copied) and not report.rotations
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(got, want, strict=True))


def test_a_gate_that_is_not_copied_stays_a_view():
    attention, arguments = Gated().bfloat16(), gated_arguments(1)
    assert patch(attention, fuse_rotation=True).rotated[0].gate == "gate"
    assert attention(*arguments)[2].data_ptr() == arguments[0][..., 16:].data_ptr()


def test_a_gate_where_the_rotation_stays_apart():
    results = []
    for fuse in (False, True):
        m = model("Qwen3_5Text", torch.bfloat16)
        report = patch(m, fuse_rotation=fuse)
        next(n for name, n in m.named_modules() if name.endswith("k_norm")).eps = 1e-3
        with Rotations() as seen:
            results.append(logits(m))
        assert seen.calls == 0
    assert torch.equal(*results) and list(report.rotations.values()) == [1]
