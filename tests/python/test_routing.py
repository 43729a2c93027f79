"""``forward_hip``'s routes, on CPU tensors, with stand-ins for the other packages.

Their signatures are the published ones. ROCm/aiter, aiter/ops/rmsnorm.py: rmsnorm2d_fwd, rmsnorm2d_fwd_with_add and
rmsnorm, with ``gemma_norm`` (since ROCm/aiter#3872, which dropped it beyond hidden 8192) and without; its
aiter/jit/utils/torch_guard.py: wrappers of ``*args`` around operators ``torch.ops.aiter.<name>``. vllm-project/vllm,
csrc/torch_bindings.cpp: rms_norm and the 4-argument fused_add_rms_norm. AMD's branches of ROCm/vllm: 6 arguments, in
the order of the call in sgl-project/sglang#21188 (sgl-project/sglang#31553 has both). Like the originals, the
stand-ins want contiguous tensors of one dtype.
"""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Iterator
from dataclasses import replace

import gemma_norm
import pytest
import torch
from gemma_norm import GemmaRMSNorm, RMSNorm, _library, reference, routing
from support import assert_right, assert_same_bits, place, randn
from torch import Tensor

BF16 = torch.bfloat16
called: list[str] = []
FOUR = "fused_add_rms_norm(Tensor! input, Tensor! residual, Tensor weight, float epsilon) -> ()"
SIX = (
    "fused_add_rms_norm(Tensor! out, Tensor input, Tensor! residual_out, Tensor residual, Tensor weight, "
    "float epsilon) -> ()"
)


def norm(name: str, out: Tensor, x: Tensor, weight: Tensor, eps: float, gemma: bool, others: tuple[Tensor, ...] = ()):
    called.append(name)
    for t in (out, x, weight, *others):
        assert t.is_contiguous() and t.dtype == x.dtype and t.dim() == (1 if t is weight else 2)
    out.copy_(reference.rms_norm(x, weight, eps, gemma))


def make_aiter(flag: bool) -> types.ModuleType:
    def rmsnorm2d_fwd(input: Tensor, weight: Tensor, epsilon: float, use_model_sensitive_rmsnorm: int = 0) -> Tensor:
        out = torch.empty_like(input)
        norm("aiter", out, input, weight, epsilon, False)
        return out

    def rmsnorm(out: Tensor, input: Tensor, weight: Tensor, epsilon: float, gemma_norm: bool = False) -> None:
        norm("aiter", out, input, weight, epsilon, gemma_norm)

    def rmsnorm2d_fwd_with_add(
        out: Tensor,
        input: Tensor,
        residual_in: Tensor,
        residual_out: Tensor,
        weight: Tensor,
        epsilon: float,
        gemma_norm: bool = False,
        use_model_sensitive_rmsnorm: int = 0,
    ) -> None:
        torch.add(input, residual_in, out=residual_out)
        gemma = gemma_norm and input.shape[-1] <= 8192
        norm("aiter", out, residual_out, weight, epsilon, gemma, (input, residual_in))

    def with_add_before(
        out: Tensor,
        input: Tensor,
        residual_in: Tensor,
        residual_out: Tensor,
        weight: Tensor,
        epsilon: float,
        use_model_sensitive_rmsnorm: int = 0,
    ) -> None:
        assert use_model_sensitive_rmsnorm == 0
        rmsnorm2d_fwd_with_add(out, input, residual_in, residual_out, weight, epsilon)

    def rmsnorm_before(out: Tensor, input: Tensor, weight: Tensor, epsilon: float) -> None:
        norm("aiter", out, input, weight, epsilon, False)

    package = types.ModuleType("aiter")
    package.rmsnorm2d_fwd = rmsnorm2d_fwd
    package.rmsnorm2d_fwd_with_add = rmsnorm2d_fwd_with_add if flag else with_add_before
    package.rmsnorm = rmsnorm if flag else rmsnorm_before
    return package


def guard(package: types.ModuleType, library: torch.library.Library) -> None:
    """What aiter's torch_compile_guard makes of the functions."""
    mutated = {"rmsnorm2d_fwd": [], "rmsnorm": ["out"], "rmsnorm2d_fwd_with_add": ["out", "residual_out"]}
    for name, names in mutated.items():
        function = getattr(package, name)
        annotations = {n: {"Tensor": Tensor, "None": None}.get(t) for n, t in function.__annotations__.items()}
        scalars = {"float": float, "int": int, "bool": bool}
        function.__annotations__ = {n: annotations[n] or scalars.get(t) for n, t in function.__annotations__.items()}
        library.define(name + torch.library.infer_schema(function, mutates_args=names))
        library.impl(name, function, "CPU")
        setattr(package, name, lambda *args, _name=name, **kwargs: getattr(torch.ops.aiter, _name)(*args, **kwargs))


def four(input: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> None:
    residual.add_(input)
    norm("vllm", input, residual, weight, epsilon, False, (residual,))


def six(out: Tensor, input: Tensor, residual_out: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> None:
    torch.add(input, residual, out=residual_out)
    norm("vllm", out, residual_out, weight, epsilon, False, (input, residual))


def forget() -> None:
    for function in (routing.choose, routing._say, routing._aiter, routing._vllm):
        function.cache_clear()
    called.clear()


@pytest.fixture(autouse=True)
def peers(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[object]:
    """Nothing is installed until the returned function says so; messages of every level are kept."""
    for name in ("aiter", "vllm", "vllm._custom_ops"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delenv("GEMMA_NORM_BACKEND", raising=False)
    caplog.set_level(logging.INFO, "gemma_norm")
    forget()
    libraries = []

    def install(*names: str) -> None:
        for name in names:
            if name.startswith("aiter"):
                package = make_aiter("flag" in name)
                if "guarded" in name:
                    libraries.append(torch.library.Library("aiter", "FRAGMENT"))
                    guard(package, libraries[-1])
                monkeypatch.setitem(sys.modules, "aiter", package)
            else:
                schema, function = {"vllm4": (FOUR, four), "vllm6": (SIX, six)}.get(name, (name, None))
                libraries.append(torch.library.Library("_C", "FRAGMENT"))
                for text, run in (
                    ("rms_norm(Tensor! result, Tensor input, Tensor? weight, float epsilon) -> ()", None),
                    (schema, function),
                ):
                    libraries[-1].define(text)
                    run = run or (lambda out, x, weight, eps: norm("vllm", out, x, weight, eps, False))
                    libraries[-1].impl(text.partition("(")[0], run, "CPU")
                monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
                monkeypatch.setitem(sys.modules, "vllm._custom_ops", types.ModuleType("vllm._custom_ops"))

    yield install
    for library in libraries:
        library._destroy()
    forget()


def make(kind: type[RMSNorm], hidden: int, dtype: torch.dtype = BF16, backend: str = "auto") -> RMSNorm:
    module = kind(hidden, dtype=dtype, backend=backend)
    with torch.no_grad():
        module.weight.add_(randn(hidden, seed=9).to(dtype) / 20)
    return module.requires_grad_(False)


ROUTES = [
    ("aiter flag", GemmaRMSNorm, BF16),
    ("aiter guarded flag", GemmaRMSNorm, torch.float16),
    ("aiter before", RMSNorm, BF16),
    ("vllm4", RMSNorm, BF16),
    ("vllm6", RMSNorm, BF16),
    ("vllm4", GemmaRMSNorm, torch.float32),
    ("torch", GemmaRMSNorm, BF16),
]


@pytest.mark.parametrize("layout", ["contiguous", "aligned slice of qkv", "heads before tokens", "two odd strides"])
@pytest.mark.parametrize("route, kind, dtype", ROUTES, ids=lambda value: getattr(value, "__name__", str(value)))
@torch.no_grad()
def test_every_route_is_right_in_place_and_at_any_stride(peers, route, kind, dtype, layout):
    if route != "torch":
        peers(route)
    module = make(kind, 64, dtype, "torch" if route == "torch" else "auto")
    values = [randn(6, 4, 64, dtype=dtype, seed=seed) for seed in range(3)]
    expected = {"torch": []}.get(route, [route[:5].replace("4", "").replace("6", "").strip()])
    q = place(values[0], layout)
    assert_right(module.forward_hip(q.view), values[0], module.weight, gemma=module.gemma)
    assert_same_bits(q.view, values[0])
    assert called == expected
    for post in (None, values[2]):
        called.clear()
        x, residual = place(values[0], layout), place(values[1], layout)
        y, s = module.forward_hip(x.view, residual.view, post)
        assert y is x.view and s is residual.view and called == expected
        assert_same_bits(s, values[0] + (values[1] if post is None else values[1] + post))
        assert_right(y, s, module.weight, gemma=module.gemma)
        x.assert_gaps_intact()
        residual.assert_gaps_intact()
    called.clear()
    assert module.forward_hip(q.view[:0]).shape == (0, 4, 64) and called == []
    with pytest.raises(RuntimeError, match="post_residual_addition needs a residual"):
        module.forward_hip(q.view, None, values[2])
    with pytest.raises(RuntimeError, match=r"weight must have shape \[32\]"):
        module.forward_hip(values[0][..., :32])


@torch.no_grad()
def test_the_order_and_what_is_said_once(peers, caplog):
    for installed, chosen in (((), ""), (("vllm4",), "vllm"), (("vllm6", "aiter flag"), "aiter")):
        forget()
        caplog.clear()
        peers(*installed[-1:])
        for hidden in (64, 64, 128):
            make(RMSNorm, hidden).forward_hip(randn(2, hidden, dtype=BF16))
        assert called == [chosen] * 3 * bool(chosen)
        (record,) = caplog.records
        assert record.name == "gemma_norm" and f"uses {chosen or 'plain PyTorch'}" in record.message
        assert record.levelno == (logging.INFO if chosen else logging.WARNING)
        assert f"native: this PyTorch ({torch.__version__})" in record.message
        assert ("aiter: ModuleNotFoundError" in record.message) == (chosen != "aiter")
