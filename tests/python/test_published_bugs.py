"""Bugs that other RMSNorm kernels shipped, each a test here. The docstrings name where it happened."""

from __future__ import annotations

import pytest
import torch

import gemma_norm
from gemma_norm import _library, reference
from support import Placed, assert_right, assert_same_bits, make_weight, randn

BF16 = torch.bfloat16


def test_float32_weight_with_bfloat16_input(device):
    """sgl-project/sglang#32807: a kernel read the float32 weight as bfloat16, and gave NaN."""
    x, weight = randn(16, 2048, dtype=BF16, device=device), randn(2048, device=device, seed=1)
    y = gemma_norm.rms_norm(x, weight)
    assert bool(y.isfinite().all())
    assert_right(y, x, weight)


def test_hidden_3584(device, dtype):
    """flashinfer-ai/flashinfer#634: misaligned address at hidden 3584 (Gemma 2), which does not fill a block evenly."""
    x, weight = randn(99, 3584, dtype=dtype, device=device), make_weight(3584, dtype, device, True)
    assert_right(gemma_norm.rms_norm(x, weight, gemma=True), x, weight, gemma=True)


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 5, 7])
def test_unaligned_storage_offset(device, dtype, offset):
    """pytorch/pytorch#186235: vectorised loads faulted on a view whose storage offset is no multiple of the vector."""
    values, weight = randn(5, 1024, dtype=dtype, device=device), make_weight(1024, dtype, device, False)
    x, residual = Placed(values, (1024, 1), offset), Placed(values, (1024, 1), 2 * offset + 1)
    want, want_sum = gemma_norm.add_rms_norm(values, values, weight)
    gemma_norm.fused_add_rms_norm(x.view, residual.view, Placed(weight, (1,), offset).view)
    assert_same_bits(x.view, want)
    assert_same_bits(residual.view, want_sum)
    x.assert_gaps_intact()


@pytest.mark.parametrize("hidden", [16384, 32768])
def test_hidden_beyond_48_kilobytes_of_shared_memory(device, hidden):
    """flashinfer-ai/flashinfer#718: at hidden 16384 a float32 row passes 48 KiB of shared memory; the launch failed."""
    for dtype in (torch.float32, BF16):
        x, residual = (randn(3, hidden, dtype=dtype, device=device, seed=seed) for seed in range(2))
        weight = make_weight(hidden, dtype, device, False)
        y, s = gemma_norm.add_rms_norm(x, residual, weight)
        assert_same_bits(s, x + residual)
        assert_right(y, s, weight)


@pytest.mark.parametrize("hidden", [1, 5, 63, 100, 1001, 4097])
def test_hidden_not_a_multiple_of_8_leaves_the_next_row_alone(device, dtype, hidden):
    """ROCm/aiter#5290: with hidden not a multiple of 8, a row's last vector wrote the beginning of the next row."""
    values = randn(7, hidden, dtype=dtype, device=device)
    weight = make_weight(hidden, dtype, device, False)
    out = Placed(
        torch.zeros_like(values), (hidden + 1, 1)
    )  # one watched element between rows, and some behind the last
    gemma_norm.rms_norm(values, weight, out=out.view)
    out.assert_gaps_intact()
    assert_right(out.view, values, weight)
    x, residual = Placed(values, (hidden + 1, 1)), Placed(values, (hidden + 1, 1))
    gemma_norm.fused_add_rms_norm(x.view, residual.view, weight)
    x.assert_gaps_intact()
    residual.assert_gaps_intact()


def test_strided_q_and_k(device, dtype):
    """sgl-project/sglang#23974 (fault on gfx942), vllm-project/vllm#24247 (silent corruption): 3-D q, k slices.

    Both kernels took the row stride to be hidden, or flattened [tokens, heads] though the two strides do not collapse.
    """
    tokens, heads, size = 9, 4, 128
    qkv = randn(tokens, 3 * heads * size, dtype=dtype, device=device)
    kept, weight = qkv.clone(), make_weight(size, dtype, device, False)
    q, k, v = (qkv[:, i * heads * size : (i + 1) * heads * size].view(tokens, heads, size) for i in range(3))
    want = [gemma_norm.rms_norm(part.contiguous(), weight) for part in (q, k)]
    for part, expected in zip((q, k), want, strict=True):
        assert_same_bits(gemma_norm.rms_norm(part, weight), expected)
        gemma_norm.rms_norm(part, weight, out=part)
        assert_same_bits(part, expected)
    assert_same_bits(v, kept.view(tokens, 3, heads, size)[:, 2])


def test_rows_further_apart_than_32_bits_count(device):
    """vllm-project/vllm#43390, #34842: element offsets past 2^31. Few rows, far apart; most pages are never touched."""
    hidden, stride = 128, 2**31 // 2 + 12345
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of GPU memory")
    base = torch.empty(4 * stride, dtype=BF16, device=device)
    x = base.as_strided((4, hidden), (stride, 1))
    values, weight = randn(4, hidden, dtype=BF16, device=device), make_weight(hidden, BF16, device, False)
    x.copy_(values)
    want = gemma_norm.rms_norm(values, weight)
    assert_same_bits(gemma_norm.rms_norm(x, weight), want)
    gemma_norm.rms_norm(x, weight, out=x)
    assert_same_bits(x, want)
    residual = base.as_strided((4, hidden), (stride, 1), 1000)
    residual.copy_(values)
    x.copy_(values)
    gemma_norm.fused_add_rms_norm(x, residual, weight)
    assert_same_bits(residual, values + values)
    assert_same_bits(x, gemma_norm.rms_norm(values + values, weight))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with 40 GiB")
@pytest.mark.parametrize("hidden", [128, 4096, 262144])
def test_more_than_32_bits_count_of_elements(hidden):
    """vllm-project/vllm#43390, #34842, flashinfer-ai/flashinfer#3005: overflow at more than 2^31 elements."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    rows = 2**31 // hidden + 77
    x = torch.randn(rows, hidden, dtype=BF16, device="cuda")
    weight = make_weight(hidden, BF16, "cuda", False)
    y = gemma_norm.rms_norm(x, weight)
    residual = x.clone()
    gemma_norm.fused_add_rms_norm(x, residual, weight)
    for at in (0, rows // 2, rows - 1):
        source = (residual[at : at + 1].float() / 2).to(BF16)  # x + x, halved: exact
        assert_same_bits(y[at : at + 1], gemma_norm.rms_norm(source, weight))
        assert_same_bits(x[at : at + 1], gemma_norm.rms_norm(residual[at : at + 1], weight))
    tail = slice(rows - 99, rows)
    assert_right(x[tail], residual[tail], weight)


def test_zero_tokens(device, dtype):
    """sgl-project/sglang#3304, #31350: an empty batch (idle data-parallel rank) made an illegal launch, or a crash."""
    weight = make_weight(4096, dtype, device, False)
    for shape in ((0, 4096), (0, 8, 4096), (3, 0, 4096)):
        x = torch.empty(shape, dtype=dtype, device=device)
        assert gemma_norm.rms_norm(x, weight).shape == shape
        assert [t.shape for t in gemma_norm.add_rms_norm(x, x, weight)] == [shape, shape]
        gemma_norm.fused_add_rms_norm(x, x.clone(), weight)
        gemma_norm.rms_norm(x, weight, out=x)
    if device == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
def test_one_plus_weight_in_16_bits(device, dtype):
    """vllm-project/vllm#55311 measures errors of 3e-2 from ``1 + weight`` rounded to bfloat16."""
    x = randn(64, 2048, dtype=dtype, device=device)
    weight = (randn(2048, device=device, seed=1) / 300).to(dtype)
    exact = reference.oracle(x, weight, gemma=True)
    limit = reference.max_ulp_error(dtype, 2048)
    assert reference.ulp_error(gemma_norm.rms_norm(x, weight, gemma=True), exact) <= limit
    assert reference.ulp_error(gemma_norm.rms_norm(x, 1 + weight), exact) > 1.2 * limit  # what those kernels compute


def test_bfloat16_is_not_truncated(device):
    """ROCm/aiter#5151: float to bfloat16 by dropping bits pulls each result towards zero, a drift over layers."""
    x, weight = randn(256, 1024, dtype=BF16, device=device), torch.ones(1024, device=device)
    exact = reference.oracle(x, weight)
    error = (gemma_norm.rms_norm(x, weight).double().abs() - exact.abs()) / exact.abs()
    assert abs(float(error.mean())) < 2e-4  # truncation: -2.7e-3
    assert float((error < 0).double().mean()) == pytest.approx(0.5, abs=0.05)


def test_a_weight_that_changes_counts_at_once(device):
    """sgl-project/sglang#26430: a cached ``1 + weight`` went stale under weight sync and CUDA-graph replay."""
    module = gemma_norm.GemmaRMSNorm(512, device=device, dtype=BF16)
    x = randn(4, 512, dtype=BF16, device=device)
    with torch.no_grad():
        module(x)
        for seed in (1, 2):
            module.weight.copy_(randn(512, seed=seed))
            assert_right(module(x), x, module.weight, gemma=True)
        module.weight.data = randn(512, dtype=BF16, device=device, seed=3)
        assert_right(module(x), x, module.weight, gemma=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_weight_that_changes_counts_in_a_captured_graph():
    """sgl-project/sglang#26430, the replay: the graph must read the weight anew."""
    module = gemma_norm.GemmaRMSNorm(512, device="cuda", dtype=BF16)
    x = randn(4, 512, dtype=BF16, device="cuda")
    with torch.no_grad():
        module(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(x)
        for seed in (1, 2):
            module.weight.copy_(randn(512, seed=seed))
            graph.replay()
            assert_right(y, x, module.weight, gemma=True)


def test_the_signature_of_fused_add_rms_norm_is_a_superset_of_vllms(device):
    """sgl-project/sglang#31553: builds with four and with six arguments could not be told apart, and crashed."""
    x, residual = (randn(3, 64, device=device, seed=seed) for seed in range(2))
    weight = make_weight(64, torch.float32, device, False)
    want = gemma_norm.add_rms_norm(x, residual, weight, 1e-5)
    for function in (gemma_norm.fused_add_rms_norm, torch.ops.gemma_norm.fused_add_rms_norm):
        in_place, new_residual = x.clone(), residual.clone()
        assert function(in_place, new_residual, weight, 1e-5) is None
        assert_same_bits(in_place, want[0])
        assert_same_bits(new_residual, want[1])
    schema = torch.ops.gemma_norm.fused_add_rms_norm.default._schema
    names = ["x", "residual", "weight", "eps", "gemma", "post_residual_addition", "round_each_step"]
    assert [argument.name for argument in schema.arguments] == names and not schema.returns


@pytest.mark.parametrize("hidden", [64, 80, 96, 128, 192, 256])
def test_small_hidden_sizes(device, dtype, hidden):
    """sgl-project/sglang#20661: q/k norms of 64 to 256 fell off the fused path, or were wrong on it."""
    x, weight = randn(77, 5, hidden, dtype=dtype, device=device), make_weight(hidden, dtype, device, True)
    assert_right(gemma_norm.rms_norm(x, weight, gemma=True), x, weight, gemma=True)


@pytest.mark.parametrize("hidden", [32, 64, 96, 128, 1024, 4096])
def test_every_element_is_summed_once(device, dtype, hidden):
    """turboderp/exllamav2#137: a reduction written for 32 lanes lost, or doubled, half of a wave of 64.

    Row i has its only element at i, so each row's statistic shows whether that one element was counted exactly once.
    """
    x = torch.eye(hidden, dtype=dtype, device=device)
    y = gemma_norm.rms_norm(x, torch.ones(hidden, device=device), 0.0)
    assert_right(y, x, torch.ones(hidden, device=device), 0.0)
    assert torch.equal(y != 0, x != 0)


def test_a_library_that_fails_to_load_is_not_passed_over(monkeypatch, tmp_path):
    """pytorch/ao (torchao): a native library that failed to load was skipped in silence, and a slow path taken."""
    monkeypatch.setattr(_library, "LIBRARY_DIR", tmp_path)
    monkeypatch.setattr(_library, "_loaded", set())
    with pytest.raises(ImportError, match=r"libgemma_norm_cpu\.so"):
        _library.load()
