"""All that is tested of gated_rms_norm and GatedRMSNorm: values, gradients, transforms, memory, refusals, and that they
agree with the classes of transformers. Only what is tested of every operator alike is elsewhere (operators.py).
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import gemma_norm
from gemma_norm import reference
from support import DTYPES, LAYOUTS, assert_same_bits, place, randn

OP = torch.ops.gemma_norm.gated_rms_norm.default
MODES: dict[str, dict[str, Any]] = {
    "silu": {},
    "sigmoid": {"sigmoid": True},
    "gate first": {"norm_before_gate": False},
    "sigmoid first": {"norm_before_gate": False, "sigmoid": True},
    "groups": {"group_size": 16},
    "groups, gate first": {"group_size": 24, "norm_before_gate": False},
}


@pytest.fixture(params=MODES.values(), ids=MODES)
def mode(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


def tensors(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    x, gate = (randn(*shape, dtype=dtype, device=device, seed=seed) for seed in range(2))
    return x, 3 * gate, 1 + randn(shape[-1], dtype=dtype, device=device, seed=2) / 8


def oracle(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    eps: float = 1e-6,
    sigmoid: bool = False,
    norm_before_gate: bool = True,
    group_size: int | None = None,
) -> Tensor:
    """The definition in float64, without any rounding."""
    activation = 1.0
    if gate is not None:
        logistic = torch.sigmoid(gate.double())
        activation = logistic if sigmoid else gate.double() * logistic
    s = x.double() * (1.0 if norm_before_gate else activation)
    groups = s.unflatten(-1, (-1, group_size or s.shape[-1]))
    n = (groups / torch.sqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight.double()
    return n * activation if norm_before_gate else n


def assert_right(y: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor, **mode: Any) -> None:
    """y is within the norm's bound, and 10 units of float32 more. An activation may be off by 4 units; where the gate
    comes first, the root of the sum of squares is off by as much again.
    """
    assert y.dtype == x.dtype and y.shape == x.shape
    limit = reference.max_ulp_error(x.dtype, mode.get("group_size") or x.shape[-1])
    limit += 10 * torch.finfo(torch.float32).eps / torch.finfo(x.dtype).eps
    assert reference.ulp_error(y, oracle(x, gate, weight, **mode)) <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 48), (3, 240), (70, 48), (2, 3, 4, 1008), (5, 4080), (2, 36000)], ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no gate"])
def test_values_against_the_oracle(device, mode, dtype, shape, gated):
    x, gate, weight = tensors(*shape, dtype=dtype, device=device)
    for w in (weight, weight.float()):
        y = gemma_norm.gated_rms_norm(x, gate if gated else None, w, **mode)
        assert_right(y, x, gate if gated else None, w, **mode)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_each_step_can_be_rounded(device, mode, dtype):
    """The definition in plain PyTorch has float32 numbers that differ by a few units. In one element of some ten
    thousand, that tips a rounding to 16 bits: the result differs by one unit, or by two where two roundings are tipped.
    """
    x, gate, weight = tensors(300, 480, dtype=dtype, device=device)
    y = gemma_norm.gated_rms_norm(x, gate, weight, round_each_step=True, **mode)
    want = reference.gated_rms_norm(x, gate, weight, round_each_step=True, **mode)
    scale = 8 if dtype == torch.bfloat16 else 64  # float16's unit is closer to float32's
    assert float((y != want).float().mean()) < 1e-4 * scale
    assert reference.ulp_error(y, want.double()) <= 2
    once = gemma_norm.gated_rms_norm(x, gate, weight, **mode)
    assert float((y != once).float().mean()) > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides_and_out_in_place_of_an_input(device, mode, layout, dtype):
    x, gate, weight = tensors(5, 3, 48, dtype=dtype, device=device)
    placed_x, placed_gate = place(x, layout), place(gate, layout)
    y = gemma_norm.gated_rms_norm(placed_x.view, placed_gate.view, weight, **mode)
    assert_same_bits(y, gemma_norm.gated_rms_norm(x, gate, weight, **mode))
    for where in (placed_gate, placed_x):
        got = gemma_norm.gated_rms_norm(x, gate, weight, out=where.view, **mode)
        assert got is where.view
        assert_same_bits(got.contiguous(), y)
        where.assert_gaps_intact()


@pytest.mark.parametrize("argument", [0, 1], ids=["x", "gate"])
def test_the_result_may_take_the_memory_of_x_or_of_the_gate(device, mode, argument):
    x, gate, weight = tensors(7, 240, dtype=torch.bfloat16, device=device)
    want = gemma_norm.gated_rms_norm(x, gate, weight, **mode)
    out = (x, gate)[argument]
    assert gemma_norm.gated_rms_norm(x, gate, weight, out=out, **mode) is out
    assert_same_bits(out, want)


def test_a_gate_of_other_leading_dimensions(device):
    """SGLang has x as [tokens * heads, dim], and the gate as a slice of [tokens, heads, dim]."""
    x, gate, weight = tensors(12, 64, device=device)
    sliced = place(gate.view(3, 4, 64), "aligned slice of qkv").view
    want = gemma_norm.gated_rms_norm(x, gate, weight)
    assert_same_bits(gemma_norm.gated_rms_norm(x, sliced, weight), want)
    with pytest.raises(RuntimeError, match=r"gate must have x's shape \[12, 64\], got \[11, 64\]"):
        gemma_norm.gated_rms_norm(x, gate[:11], weight)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), -100.0, -1e30, 1e30, 0.0, -0.0])
@pytest.mark.parametrize("sigmoid", [False, True], ids=["silu", "sigmoid"])
def test_gates_that_are_not_finite_or_whose_activation_is_zero(device, special, sigmoid):
    x = torch.ones(1, 64, device=device)
    gate = torch.full_like(x, special)
    y = gemma_norm.gated_rms_norm(x, gate, torch.ones(64, device=device), 0.0, sigmoid=sigmoid)
    want = (torch.sigmoid if sigmoid else torch.nn.functional.silu)(gate.double())  # silu(-inf) is NaN
    torch.testing.assert_close(y, want.float(), rtol=1e-6, atol=1e-42, equal_nan=True)


def test_gradients(device, mode):
    """First and second derivatives agree with those of the formula in float64."""
    for gated in (True, False):
        inputs = [t.requires_grad_() for t in tensors(6, 48, device=device)]
        exact = [t.detach().double().requires_grad_() for t in inputs]
        found = []
        for function, (x, gate, weight) in ((gemma_norm.gated_rms_norm, inputs), (OP, inputs), (oracle, exact)):
            wanted = (x, gate, weight) if gated else (x, weight)
            y = function(x, gate if gated else None, weight, **mode)
            first = torch.autograd.grad(y.sin().sum(), wanted, create_graph=True)
            second = torch.autograd.grad(sum(g.cos().sum() for g in first), wanted)
            found.append([*first, *second])
        for *ours, want in zip(*found, strict=True):
            for got in ours:
                torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_gradients_have_their_inputs_dtypes(device):
    x, gate, weight = (t.requires_grad_() for t in tensors(4, 64, dtype=torch.bfloat16, device=device))
    w32 = weight.detach().float().requires_grad_()
    for function in (gemma_norm.gated_rms_norm, OP):
        x.grad = gate.grad = w32.grad = None
        function(x, gate, w32).sum().backward()
        assert (x.grad.dtype, gate.grad.dtype, w32.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
        exact = [t.detach().double().requires_grad_() for t in (x, gate, w32)]
        want = torch.autograd.grad(oracle(*exact).sum(), exact)
        for got, w in zip((x.grad, gate.grad, w32.grad), want, strict=True):
            error = (got.double() - w).abs().max() / w.abs().max()
            assert float(error) < 4 * torch.finfo(got.dtype).eps
    out = torch.empty_like(x)
    refused = r"gated_rms_norm: x must not require grad .* call gemma_norm\.gated_rms_norm without out,"
    with pytest.raises(RuntimeError, match=refused):
        torch.ops.gemma_norm.gated_rms_norm.out(x, gate, weight, out=out)


def test_no_rows(device, mode):
    """Sizes that follow from the number of elements would be ambiguous."""
    x, gate = (torch.empty(0, 3, 48, device=device, requires_grad=True) for _ in range(2))
    weight = torch.ones(48, device=device, requires_grad=True)
    for function in (gemma_norm.gated_rms_norm, OP, reference.gated_rms_norm):
        y = function(x, gate, weight, **mode)
        assert y.shape == x.shape
        gradients = torch.autograd.grad(y.sum(), (x, gate, weight))
        assert [g.shape for g in gradients] == [x.shape, gate.shape, weight.shape]
        assert bool((gradients[2] == 0).all())


def test_torch_func(device, mode):
    x, gate, weight = tensors(6, 48, device=device)

    def loss(x: Tensor, gate: Tensor) -> Tensor:
        return gemma_norm.gated_rms_norm(x, gate, weight, **mode).sin().sum()

    def definition(x: Tensor, gate: Tensor) -> Tensor:
        return reference.gated_rms_norm(x, gate, weight, **mode).sin().sum()

    for transform in (
        lambda f: torch.func.grad(f, argnums=(0, 1))(x, gate),
        lambda f: torch.func.jvp(f, (x, gate), (gate, x)),
        lambda f: torch.func.vmap(torch.func.grad(f))(x, gate),
    ):
        torch.testing.assert_close(transform(loss), transform(definition))


def test_opcheck(device, mode):
    names = ("sigmoid", "norm_before_gate", "group_size")
    options = [mode.get(name, default) for name, default in zip(names, (False, True, None), strict=True)]
    arguments = (*tensors(4, 48, device=device), 1e-6, *options)
    torch.library.opcheck(OP, arguments)
    torch.library.opcheck(OP, (*(t.clone().requires_grad_() for t in arguments[:3]), 1e-6, *options))
    out = torch.empty_like(arguments[0])
    torch.library.opcheck(torch.ops.gemma_norm.gated_rms_norm.out, arguments, {"out": out})


def test_torch_compile(device):
    x, gate, weight = (t.requires_grad_() for t in tensors(5, 96, device=device))

    def step(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        return gemma_norm.gated_rms_norm(x * 2, gate, weight, norm_before_gate=False, group_size=32).sin()

    want = torch.autograd.grad(step(x, gate, weight).sum(), (x, gate, weight))
    got = torch.autograd.grad(torch.compile(step, fullgraph=True)(x, gate, weight).sum(), (x, gate, weight))
    torch.testing.assert_close(got, want)


def test_meta_tensors_have_the_shape_and_dtype_of_x():
    x, gate, weight = (t.to("meta") for t in tensors(4, 48, dtype=torch.float16))
    y = gemma_norm.gated_rms_norm(x, gate, weight)
    assert (y.shape, y.dtype, y.device.type) == (x.shape, x.dtype, "meta")


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"x": None}, "x must be a tensor, got None"),
        ({"weight": None}, "weight must be a tensor, got None"),
        ({"gate": 1.0}, "gate must be a tensor, got 1.0"),
        ({"gate": torch.ones(4, 48).half()}, "gate must have x's dtype float32, got float16"),
        ({"gate": torch.ones(3, 48)}, r"gate must have x's shape \[4, 48\], got \[3, 48\]"),
        ({"gate": torch.ones(48, 4).t()}, r"gate must have a contiguous last dimension \(stride 1\), got stride 4"),
        ({"weight": torch.ones(16)}, r"weight must have shape \[48\], got \[16\]"),
        ({"group_size": 5}, "group_size must divide x's last dimension 48, got 5"),
        ({"group_size": 0}, "group_size must divide x's last dimension 48, got 0"),
        ({"group_size": -16}, "group_size must divide x's last dimension 48, got -16"),
        ({"group_size": "16"}, "group_size must be an integer or None, got '16'"),
        ({"group_size": True}, "group_size must be an integer or None, got True"),
        ({"group_size": 8.0}, "group_size must be an integer or None, got 8.0"),
        ({"group_size": 2**63}, "group_size must be an integer of at most 64 bits, got 9223372036854775808"),
        ({"sigmoid": "silu"}, "sigmoid must be a bool, got 'silu'"),
        ({"eps": -1.0}, "eps must be finite in float32 and at least 0, got -1"),
        (
            {"x": torch.ones(4, 48).half(), "gate": torch.ones(4, 48).half(), "round_each_step": True},
            "weight must have x's dtype float16 with round_each_step=True, got float32",
        ),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_arguments(replaced, message, device):
    x, gate, weight = tensors(4, 48)
    arguments = {"x": x, "gate": gate, "weight": weight} | replaced
    arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match=f"^gated_rms_norm: {message}"):
        gemma_norm.gated_rms_norm(**arguments)


def test_out_may_not_overlap_an_input_in_part(device):
    buffer, weight = torch.ones(5, 48, device=device), torch.ones(48, device=device)
    x, gate, shifted = buffer[:4], torch.ones(4, 48, device=device), buffer[1:]
    with pytest.raises(RuntimeError, match="out must be x's memory exactly or not overlap it"):
        gemma_norm.gated_rms_norm(x, gate, weight, out=shifted)
    with pytest.raises(RuntimeError, match="out must be gate's memory exactly or not overlap it"):
        gemma_norm.gated_rms_norm(gate, x, weight, out=shifted)
    assert bool((buffer == 1).all())


CLASSES = [
    ("qwen3_5", "Qwen3_5RMSNormGated", {"round_each_step": True}),
    ("qwen3_next", "Qwen3NextRMSNormGated", {"round_each_step": True}),
    ("mamba2", "MambaRMSNormGated", {"norm_before_gate": False, "round_each_step": True, "group_size": 64}),
    ("bamba", "BambaRMSNormGated", {"norm_before_gate": False, "round_each_step": True, "group_size": 128}),
]


@pytest.mark.parametrize(("folder", "name", "mode"), CLASSES, ids=[c[1] for c in CLASSES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_classes_of_transformers(folder, name, mode, dtype):
    """In bfloat16 all elements but one in 10^5 have the same bits. Before they are rounded, they differ by a unit or
    two of float32.
    """
    module = pytest.importorskip(f"transformers.models.{folder}.modeling_{folder}")
    kind = getattr(module, name)
    if "group_size" not in inspect.signature(kind).parameters:  # older versions of transformers
        mode = {k: v for k, v in mode.items() if k != "group_size"}
    theirs = kind(256, **{k: v for k, v in mode.items() if k == "group_size"}, eps=1e-6)
    ours = gemma_norm.GatedRMSNorm(256, 1e-6, dtype=dtype, **mode)
    x, gate, weight = tensors(20000, 256, dtype=dtype)
    for norm in (theirs, ours):
        norm.weight.data = weight
    with torch.no_grad():
        got, want = ours(x, gate), theirs(x, gate)
    if dtype == torch.float32:
        torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)
    else:
        assert float((got != want).float().mean()) <= 1e-5
        assert reference.ulp_error(got, want.double()) <= 2  # where two roundings differ


def test_module():
    module = gemma_norm.GatedRMSNorm(64, 1e-5, activation="sigmoid", group_size=32)
    x, gate, _ = tensors(3, 64)
    want = gemma_norm.gated_rms_norm(x, gate, module.weight.detach(), 1e-5, sigmoid=True, group_size=32)
    assert_same_bits(module(x, gate).detach(), want)
    assert_same_bits(
        module(x).detach(), gemma_norm.gated_rms_norm(x, None, module.weight.detach(), 1e-5, group_size=32)
    )
    assert "activation='sigmoid'" in repr(module) and list(module.state_dict()) == ["weight"]
    for bad, message in (
        ({"activation": "gelu"}, "activation must be one of silu, swish, sigmoid, got 'gelu'"),
        ({"activation": ["silu"]}, r"activation must be one of silu, swish, sigmoid, got \['silu'\]"),
        ({"norm_before_gate": "False"}, "norm_before_gate must be a bool, got 'False'"),
        ({"group_size": 7}, "group_size must divide hidden_size 64, got 7"),
        ({"group_size": 0}, "group_size must divide hidden_size 64, got 0"),
        ({"group_size": 4.0}, "group_size must be an integer or None, got 4.0"),
        ({"group_size": True}, "group_size must be an integer or None, got True"),
        ({"group_size": "4"}, "group_size must be an integer or None, got '4'"),
        ({"hidden_size": 2**63}, f"hidden_size must be .*, got {2**63}"),
        ({"eps": None}, "eps must be a number, got None"),
    ):
        with pytest.raises(ValueError, match=f"GatedRMSNorm: {message}"):
            gemma_norm.GatedRMSNorm(**{"hidden_size": 64} | bad)
