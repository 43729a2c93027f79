"""gemma_norm in the real SGLang, on the CPU: its own native forwards are the reference.

GEMMA_NORM_ENGINES=folder python -m pytest tests/engines/test_sglang.py
"""

from __future__ import annotations

import copy
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from conftest import declare_plugin, use

use("sglang")

from sglang.kernels import fused_op  # noqa: E402
from sglang.kernels.ops.attention.fla import fused_norm_gate, layernorm_gated  # noqa: E402
from sglang.kernels.spec import KernelBackend  # noqa: E402
from sglang.srt import plugins  # noqa: E402
from sglang.srt.layers import layernorm  # noqa: E402
from sglang.srt.models import gemma3n_causal, glm4v  # noqa: E402

from gemma_norm import reference  # noqa: E402
from gemma_norm.integrations import _sglang_norms  # noqa: E402
from gemma_norm.integrations import sglang as integration  # noqa: E402

HIDDEN = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def installed() -> Iterator[None]:
    integration.install()
    fused_op.clear_fused_op_trace()
    fused_op.enable_fused_op_trace()
    yield
    fused_op.disable_fused_op_trace()
    integration.uninstall()


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(kind: Callable[..., nn.Module], dtype: torch.dtype, **options: object) -> nn.Module:
    module = kind(HIDDEN, **options).to(dtype)
    if isinstance(getattr(module, "weight", None), nn.Parameter):
        module.weight.data.add_(randn(HIDDEN, dtype=dtype, seed=9) / 10)
    return module


def backends() -> list[str]:
    return [record.backend for record in fused_op.get_fused_op_trace()]


def share_that_differs(ours: Tensor, theirs: Tensor) -> float:
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(ours.dtype).eps, atol=1e-6)
    return float((ours != theirs).float().mean())


# SGLang's forward_native takes rsqrt (or a power) for 1 / sqrt, and adds the squares in another order. A last place of
# float32 so lost tips a rounding to 16 bits in few elements of a million.
FEW = 1e-3

ONE_TENSOR = {
    "RMSNorm": (layernorm.RMSNorm, {}),
    "RMSNorm, HF's roundings": (layernorm.RMSNorm, {"cast_x_before_out_mul": True}),
    "RMSNorm without a weight": (layernorm.RMSNorm, {"has_weight": False}),
    "GemmaRMSNorm": (layernorm.GemmaRMSNorm, {}),
    "Gemma3RMSNorm": (layernorm.Gemma3RMSNorm, {}),
    "Gemma4RMSNorm": (layernorm.Gemma4RMSNorm, {}),
    "Gemma4RMSNorm, zero-centred": (layernorm.Gemma4RMSNorm, {"scale_shift": 1.0}),
    "Gemma4RMSNorm without a scale": (layernorm.Gemma4RMSNorm, {"with_scale": False}),
    "RMSNormWithoutScale": (layernorm.RMSNormWithoutScale, {}),
    "derived, with its own forward": (glm4v.Glm4vRMSNorm, {}),
    "derived, with its own __init__": (gemma3n_causal.Gemma3nRMSNorm, {"with_scale": False}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ONE_TENSOR)
def test_a_norm_has_the_bits_of_forward_native(installed, name, dtype):
    kind, options = ONE_TENSOR[name]
    module, x = make(kind, dtype, **options), randn(64, HIDDEN, dtype=dtype)
    ours = module(x)
    assert backends() == ["plugin"]
    share = share_that_differs(ours, module.forward_native(x))
    assert dtype == torch.float32 or share < FEW


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [layernorm.GemmaRMSNorm, layernorm.Gemma3RMSNorm])
def test_gemma_with_a_residual_has_the_bits_of_forward_native(installed, kind, dtype):
    module, x, residual = make(kind, dtype), randn(64, HIDDEN, dtype=dtype), randn(64, HIDDEN, dtype=dtype, seed=1)
    y, s = module(x, residual)
    want_y, want_s = module.forward_native(x, residual)
    assert backends() == ["plugin"] and torch.equal(s, want_s)
    assert share_that_differs(y, want_y) < FEW or dtype == torch.float32
    assert torch.equal(x, randn(64, HIDDEN, dtype=dtype)), (
        "on the CPU SGLang's results are new tensors, and so are ours"
    )


def test_post_residual_addition(installed):
    module, (x, residual, post) = (
        make(layernorm.GemmaRMSNorm, torch.bfloat16),
        randn(3, 8, HIDDEN, dtype=torch.bfloat16),
    )
    for call in (lambda f: f(x, residual, post), lambda f: f(x, residual=residual, post_residual_addition=post)):
        (y, s), (want_y, want_s) = call(module), call(module.forward_native)
        assert torch.equal(s, want_s) and torch.equal(y, want_y)
    assert backends() == ["plugin", "plugin"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rms_norm_with_a_residual_normalises_the_rounded_sum(installed, dtype):
    """SGLang's CUDA kernel and forward_native normalise the sum before it is rounded. The next residual is the same."""
    module, x, residual = (
        make(layernorm.RMSNorm, dtype),
        randn(64, HIDDEN, dtype=dtype),
        randn(64, HIDDEN, dtype=dtype, seed=1),
    )
    y, s = module(x, residual)
    want_y, want_s = module.forward_native(x, residual)
    assert backends() == ["plugin"] and torch.equal(s, want_s)
    assert torch.equal(y, module(s)), "fused is unfused"
    assert 0.1 < share_that_differs(y, want_y) < 0.3
    exact = reference.oracle(s.double(), module.weight, module.variance_epsilon)
    ours, theirs = ((t.double() - exact).abs().mean() for t in (y, want_y))
    assert ours < theirs, "nearer to the norm of the residual that the next layer reads"


def left_to_sglang() -> dict[str, tuple[nn.Module, tuple[object, ...]]]:
    half, full = torch.bfloat16, torch.float32
    x, r = randn(4, HIDDEN, dtype=half), randn(4, HIDDEN, dtype=half, seed=1)
    rms = layernorm.RMSNorm

    class OwnForward(rms):
        def forward_native(self, x: Tensor, *rest: Tensor) -> Tensor:
            return x + 1

    quantised = make(rms, half)
    quantised.fuse_input_quant(nn.Linear(HIDDEN, 8))
    return {
        "variance of a part": (make(rms, half, var_hidden_size=64), (x,)),
        "float32 residual": (make(rms, half, fp32_residual=True), (x, r)),
        "another dtype for the result": (make(rms, half, override_orig_dtype=full), (x,)),
        "HF's roundings and a float32 weight": (make(rms, full, cast_x_before_out_mul=True), (x,)),
        "a residual of another dtype": (make(rms, half), (x, r.float())),
        "a quantised consumer": (quantised, (x,)),
        "a quantised consumer of this call": (make(rms, half), (x, None, None, nn.Linear(HIDDEN, 8))),
        "a last dimension with gaps": (make(layernorm.GemmaRMSNorm, half), (randn(4, 2 * HIDDEN, dtype=half)[:, ::2],)),
        "float64": (make(layernorm.GemmaRMSNorm, torch.float64), (x.double(),)),
        "another scale_shift": (make(layernorm.Gemma4RMSNorm, half, scale_shift=0.5), (x,)),
        "a derived class with a forward_native": (make(OwnForward, half), (x,)),
    }


@pytest.mark.parametrize("name", left_to_sglang())
def test_what_is_not_ours_is_left_to_sglang(installed, name):
    module, arguments = left_to_sglang()[name]
    got, want = module(*arguments), module.forward_native(*arguments)
    assert backends() == ["torch"]
    for ours, theirs in zip(*((t if isinstance(t, tuple) else (t,)) for t in (got, want)), strict=True):
        assert torch.equal(ours, theirs)


def test_batch_invariant_mode_is_left_to_sglang(installed, monkeypatch):
    monkeypatch.setattr(_sglang_norms, "batch_invariant", lambda: True)
    make(layernorm.RMSNorm, torch.float32)(randn(4, HIDDEN, dtype=torch.float32))
    assert backends() == ["torch"]


def test_force_native_and_a_forced_backend(installed):
    x = randn(4, HIDDEN, dtype=torch.float32)
    make(layernorm.RMSNorm, torch.float32, force_native=True)(x)
    module, other = make(layernorm.RMSNorm, torch.float32), make(layernorm.RMSNorm, torch.float32, var_hidden_size=64)
    module(x, backend=KernelBackend.TORCH)
    module(x, backend=KernelBackend.PLUGIN)
    assert backends() == ["torch", "torch", "plugin"]
    with pytest.raises(NotImplementedError, match=r"RMSNorm\.forward_plugin does not serve this call"):
        other(x, backend=KernelBackend.PLUGIN)
    fused_op.set_fused_op_backend(KernelBackend.PLUGIN)
    try:
        assert torch.equal(other(x), other.forward_native(x))
    finally:
        fused_op.set_fused_op_backend(None)


def test_torch_compile(installed):
    module, x = make(layernorm.GemmaRMSNorm, torch.bfloat16), randn(4, HIDDEN, dtype=torch.bfloat16)
    fused_op.disable_fused_op_trace()  # which cannot be compiled
    want = module(x), *module(x, x + 1)
    with torch.no_grad():
        y = torch.compile(lambda x: (module(x), *module(x, x + 1)), backend="eager", fullgraph=True)(x.clone())
    assert all(torch.equal(a, b) for a, b in zip(y, want, strict=True))
    module.enter_torch_compile(num_tokens=4)
    assert module._forward_method == module.forward_native
    module.leave_torch_compile()
    assert torch.equal(module(x), want[0])


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("layout", ["rows", "a view of tokens and heads"])
@pytest.mark.parametrize(("before", "size"), [(True, None), (True, 64), (False, None), (False, 64)])
def test_the_gated_norm(installed, activation, layout, before, size):
    """SGLang's kernel is Triton's, for GPUs; its rms_norm_ref says what it computes, with silu."""
    kind, dtype = layernorm_gated.RMSNorm, torch.bfloat16
    module = make(kind, dtype, norm_before_gate=before, group_size=size, activation=activation)
    x, z = randn(32, HIDDEN, dtype=dtype), randn(8, 5 * HIDDEN, dtype=dtype, seed=1)[:, : 4 * HIDDEN].view(8, 4, HIDDEN)
    gate = z if layout != "rows" else z.reshape(32, HIDDEN)
    y, rows = module(x, gate), z.reshape(32, HIDDEN)
    sigmoid = activation == "sigmoid"
    want = reference.gated_rms_norm(x, rows, module.weight, module.eps, sigmoid, before, size)
    assert share_that_differs(y, want) < FEW
    if activation == "silu":
        theirs = layernorm_gated.rms_norm_ref(
            x, module.weight, None, rows, module.eps, group_size=size, norm_before_gate=before
        )
        assert share_that_differs(y, theirs) < FEW


def test_fused_rms_norm_gated(installed, monkeypatch):
    module = make(fused_norm_gate.FusedRMSNormGated, torch.bfloat16, activation="sigmoid")
    module.weight.data.copy_(1 + randn(HIDDEN, dtype=torch.bfloat16, seed=9) / 10)
    x, g = randn(2, 6, 4, HIDDEN, dtype=torch.bfloat16)
    want = reference.gated_rms_norm(x, g, module.weight, module.eps, True)
    assert share_that_differs(module(x, g), want) < FEW and share_that_differs(module(x, g=g), want) < FEW
    calls = []
    monkeypatch.setattr(fused_norm_gate, "rms_norm_gated", lambda *args, **kwargs: calls.append(kwargs))
    module(x, g, residual=x)
    module(x, g, prenorm=True)
    assert len(calls) == 2, "both return more than a norm, and are SGLang's"


def test_uninstall_restores_every_class_and_module():
    kinds = [getattr(layernorm, norm.name) for norm in _sglang_norms.NORMS]
    kinds += [layernorm_gated.RMSNorm, fused_norm_gate.FusedRMSNormGated]
    before = [dict(vars(kind)) for kind in kinds]
    module, x = make(layernorm.GemmaRMSNorm, torch.bfloat16), randn(4, HIDDEN, dtype=torch.bfloat16)
    fresh = copy.deepcopy(module)
    integration.install()
    integration.install()
    module(x)
    assert module.auto_selected_backend() is KernelBackend.PLUGIN
    integration.uninstall()
    integration.uninstall()
    assert [dict(vars(kind)) for kind in kinds] == before
    assert module.__dict__.keys() == fresh.__dict__.keys() and module._forward_method is None
    assert torch.equal(module(x), fresh(x)) and module._forward_method == module.forward_native


def test_another_signature_is_one_error_and_nothing_is_installed(monkeypatch):
    def forward_native(self, x, residual=None, post_residual_addition=None, scale=None): ...

    monkeypatch.setattr(layernorm.GemmaRMSNorm, "forward_native", forward_native)
    with pytest.raises(RuntimeError, match=r"GemmaRMSNorm\.forward_native must be a function of .*scale=None"):
        integration.install()
    assert integration._installed is None and "forward_plugin" not in vars(layernorm.RMSNorm)


@pytest.mark.parametrize("value", ["0", "1"])
def test_sglang_loads_the_plugin(monkeypatch, tmp_path, value):
    declare_plugin(tmp_path, "sglang.srt.plugins", "gemma_norm.integrations.sglang:plugin")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("GEMMA_NORM_SGLANG", value)
    monkeypatch.setattr(plugins, "_plugins_loaded", False)
    plugins.load_plugins()
    assert (make(layernorm.RMSNorm, torch.float32).auto_selected_backend() is KernelBackend.PLUGIN) == (value == "1")
    integration.uninstall()


def test_the_example(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serving.py", "sglang"])
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "serving.py"))
    assert example["main"]() == 0
    assert capsys.readouterr().out.count("gemma_norm") == 3
