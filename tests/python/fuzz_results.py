"""What follows from a call of fuzz_calls.py that the contract allows: layouts, bits and bounds of its results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gemma_norm
from fuzz_calls import OPERATORS, Arguments, Call
from fuzz_oracle import OPS, Bounds, assert_gradients, results
from fuzz_quantised import decoded, quantised
from gemma_norm import reference
from gemma_norm._registry import Operator


def tensors_of(arguments: Arguments) -> dict[str, Tensor]:
    return {k: t for k, t in arguments.items() if isinstance(t, Tensor)}


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def composed(op: str, a: Arguments, douts: list[Tensor]) -> dict[str, Tensor]:
    """The gradients of docs/contract.md, C8, C10.3 and C11.8, by the backward operators, which are fuzzed themselves.

    That of a weight depends on the strides of x (C8.2) and is left out, but for its shape and dtype.
    """
    x, eps, gemma = a.get("x"), a["eps"], bool(a.get("gemma"))

    def ds(dout: Tensor, s: Tensor, weight: Tensor | None, dsum: Tensor | None = None) -> Tensor:
        return OPS.rms_norm_backward_input(dout, s, weight, dsum, eps, gemma)

    if op == "rms_norm":
        return {"x": ds(douts[0], x, a["weight"])}
    if op == "gated_rms_norm":
        if a["gate"] is None:
            return {"x": ds(douts[0], x, a["weight"])} if a.get("group_size") is None else {}
        options = [a.get(k) for k in ("eps", "sigmoid", "norm_before_gate", "group_size")]
        dx, dgate = OPS.gated_rms_norm_backward_input(douts[0], x, a["gate"], a["weight"], *options)
        return {"x": dx, "gate": dgate}
    if op == "qk_norm_rope":
        cos, sin = a["cos"], a["sin"]
        if cos is None:
            sections = a.get("mrope_section"), bool(a.get("mrope_interleaved"))
            cos, sin = reference.angles(a["cos_sin_cache"], a["positions"], a["interleaved"], *sections)
        found = {}
        for name, dy in zip(("q", "k"), douts, strict=False):
            first, rest = dy[..., : cos.shape[-1]].float(), dy[..., cos.shape[-1] :]
            turned = reference.rotate_half(first * sin.float().unsqueeze(-2), a["interleaved"])
            back = (first * cos.float().unsqueeze(-2) - turned).to(dy.dtype)
            found[name] = ds(torch.cat((back, rest), -1), a[name], a[f"{name}_weight"])
        return found
    given = {k: a[k] for k in ("x", "residual", "post_residual_addition") if k in a}
    if op == "rms_norm_add_rms_norm":
        options = {k: a[k] for k in ("eps", "gemma", "round_each_step")}
        n = gemma_norm.rms_norm(x, a["post_weight"], **options)
        of_s = ds(douts[0], n + a["residual"], a["weight"], douts[1])
        return {"residual": of_s, "x": ds(of_s, x, a["post_weight"])}
    s = reference.add_rms_norm(x, a["residual"], None, post_residual_addition=a["post_residual_addition"])[1]
    of_s = ds(douts[0], s, a["weight"], douts[1])
    return {k: of_s.to(t.dtype) for k, t in given.items() if t is not None}


def assert_same(got: Tensor, want: Tensor, what: str) -> None:
    """To the bit, but for the payload of NaN."""
    assert got.dtype == want.dtype, f"{what}: dtype {got.dtype}, expected {want.dtype}"
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.element_size()]
    differ = got.contiguous().view(bits) != want.contiguous().view(bits)
    if got.dtype is not torch.float4_e2m1fn_x2:
        differ &= ~(got.float().isnan() & want.float().isnan())
    assert not bool(differ.any()), f"{what}: {int(differ.sum())} of {differ.numel()} elements differ"


def check_results(call: Call, arguments: Arguments, before: Arguments, got: Any) -> None:
    op, a = call.operator, call.operator.bind((), before)
    native = call.mode not in ("vmap", "vjp")  # these have the bits of plain PyTorch (C8.4)
    if op.written and not op.new_results:
        assert got is None or got is arguments["out"]
        new: tuple[Tensor, ...] = ()
    else:
        new = tuple(y.detach() for y in as_tuple(got))
        inputs = {t.untyped_storage().data_ptr() for t in tensors_of(arguments).values() if t.numel()}
        for y, (shape, dtype, strides) in zip(new, _layouts(op, a), strict=True):
            assert (y.shape, y.dtype) == (shape, dtype)
            assert _steps(y.shape, y.stride()) == _steps(shape, strides) or not native
            assert not y.numel() or y.untyped_storage().data_ptr() not in inputs
    returned = (*new, *(arguments[name] for name in op.written))
    with torch.no_grad():
        if "backward" in call.op:
            if not call.special:
                assert_gradients(call.op, a, returned)
            return
        want = results(op.functional, a, returned, native)
        if op.new_results:
            y, *sums = want
            assert isinstance(y, Bounds)
            want = [*quantised(y, a, returned), *([y] if returns_y(op) else []), *sums]
            if native:
                for result, exact in zip(returned, _quantised_norm(op, a), strict=False):
                    if exact is not None:
                        assert_same(result, exact, "beside the norm, quantised")
        in_new = op.name if not op.written else op.name.removeprefix("fused_") if op.new_results else op.functional
        same = OPERATORS[in_new].overload(**{k: v for k, v in a.items() if k != "out"})
        numbers = decoded(a, returned) if op.new_results else returned
        for y, number, bound, other in zip(returned, numbers, want, as_tuple(same), strict=True):
            if isinstance(bound, Tensor):
                assert_same(y, bound, "a sum or a copy")
            else:
                bound.assert_holds(number)
            if native:
                assert_same(y, other, "beside new tensors without gaps")


def returns_y(op: Operator) -> bool:
    """Of an operator that quantises: whether y is a result as well."""
    return op.name.partition(".")[0].endswith("_y")


def _steps(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
    """The strides that lead somewhere."""
    return [] if 0 in shape else [stride for n, stride in zip(shape, strides, strict=True) if n != 1]


def _layouts(op: Operator, a: Arguments) -> list[tuple[tuple[int, ...], torch.dtype, tuple[int, ...]]]:
    """Shape, dtype and strides of each result that is new."""
    x = a[op.first]
    packed = a.get("scale_dtype") is torch.int32
    if op.new_results:
        dtype, hidden = a["dtype"] or torch.float8_e4m3fn, x.shape[-1]
        columns = hidden // 2 if dtype is torch.float4_e2m1fn_x2 else hidden
        alike = [torch.empty(*x.shape[:-1], columns, dtype=dtype, device="meta")]
        if "scale" not in op.rules:
            groups = 1 if a["scale_group_size"] is None else hidden // a["scale_group_size"]
            groups = (groups + 3) // 4 if packed else groups
            alike.append(torch.empty(*x.shape[:-1], groups, dtype=a["scale_dtype"] or torch.float32, device="meta"))
        alike += [x] if returns_y(op) else []
        alike += [a["residual"]] if "residual" in a and "residual" not in op.written else []
    else:
        alike = [x] + [x[..., :0, :] if a[name] is None else a[name] for name in op.more_results]
    found = [(t.shape, t.dtype, torch.empty(t.shape, device="meta").stride()) for t in alike]
    if a.get("column_major_scale") or packed:  # columns of packed scales begin at multiples of 16 bytes
        found[1] = (*found[1][:2], reference.column_major(alike[1], 4 if packed else 1).stride())
    return found


def _quantised_norm(op: Operator, a: Arguments) -> list[Tensor | None]:
    """q, the scales and y, by the definition, of the norm's own result (C12.1). None: that does not have the bits."""
    norm = OPERATORS[op.functional].overload
    y = as_tuple(norm(**{n.name: a[n.name] for n in norm._schema.arguments if n.name in a}))[0]
    names = ("scale", "dtype", "scale_group_size", "scale_ub", "scale_ue8m0", "scale_dtype", "global_scale")
    found: list[Tensor | None] = list(reference.quantize(y.float(), **{k: a[k] for k in names if k in a}))
    if not a["round_first"] and a["x"].dtype != torch.float32:
        found = [None for _ in found]
    return [*found, *([y] if returns_y(op) else [])]


def check_fake(call: Call, arguments: Arguments, got: Any) -> None:
    """The fake implementation, for torch.compile, foretells the shapes, strides and dtypes."""

    def on_meta(t: Any) -> Any:
        tensor = isinstance(t, Tensor)
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") if tensor else t

    with torch.no_grad():
        foretold = call.operator.overload(**{k: on_meta(t) for k, t in arguments.items()})
    for y, fake in zip(as_tuple(got), as_tuple(foretold), strict=True):
        assert (fake.shape, fake.dtype) == (y.shape, y.dtype)
        assert _steps(fake.shape, fake.stride()) == _steps(y.shape, y.stride())
