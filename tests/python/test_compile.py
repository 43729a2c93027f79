"""Fake tensors, opcheck, torch.compile and torch.export."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import gemma_norm
from support import assert_right, assert_same_bits, make_weight, randn

OPS = torch.ops.gemma_norm


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def arguments(device: str, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> tuple[Tensor, ...]:
    """x (a slice with two strides), residual, weight, post."""
    x = randn(4, 3, 80, dtype=dtype, device=device)[..., :64]
    residual, post = (randn(4, 3, 64, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
    return tuple(
        t.requires_grad_(requires_grad) for t in (x, residual, make_weight(64, torch.float32, device, False), post)
    )


@pytest.mark.parametrize("with_post", [False, True])
def test_opcheck(device, dtype, with_post):
    for requires_grad in (True, False):
        x, residual, weight, post = arguments(device, dtype, requires_grad)
        addition = post if with_post else None
        torch.library.opcheck(OPS.rms_norm.default, (x, weight, 1e-5, True))
        torch.library.opcheck(OPS.add_rms_norm.default, (x, residual, weight, 1e-6, False, addition))
    torch.library.opcheck(OPS.rms_norm.default, (x, None))
    torch.library.opcheck(OPS.rms_norm.default, (x.clone().requires_grad_(), weight))  # which is frozen
    torch.library.opcheck(OPS.rms_norm.out, (x, weight), {"out": torch.empty_like(residual)})
    torch.library.opcheck(OPS.fused_add_rms_norm.default, (x.clone(), residual, weight, 1e-6, False, addition))


@pytest.mark.parametrize("mode", ["fake", "meta"])
def test_fake_results_are_like_the_real_ones(device, dtype, mode):
    def run(x: Tensor, residual: Tensor, weight: Tensor, post: Tensor) -> list[Tensor]:
        out = torch.empty_like(residual).transpose(0, 1).contiguous().transpose(0, 1)
        results = [gemma_norm.rms_norm(x, weight), gemma_norm.rms_norm(x, weight, out=out)]
        results += gemma_norm.add_rms_norm(x, residual, weight, post_residual_addition=post)
        gemma_norm.fused_add_rms_norm(x, residual, weight)
        return [*results, x, residual]

    real = arguments(device, dtype)
    if mode == "meta":
        got = run(*(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in real))
    else:
        with FakeTensorMode() as fake:
            got = run(*(fake.from_tensor(t) for t in real))
    for a, b in zip(got, run(*real), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        assert a.device == (torch.device("meta") if mode == "meta" else b.device)


def test_fake_tensors_record_gradients_through_the_functions(device):
    with FakeTensorMode():
        x, residual, weight, post = (torch.empty(2, 8, device=device, requires_grad=True) for _ in range(4))
        y, s = gemma_norm.add_rms_norm(x, residual, weight[0], post_residual_addition=post)
        (y * s).sum().backward()
        assert all(t.grad is not None and t.grad.shape == t.shape for t in (x, residual, weight, post))


def inference(x: Tensor, residual: Tensor, weight: Tensor, post: Tensor) -> tuple[Tensor, Tensor]:
    """A function that also writes its argument, the residual."""
    y = gemma_norm.rms_norm(x, weight, gemma=True)
    gemma_norm.fused_add_rms_norm(y, residual, weight, post_residual_addition=post)
    return gemma_norm.add_rms_norm(y, residual, weight)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_inference(device, dtype, dynamic):
    """One graph holds all of the function, the write to its argument included. The result and the write have the bits
    of the function without torch.compile.
    """
    compiled = torch.compile(inference, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    mine, theirs = arguments(device, dtype), arguments(device, dtype)
    for a, b in zip(compiled(*mine), inference(*theirs), strict=True):
        assert_same_bits(a, b)
    assert_same_bits(mine[1], theirs[1])


def test_compiled_training(device):
    def loss(x: Tensor, residual: Tensor, weight: Tensor, post: Tensor) -> Tensor:
        y = gemma_norm.rms_norm(x, weight, gemma=True)
        y, s = gemma_norm.add_rms_norm(y, residual, weight, post_residual_addition=post)
        return (y * s).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = arguments(device, requires_grad=True)
    got, want = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, loss))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="Inductor needs a C++ compiler: g++")
def test_inductor(device):
    def step(x: Tensor, residual: Tensor, weight: Tensor, post: Tensor) -> tuple[Tensor, Tensor]:
        y, s = inference(x * 2, residual, weight, post)
        return y + 1, s

    mine, theirs = arguments(device), arguments(device)
    compiled = torch.compile(step, fullgraph=True)
    for a, b in zip(compiled(*mine), step(*theirs), strict=True):
        assert_same_bits(a, b)
    assert_same_bits(mine[1], theirs[1])


def test_compiled_out(device):
    compiled = torch.compile(
        lambda x, weight, out: gemma_norm.rms_norm(x, weight, out=out) + 1,
        fullgraph=True,
        backend="aot_eager",
        dynamic=False,
    )
    x, residual, weight, _ = arguments(device)
    out = torch.empty_like(residual)
    y = compiled(x, weight, out)
    assert_same_bits(out, gemma_norm.rms_norm(x, weight))
    assert_same_bits(y, out + 1)
    with pytest.raises(Exception, match=r"rms_norm: out must have x's shape \[4, 3, 64\], got \[4, 3, 63\]"):
        compiled(x, weight, torch.empty(4, 3, 63, device=device))


def test_a_new_number_of_rows_does_not_compile_again(device):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, w: gemma_norm.rms_norm(x, w), fullgraph=True, backend=counter, dynamic=True)
    weight = make_weight(64, torch.float32, device, False)
    compilations = []
    for rows in (2, 5, 17, 100):
        x = randn(rows, 64, device=device)
        assert_right(compiled(x, weight), x, weight)
        compilations.append(counter.frame_count)
    assert compilations[0] >= 1 and len(set(compilations)) == 1


def test_eps_may_be_symbolic(device):
    compiled = torch.compile(
        lambda x, w, eps: gemma_norm.rms_norm(x, w, eps), fullgraph=True, backend="aot_eager", dynamic=True
    )
    x, weight = randn(3, 64, device=device), make_weight(64, torch.float32, device, False)
    for eps in (1e-6, 0.5, 2.0):
        assert_right(compiled(x, weight, eps), x, weight, eps)


@pytest.mark.parametrize("kind", [gemma_norm.RMSNorm, gemma_norm.GemmaRMSNorm])
def test_compiled_module(device, kind):
    module = kind(64, device=device)
    with torch.no_grad():
        module.weight.copy_(randn(64, device=device) / 2)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for mode in ("eval", "train"):  # In eval mode without grad, the module itself writes in place.
        mine, theirs, kept = arguments(device), arguments(device), arguments(device)
        module.train(mode == "train")
        with torch.no_grad():
            for a, b in zip(compiled(mine[0], mine[1], mine[3]), module(theirs[0], theirs[1], theirs[3]), strict=True):
                assert_same_bits(a, b)
        for a, before in zip(mine, kept, strict=True):
            assert_same_bits(a, before)
    y, s = compiled(*arguments(device)[:2])
    (y * s).sum().backward()
    got, module.weight.grad = module.weight.grad, None
    y, s = module(*arguments(device)[:2])
    (y * s).sum().backward()
    torch.testing.assert_close(got, module.weight.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("what", ["one tensor as both", "an expanded residual", "an expanded x", "a partial overlap"])
@pytest.mark.parametrize("method", ["forward", "forward_hip"])
def test_compiled_modules_take_any_memory(device, method, what):
    """forward_hip may choose plain PyTorch, in which a write to one tensor would change the other before it is read."""
    module = gemma_norm.RMSNorm(64, device=device, provider="torch").eval()
    buffer, row = randn(9, 64, device=device), randn(1, 64, device=device, seed=1)
    x, residual = {
        "one tensor as both": (buffer[:7], buffer[:7]),
        "an expanded residual": (buffer[:7], row.expand(7, 64)),
        "an expanded x": (row.expand(7, 64), buffer[:7]),
        "a partial overlap": (buffer[:7], buffer[2:]),
    }[what]
    kept = buffer.clone(), row.clone()
    want = gemma_norm.add_rms_norm(x, residual, module.weight.detach())
    with torch.no_grad():
        got = torch.compile(getattr(module, method), fullgraph=True, backend="aot_eager")(x, residual)
    torch.testing.assert_close(got, want)
    assert_same_bits(buffer, kept[0])
    assert_same_bits(row, kept[1])


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    """An exported program never writes in place, as the module does in eval mode without grad."""
    module = gemma_norm.GemmaRMSNorm(64).eval()
    x, residual, _, _ = arguments("cpu")
    shapes = {"x": {0: torch.export.Dim("rows")}, "residual": {0: torch.export.Dim("rows")}}
    with torch.no_grad():
        program = torch.export.export(module, (x.contiguous(), residual.clone()), dynamic_shapes=shapes, strict=strict)
        for n in (2, 9):
            x, residual = randn(n, 3, 64), randn(n, 3, 64, seed=1)
            want = module(x.clone(), residual.clone())
            for a, b in zip(program.module()(x, residual), want, strict=True):
                assert_same_bits(a, b)
            assert_same_bits(residual, randn(n, 3, 64, seed=1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("way", ["torch.onnx.export", "from an exported program"])
def test_onnx(context, way):
    """ONNX has no such operators. A model is exported with their definition; an exported program has to be given it."""
    pytest.importorskip("onnxscript", reason="needs onnx and onnxscript: pip install 'gemma-norm[test]'")
    from onnx.reference import ReferenceEvaluator

    if context is torch.enable_grad and torch.__version__ < "2.13":
        pytest.skip("PyTorch 2.11 fails at 1 + weight, a parameter, also in a model of plain PyTorch: needs 2.13")

    module = gemma_norm.GemmaRMSNorm(16).eval()
    module.weight.data.copy_(make_weight(16, torch.float32, "cpu", True))
    x, residual = randn(3, 16), randn(3, 16, seed=1)
    with context():
        if way == "torch.onnx.export":
            program = torch.onnx.export(module, (x, residual), dynamo=True)
        else:
            table = torch.export.default_decompositions()
            table[OPS.add_rms_norm.default] = gemma_norm.reference.add_rms_norm
            program = torch.onnx.export(torch.export.export(module, (x, residual)).run_decompositions(table))
    names = [value.name for value in program.model.graph.inputs]
    got = ReferenceEvaluator(program.model_proto).run(
        None, dict(zip(names, (x.numpy(), residual.numpy()), strict=True))
    )
    with torch.no_grad():
        y, s = module(x.clone(), residual.clone())
    torch.testing.assert_close([torch.from_numpy(t) for t in got], [y, s])


class Rotated(torch.nn.Module):
    def forward(self, x, gate):
        weight, angles = torch.full((16,), 0.5), torch.full((3, 16), 0.25)
        y = gemma_norm.gated_rms_norm(x, gate, weight, sigmoid=True, norm_before_gate=False)
        q, k = (t.reshape(3, -1, 16) for t in (y, gate))
        return gemma_norm.qk_norm_rope(q, k, weight, weight, angles, angles, gemma=True, interleaved=True)


@pytest.mark.filterwarnings("ignore")
def test_onnx_keeps_options_that_are_given_by_name():
    pytest.importorskip("onnxscript", reason="needs onnx and onnxscript: pip install 'gemma-norm[test]'")
    from onnx.reference import ReferenceEvaluator

    x, gate, module = randn(3, 16), randn(3, 16, seed=1), Rotated()
    with torch.no_grad():
        program = torch.onnx.export(module, (x, gate), dynamo=True)
        want = module(x, gate)
    names = [value.name for value in program.model.graph.inputs]
    got = ReferenceEvaluator(program.model_proto).run(None, dict(zip(names, (x.numpy(), gate.numpy()), strict=True)))
    torch.testing.assert_close([torch.from_numpy(t) for t in got], list(want))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph():
    x, residual, weight, post = arguments("cuda", torch.bfloat16)
    buffers = [t.clone() for t in (x.contiguous(), residual)]
    gemma_norm.fused_add_rms_norm(*buffers, weight, post_residual_addition=post)  # warm
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gemma_norm.fused_add_rms_norm(*buffers, weight, post_residual_addition=post)
    for seed in (5, 6):
        x, residual = (randn(4, 3, 64, dtype=torch.bfloat16, device="cuda", seed=seed + n) for n in (0, 10))
        buffers[0].copy_(x)
        buffers[1].copy_(residual)
        graph.replay()
        want = gemma_norm.add_rms_norm(x, residual, weight, post_residual_addition=post)
        for a, b in zip(buffers, want, strict=True):
            assert_same_bits(a, b)
