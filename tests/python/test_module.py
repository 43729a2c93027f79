"""RMSNorm and GemmaRMSNorm: values, weights, the choice of a method, and bad arguments."""

from __future__ import annotations

import copy
import re
from fractions import Fraction

import pytest
import torch
from torch import Tensor

import gemma_norm
from gemma_norm import reference
from module_support import make
from support import DTYPES, assert_right, assert_same_bits, randn


@pytest.mark.parametrize("weight_dtype", [torch.float32, None], ids=["float32 weight", "own weight"])
def test_forward(device, dtype, kind, weight_dtype):
    module = make(kind, 96, device=device, dtype=weight_dtype or dtype)
    x = randn(3, 5, 96, dtype=dtype, device=device)
    assert_right(module(x).detach(), x, module.weight.detach(), 1e-5, module.gemma)


def test_fresh_weights_are_the_identity(device, kind):
    module = kind(64, device=device, dtype=torch.bfloat16)
    assert module.weight.dtype == torch.bfloat16 and module.weight.device.type == device
    assert module.weight.requires_grad and list(module.state_dict()) == ["weight"]
    x = randn(2, 64, dtype=torch.bfloat16, device=device)
    assert_same_bits(module(x).detach(), gemma_norm.rms_norm(x, torch.ones(64, device=device)))


def test_forward_native_agrees_and_never_writes(device, dtype, kind):
    module = make(kind, 256, device=device)
    x, residual, post = (randn(9, 256, dtype=dtype, device=device, seed=seed) for seed in range(3))
    kept = x.clone(), residual.clone()
    with torch.no_grad():
        native = module.forward_native(x)
        assert_right(native, x, module.weight, 1e-5, module.gemma)
        y, s = module.forward_native(x, residual, post)
        assert_same_bits(s, x + (residual + post))
        assert_right(y, s, module.weight, 1e-5, module.gemma)
    assert_same_bits(x, kept[0])
    assert_same_bits(residual, kept[1])
    dx = torch.autograd.grad(module.forward_native(x.requires_grad_()).float().sum(), x, create_graph=True)[0]
    assert dx.requires_grad


def test_the_device_chooses_the_method(device, kind, monkeypatch):
    called = []
    for name in ("forward_cuda", "forward_hip", "forward_cpu"):
        monkeypatch.setattr(kind, name, lambda self, *args, _name=name: called.append(_name))
    module = kind(8, device=device)
    module(randn(1, 8, device=device))
    assert called == ["forward_cpu" if device == "cpu" else "forward_hip" if torch.version.hip else "forward_cuda"]


def test_on_rocm_a_gpu_is_served_by_forward_hip(kind, monkeypatch):
    """PyTorch calls AMD GPUs cuda, too, and torch.version.hip tells them apart. As no kernel runs, a stand-in serves as
    x.
    """
    seen = []
    monkeypatch.setattr(gemma_norm.module, "_on_rocm", True)
    monkeypatch.setattr(kind, "forward_hip", lambda self, x, residual, post: seen.append((residual, post)))
    kind(8).forward(type("X", (), {"is_cuda": True})(), "residual", "post")
    assert seen == [("residual", "post")]


def test_the_methods_may_be_called_directly(device, kind):
    module, x = make(kind, 32, device=device), randn(2, 32, device=device)
    with torch.no_grad():
        for method in (module.forward_cpu, module.forward_cuda, module.forward_hip):
            assert_same_bits(method(x), module(x))
            y, s = method(x.clone(), x.clone(), x)
            assert_same_bits(s, x + (x + x))
            assert_right(y, s, module.weight, 1e-5, module.gemma)


@pytest.mark.parametrize("method", ["forward", "forward_native"])
def test_post_residual_addition_needs_a_residual(kind, method):
    x = randn(2, 8)
    with pytest.raises(RuntimeError, match=f"{kind.__name__}: post_residual_addition needs a residual"):
        getattr(kind(8), method)(x, None, x)


def test_a_module_can_be_copied_moved_loaded_reset_and_printed(device):
    module = make(gemma_norm.GemmaRMSNorm, 16)
    assert repr(module) == "GemmaRMSNorm(16, eps=1e-05, gemma=True)"
    assert repr(gemma_norm.RMSNorm(4)) == "RMSNorm(4, eps=1e-06, gemma=False)"
    assert_same_bits(copy.deepcopy(module).weight.detach(), module.weight.detach())
    moved = copy.deepcopy(module).to(device, torch.bfloat16)
    x = randn(3, 16, dtype=torch.bfloat16, device=device)
    assert_right(moved(x).detach(), x, moved.weight.detach(), 1e-5, True)
    other = gemma_norm.GemmaRMSNorm(16, 1e-5)
    other.load_state_dict(module.state_dict())
    assert_same_bits(other(randn(3, 16)), module(randn(3, 16)))
    module.reset_parameters()
    assert bool((module.weight == 0).all())


def test_meta_device_and_lazy_materialisation():
    module = gemma_norm.GemmaRMSNorm(16, device="meta")
    y, s = module(torch.empty(2, 16, device="meta"), torch.empty(2, 16, device="meta"))
    assert y.shape == s.shape == (2, 16) and y.device.type == "meta"
    module.to_empty(device="cpu").reset_parameters()
    assert bool((module(randn(2, 16)) != 0).any())


def test_a_subclass_may_choose_another_implementation_for_a_device(kind):
    """Another implementation for one kind of device is chosen by overriding that device's method."""

    class Routed(kind):
        def forward_cpu(
            self, x: Tensor, residual: Tensor | None = None, post_residual_addition: Tensor | None = None
        ) -> Tensor:
            return self.forward_native(x, residual, post_residual_addition)

    x = randn(2, 64)
    routed = Routed(64)
    assert_same_bits(routed(x).detach(), reference.rms_norm(x, routed.weight, 1e-6, routed.gemma).detach())


OF_EACH_MODULE = [
    ({"eps": None}, r"eps must be a number, got None; torch\.nn\.RMSNorm takes torch\.finfo\(dtype\)\.eps for None"),
    ({"eps": "1e-6"}, "eps must be a number, got '1e-6'"),
    *(
        ({"eps": eps}, rf"eps must be finite in float32 and at least 0, got {re.escape(repr(eps))}$")
        for eps in (-1, -1e-30, float("nan"), float("inf"), -float("inf"), 1e39, 10**400)
    ),
    ({"round_each_step": "x"}, "round_each_step must be a bool, got 'x'"),
    *(
        ({"dtype": dtype}, f"dtype must be float32, float16 or bfloat16 of torch or None, got {dtype!r}$")
        for dtype in (torch.float64, torch.float8_e4m3fn, torch.int32, torch.bool, torch.complex64, "float32")
    ),
    ({"device": 3.5}, "device must be None or a device of PyTorch, such as 'cuda:0', got 3.5"),
    ({"device": "graphics card"}, "device must be None or a device of PyTorch, .*, got 'graphics card'"),
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be an integer of at least 1 .*, got 0"),
        ({"hidden_size": True}, "hidden_size must be an integer of at least 1 .*, got True"),
        ({"hidden_size": (4, 8)}, r"hidden_size must be an integer of at least 1 .*, got \(4, 8\)"),
        ({"hidden_size": 2**60}, rf"hidden_size must be .* below 2\^60, .*, got {2**60}"),
        ({"hidden_size": 2**63}, rf"hidden_size must be .* below 2\^60, .*, got {2**63}"),
        ({"provider": "cudnn"}, "provider must be one of auto, native, aiter, vllm, torch, got 'cudnn'"),
        ({"provider": None}, "provider must be one of auto, native, aiter, vllm, torch, got None"),
        ({"inplace": "no"}, "inplace must be a bool, got 'no'"),
        ({"inplace": None}, "inplace must be a bool, got None"),
        ({"elementwise_affine": "False"}, "elementwise_affine must be a bool, got 'False'"),
        ({"has_weight": 2}, "has_weight must be a bool, got 2"),
        *OF_EACH_MODULE,
    ],
    ids=str,
)
def test_bad_arguments_of_the_constructor(kind, arguments, message):
    with pytest.raises(ValueError, match=f"^{kind.__name__}: {message}"):
        kind(**{"hidden_size": 8} | arguments)


@pytest.mark.parametrize("arguments", OF_EACH_MODULE, ids=str)
def test_bad_arguments_of_a_gated_module(arguments):
    with pytest.raises(ValueError, match=f"^GatedRMSNorm: {arguments[1]}"):
        gemma_norm.GatedRMSNorm(**{"hidden_size": 8} | arguments[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_a_weight_that_the_constructor_refuses_no_call_would_take(kind, dtype):
    for module_class in (kind, gemma_norm.GatedRMSNorm):
        module = module_class(8).to(dtype)
        for x in (*DTYPES, dtype):
            with pytest.raises(RuntimeError, match="must have dtype"):
                module(torch.ones(2, 8).to(x))


def test_what_any_call_takes_the_constructor_takes(kind):
    np = pytest.importorskip("numpy", reason="needs NumPy: pip install numpy")
    x = torch.ones(2, 8)
    for eps in (0, 0.0, 1, Fraction(1, 2), np.float32(1e-6), torch.finfo(torch.float32).max):
        assert bool(kind(8, eps)(x).isfinite().all())
    for flag in (np.True_, 1, 0, False):
        kind(np.int64(8), inplace=flag)(x)
        gemma_norm.RMSNorm(8, round_each_step=flag, has_weight=flag)(x)
        gemma_norm.GatedRMSNorm(np.int64(8), norm_before_gate=flag, group_size=np.int32(4))(x, x)
    assert gemma_norm.RMSNorm(8, has_weight=False, dtype=torch.float64)(x).dtype == torch.float32
    for dtype in DTYPES:
        assert kind(8, dtype=dtype, device=torch.device("cpu"))(x).dtype == torch.float32


def test_a_module_may_be_made_in_the_default_dtype_and_cast(kind):
    """A program may make its model in float64 and cast it."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        made = [kind(8), gemma_norm.GatedRMSNorm(8)]
    finally:
        torch.set_default_dtype(default)
    for module in made:
        assert module.weight.dtype == torch.float64 and module.float()(torch.ones(2, 8)).dtype == torch.float32


@pytest.mark.parametrize("arguments", [{"elementwise_affine": False}, {"has_weight": False}, {"round_each_step": True}])
def test_a_zero_centred_norm_has_a_weight_and_one_rounding(arguments):
    (name, value), *_ = arguments.items()
    with pytest.raises(ValueError, match=f"GemmaRMSNorm: {name} must be {not value}.*, got {value}"):
        gemma_norm.GemmaRMSNorm(8, **arguments)


@pytest.mark.parametrize("x", [None, [1.0], "x"])
def test_what_is_no_tensor_is_named(kind, x):
    with pytest.raises(RuntimeError, match=r"^rms_norm: x must be a tensor, got "):
        kind(8)(x)
    with pytest.raises(RuntimeError, match=r"^add_rms_norm: x must be a tensor, got "), torch.no_grad():
        kind(8).eval()(x, torch.ones(2, 8))
