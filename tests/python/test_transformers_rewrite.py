"""Which statements of a layer's forward are rewritten, and that everything else is refused."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from gemma_norm.integrations import _source
from gemma_norm.integrations.transformers import patch
from tiny_models import Additions


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(size)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class Layer(nn.Module):
    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.norm = Norm(size)
        self.__scale = 0.5


class Known(Layer):
    def forward(self, h, residual):
        h = h * self._Layer__scale
        h = residual + h
        residual = h
        h = self.norm(h)
        return h + residual


class OtherNorm(Layer):
    def forward(self, h, residual):
        h = residual + h
        residual = h
        h = self.norm(residual)
        return h + residual


class Between(Layer):
    def forward(self, h, residual):
        h = residual + h
        h = h.clone()
        residual = h
        h = self.norm(h)
        return h + residual


class Subtracted(Layer):
    def forward(self, h, residual):
        h = residual - h
        residual = h
        h = self.norm(h)
        return h + residual


class Keyword(Layer):
    def forward(self, h, residual):
        h = residual + h
        residual = h
        h = self.norm(x=h)
        return h + residual


class Lambda(Layer):
    forward = lambda self, h, residual: self.norm(h + residual)  # noqa: E731


class Super(Layer):
    def forward(self, h, residual):
        super().extra_repr()
        h = residual + h
        residual = h
        h = self.norm(h)
        return h + residual


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (OtherNorm, "no addition of a known form before a norm"),
        (Between, "no addition of a known form before a norm"),
        (Subtracted, "no addition of a known form before a norm"),
        (Keyword, "no addition of a known form before a norm"),
        (Lambda, "its forward is a lambda"),
        (Super, "its forward refers to variables of a scope around it"),
    ],
)
def test_forms_that_are_not_known_are_refused(kind, reason):
    layers = nn.ModuleList([kind()])
    report = patch(layers, fuse_residual=True)
    assert not report.fused and [(row.name, row.reason) for row in report.unfused] == [("0", reason)]
    assert type(layers[0]) is kind and len(report.replaced) == 1


def test_a_known_form_in_a_class_of_ones_own():
    report = patch(nn.ModuleList([Known()]), fuse_residual=True)
    assert [(row.name, row.norm, row.across) for row in report.fused] == [("0", "0.norm", False)]


def test_source_that_is_not_what_runs_is_refused(monkeypatch):
    """As when a file was edited after it was imported."""
    source = "    def forward(self, h, residual):\n        h = residual + h\n        return h\n"
    monkeypatch.setattr(_source.inspect, "getsource", lambda _: source)
    assert _source._source(Known) == "its forward's source is not what the class runs"


def test_a_decorator_of_unknown_form_is_refused():
    def decorator(function):
        class Wrapped:
            def __call__(self, *args):
                return function(*args)

        return functools.update_wrapper(Wrapped(), function)

    wrapped = type("Wrapped", (Layer,), {"forward": decorator(Known.forward)})
    assert _source._source(wrapped) == "its forward is wrapped by a decorator of a form that is not known"


def test_tracebacks_name_the_line_of_the_original():
    layer = Known()
    patch(nn.ModuleList([layer]), fuse_residual="layer")
    with pytest.raises(RuntimeError, match="must match the size") as error:
        layer(torch.randn(2, 16), torch.randn(2, 15))
    lines = [str(entry.statement) for entry in error.traceback if entry.name == "forward"]
    assert lines[0].strip() == "h = residual + h"


def test_a_residual_of_another_dtype_is_added_apart():
    """As residual_in_fp32: the sum is float32, and so the operator's other result would not be what the norm gives."""
    layer = Known(16).bfloat16()
    plain = Known(16).bfloat16()
    plain.load_state_dict(layer.state_dict())
    patch(plain)
    report = patch(nn.ModuleList([layer]), fuse_residual="layer")
    x = torch.randn(3, 16)
    with Additions() as additions:
        assert torch.equal(layer(x.bfloat16(), x), plain(x.bfloat16(), x)) and not additions.calls
        assert next(iter(report.additions))[1] == "the residual has another shape or dtype"
        assert torch.equal(layer(x.bfloat16(), x.bfloat16()), plain(x.bfloat16(), x.bfloat16()))
        assert len(additions.calls) == 1


class TwoNorms(Layer):
    def __init__(self, size: int = 16) -> None:
        super().__init__(size)
        self.post = Norm(size)


class NormBefore(TwoNorms):
    def forward(self, h, residual):
        h = self.post(h)
        h = residual + h
        residual = h
        h = self.norm(h)
        return h + residual


class NormBeforeOnTheLeft(TwoNorms):
    def forward(self, h, residual):
        h = h * 2
        h = self.post(h)
        h = h + residual
        residual = h
        h = self.norm(h)
        return h * residual


class NormBeforeOfAnotherName(TwoNorms):
    def forward(self, h, residual):
        n = self.post(h)
        h = residual + n
        residual = h
        h = self.norm(h)
        return h + residual


class NormBeforeTwice(TwoNorms):
    def forward(self, h, residual):
        h = self.post(h)
        h = h + h
        residual = h
        h = self.norm(h)
        return h + residual


class NormBeforeAndMore(TwoNorms):
    def forward(self, h, residual):
        h = self.post(h)
        h = residual * 2 + h
        residual = h
        h = self.norm(h)
        return h + residual


class SomethingBetween(TwoNorms):
    def forward(self, h, residual):
        h = self.post(h)
        h = h.clone()
        h = residual + h
        residual = h
        h = self.norm(h)
        return h + residual


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "before"),
    [
        (NormBefore, "0.post"),
        (NormBeforeOnTheLeft, "0.post"),
        (NormBeforeOfAnotherName, ""),
        (NormBeforeTwice, ""),
        (NormBeforeAndMore, ""),
        (SomethingBetween, ""),
    ],
)
def test_a_norm_before_the_addition(kind, before, dtype):
    layer, plain = kind().to(dtype), kind().to(dtype)
    plain.load_state_dict(layer.state_dict())
    patch(plain)
    report = patch(nn.ModuleList([layer]), fuse_residual="layer")
    assert [(row.norm, row.before) for row in report.fused] == [("0.norm", before)]
    x, residual = torch.randn(3, 16).to(dtype), torch.randn(3, 16).to(dtype)
    with Additions() as additions:
        assert torch.equal(layer(x, residual), plain(x, residual))
    want = "rms_norm_add_rms_norm" if before else "add_rms_norm"
    assert additions.calls == [f"gemma_norm.{want}.default"]


def test_a_norm_that_is_not_ours_stays_before_the_addition():
    layer = NormBefore()
    layer.post = nn.LayerNorm(16)
    plain = NormBefore()
    plain.post = nn.LayerNorm(16)
    plain.load_state_dict(layer.state_dict())
    patch(plain)
    report = patch(nn.ModuleList([layer]), fuse_residual="layer")
    assert [(row.norm, row.before) for row in report.fused] == [("0.norm", "")]
    x, residual = torch.randn(3, 16), torch.randn(3, 16)
    assert torch.equal(layer(x, residual), plain(x, residual))
