"""The suites qk-rope and norm-add: what is measured, and other libraries, on stand-ins that have their signatures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from benchmark_support import measure
from gemma_norm import reference
from gemma_norm.benchmark import rotation
from gemma_norm.benchmark.cases import NORM_ADD_NORM, QK_NORM_ROPE, Inputs, Point
from gemma_norm.benchmark.providers import PROVIDERS, Provider
from gemma_norm.benchmark.results import Result
from gemma_norm.benchmark.rotation import ROTATIONS, Rotation
from stand_ins import add_modules

OURS = ("ours", "ours:rounded", "ours:cache", "ours:norms", "copy_", "eager")
EACH = pytest.mark.parametrize("r", ROTATIONS, ids=str)


def at(r: Rotation) -> Point:
    return Point("qk-rope", QK_NORM_ROPE, 2 * r.heads, r.size, torch.bfloat16, "cpu", threads=1, rotation=r)


def with_angles_swapped(op: str, weight: Tensor, gemma: bool) -> rotation.Call:
    ours = rotation.ours(op, weight, gemma)
    return lambda q, k, cos, sin, *others: ours(q, k, sin, cos, *others)


def with_zeros_copied(op: str, weight: Tensor, gemma: bool) -> rotation.Call:
    ours = rotation.ours(op, weight, gemma)

    def call(*arguments: Tensor) -> tuple[Tensor, ...]:
        y, z, *copies = ours(*arguments)
        return y, z, *(torch.zeros_like(t) for t in copies)

    return call


def without_copies(op: str, weight: Tensor, gemma: bool) -> rotation.Call:
    ours = rotation.ours(op, weight, gemma)
    return lambda *arguments: ours(*arguments)[:2]


@EACH
def test_heads_that_are_rotated_are_measured_and_checked(r: Rotation) -> None:
    """All that compute it are right, those that do not are found, and the bytes are the least."""
    copied = {"gate": r.q_heads, "v": r.k_heads}
    elements = 2 * 2 * (r.heads + sum(copied[name] for name in r.copies)) * r.size
    assert at(r).bytes == 2 * (elements + 2 * r.size + 2 * 2 * r.rotary)
    makes = {"swapped": with_angles_swapped, "zeros": with_zeros_copied, "none": without_copies}
    wrong = [Provider(name, make, (QK_NORM_ROPE,)) for name, make in makes.items()]
    found = measure(at(r), *(PROVIDERS[name] for name in (*OURS, "ours:in_place")), *wrong)
    assert all(found[name].p50_us and not found[name].note for name in OURS)
    assert "units in the last place off" in found["swapped"].note
    in_place = found["ours:in_place"]
    assert in_place.p50_us and not in_place.note if r.fused and not r.gate else "works in place" in in_place.note
    if r.copies:
        assert "a copy is" in found["zeros"].note and "0 tensors were copied" in found["none"].note


@EACH
def test_the_tensors_lie_as_in_a_model(r: Rotation) -> None:
    q, k, cos, sin, cache, rows, *copied = Inputs(at(r), 1).sets[0]
    assert q.shape == (2, r.q_heads, r.size) and k.shape == (2, r.k_heads, r.size) and len(copied) == len(r.copies)
    assert q.stride(1) == r.size * (2 if r.gate else 1)
    same = q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    assert same == r.fused and not any(t.is_contiguous() for t in copied)
    assert cos.dtype == sin.dtype == torch.bfloat16 and cache.dtype == torch.float32
    for t, want in zip((cos, sin), reference.angles(cache, rows, False, None, False), strict=True):
        assert torch.equal(t.float(), want)


def norm(x, weight, eps=1e-6, out=None, enable_pdl=None):
    y = reference.rms_norm(x, weight, eps)
    return y if out is None else out.copy_(y)


def gemma_norm(x, weight, eps=1e-6, out=None, enable_pdl=None):
    y = reference.rms_norm(x, weight, eps, True)
    return y if out is None else out.copy_(y)


def fused_add(x, residual, weight, eps=1e-6, enable_pdl=None):
    y, s = reference.add_rms_norm(x, residual, weight, eps)
    x.copy_(y), residual.copy_(s)


def gemma_fused_add(x, residual, weight, eps=1e-6, enable_pdl=None):
    y, s = reference.add_rms_norm(x, residual, weight, eps, True)
    x.copy_(y), residual.copy_(s)


def rope_in_place(positions, query, key, head_size, cos_sin_cache, is_neox=True):
    assert cos_sin_cache.dtype == torch.float32 and is_neox
    for t in (query, key):
        assert t.dim() == 2
        heads = t.view(len(t), -1, head_size)
        cos, sin = reference.angles(cos_sin_cache, positions, False, None, False)
        heads.copy_(rotation.rotated(heads.float(), cos, sin))


def heads_of(q_gate, k, weights, cache, positions, eps, sizes, has_gate, gemma):
    q_heads, k_heads, head_dim, rotary = sizes
    assert q_gate.dim() == k.dim() == 2 and cache.shape[-1] == rotary and positions.shape == q_gate.shape[:1]
    q = q_gate.view(len(q_gate), q_heads, head_dim * (2 if has_gate else 1))
    options = {"cos_sin_cache": cache, "positions": positions, "eps": eps, "gemma": gemma, "round_rotation": True}
    y, z = reference.qk_norm_rope(q[..., :head_dim], k.view(len(k), k_heads, head_dim), *weights, **options)
    return y.flatten(1), z.flatten(1), q[..., head_dim:].flatten(1) if has_gate else None


def sglangs(
    q_gate, k, q_weight, k_weight, cos_sin_cache, positions, eps, num_q_heads, num_kv_heads, head_dim, rotary_dim,
    has_gate=True, mrope_axis_map=None,
):  # fmt: skip
    sizes, weights = (num_q_heads, num_kv_heads, head_dim, rotary_dim), (q_weight, k_weight)
    return heads_of(q_gate, k, weights, cos_sin_cache, positions, eps, sizes, has_gate, True)


def vllms(
    q_gate, k, q_weight, k_weight, cos_sin_cache, positions, eps, num_q_heads, num_kv_heads, head_dim, rotary_dim,
    mrope_section=None, norm_beta=0.0,
):  # fmt: skip
    sizes, weights = (num_q_heads, num_kv_heads, head_dim, rotary_dim), (q_weight, k_weight)
    return heads_of(q_gate, k, weights, cos_sin_cache, positions, eps, sizes, True, norm_beta == 1.0)


VLLMS_OPERATOR = (
    "fused_qk_norm_rope(Tensor! qkv, int num_heads_q, int num_heads_k, int num_heads_v, int head_dim, float eps, "
    "Tensor q_weight, Tensor k_weight, Tensor cos_sin_cache, bool is_neox, Tensor position_ids) -> ()"
)


def vllms_operator(qkv, q_heads, k_heads, v_heads, head_dim, eps, q_weight, k_weight, cache, is_neox, positions):
    assert qkv.is_contiguous() and qkv.shape[1] == (q_heads + k_heads + v_heads) * head_dim and is_neox
    q, k, _ = torch.split(qkv.view(len(qkv), -1, head_dim), [q_heads, k_heads, v_heads], dim=1)
    y, z = reference.qk_norm_rope(q, k, q_weight, k_weight, cos_sin_cache=cache, positions=positions, eps=eps)
    q.copy_(y), k.copy_(z)


def aiters(x, residual, post_weight, pre_weight, post_eps, pre_eps, residual_out, out=None):
    y, s = reference.rms_norm_add_rms_norm(x, residual, post_weight, pre_weight, post_eps, True)
    assert post_eps == pre_eps
    residual_out.copy_(s)
    return y


def vllms_norm(out, x, weight, eps):
    out.copy_(reference.rms_norm(x, weight, eps))


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    names = {"rmsnorm": norm, "gemma_rmsnorm": gemma_norm, "fused_add_rmsnorm": fused_add}
    names |= {"gemma_fused_add_rmsnorm": gemma_fused_add, "apply_rope_with_cos_sin_cache_inplace": rope_in_place}
    add_modules(
        monkeypatch,
        flashinfer=names,
        sgl_kernel=names,
        sglang__kernels__ops__attention__fused_qk_rmsnorm_rope_gate={"fused_qk_gemma_rmsnorm_rope_gate": sglangs},
        vllm___custom_ops={"rms_norm": vllms_norm, "fused_add_rms_norm": fused_add},
        vllm__model_executor__layers__fused_qk_norm_rope={"fused_qk_rmsnorm_rope_gate": vllms},
        aiter__ops__triton__normalization__fused_rmsnorm_add_rmsnorm={"fused_rmsnorm_add_rmsnorm": aiters},
    )
    with torch.library._scoped_library("_C", "FRAGMENT") as library:
        library.define(VLLMS_OPERATOR)
        library.impl("fused_qk_norm_rope", vllms_operator, "CPU")
        yield


def served(found: dict[str, Result]) -> set[str]:
    """Those that have a time. The others have a note, and none has computed something else."""
    assert all(bool(r.p50_us) != bool(r.note) for r in found.values())
    assert all(not r.note or r.note.startswith("ValueError: ") for r in found.values()), found
    return {name for name, r in found.items() if r.p50_us}


@EACH
def test_other_libraries_rotate_where_they_have_the_function(r: Rotation, peers: None) -> None:
    names = ("flashinfer:three kernels", "sglang", "vllm:gate", "vllm:in_place")
    want = {"flashinfer:three kernels"}
    if r.copies == ("gate",):
        want |= {"sglang", "vllm:gate"}
    if not r.gate:
        want |= {"sglang", "vllm:in_place"} if r.fused else {"sglang"}
    assert served(measure(at(r), *(PROVIDERS[name] for name in names))) == want


def test_other_libraries_write_both_norms_around_an_addition(peers: None) -> None:
    names = ("flashinfer", "sgl_kernel", "vllm", "aiter:norm add norm")
    where = Point("norm-add", NORM_ADD_NORM, 8, 64, torch.bfloat16, "cpu", threads=1)
    assert served(measure(where, *(PROVIDERS[name] for name in names))) == {*names}
