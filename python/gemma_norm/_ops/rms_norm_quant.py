"""RMSNorm that gives 8 bits to the next matrix product: the operators and the public functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from .. import reference
from .._calls import explain, overridden
from .._checks import ONE, OPTIONAL_ONE, OPTIONAL_WEIGHT, RESIDUAL, Extent, Rule, X
from .._registry import Arguments, Operator, register


def rms_norm_quant(
    x: Tensor,
    weight: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    gemma: bool = False,
    round_each_step: bool = False,
    *,
    dtype: torch.dtype | None = None,
    scale_group_size: int | None = None,
    scale_ub: Tensor | None = None,
    round_first: bool = False,
    scale_ue8m0: bool = False,
    column_major_scale: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`gemma_norm.rms_norm`, quantised in the same kernel: ``(q, scale)`` with ``q * scale`` close to y::

        y = x * rstd * w                                        in float32, not rounded
        scale = max(|y|) / largest                              of each group of elements, or of the row
        q = round(limit(y * (1 / scale)))                       to nearest even

    largest is the largest number of the dtype: 448 (float8_e4m3fn), 240 (float8_e4m3fnuz), 57344 (float8_e5m2) or 127
    (int8). Results beyond the range become its ends. All arithmetic is in float32.

    Args:
        x, weight, eps, gemma, round_each_step: as for :func:`gemma_norm.rms_norm`.
        scale: one float32, on x's device: the scale of all elements ("static, per tensor"). None: scales are computed,
            one a row ("dynamic, per token"), or with scale_group_size one a group.
        dtype: ``torch.float8_e4m3fn`` (None), ``torch.float8_e5m2``, ``torch.int8``, or ``torch.float8_e4m3fnuz``, the
            float8 of AMD's gfx942.
        scale_group_size: that many neighbouring elements have a scale of their own; it must divide hidden. 128 is what
            DeepSeek's models and DeepGEMM take.
        scale_ub: one float32, on x's device: max(abs(y)) counts as at most this much.
        round_first: round y to x's dtype before it is quantised, as a norm followed by a quantisation does.
        scale_ue8m0: round each scale up to a power of two.
        column_major_scale: the last dimension of the new scale is the outermost in memory, so that the scales of one
            group of all rows are neighbours.

    The scale of a group of zeros is that of max(abs(y)) = 1e-10. A NaN makes the scale of its group a NaN, and itself
    a NaN, which in int8 is 0.

    Returns:
        q, row-major, x's shape; and the scale, float32: ``[..., 1]``, or ``[..., hidden / scale_group_size]``, or the
        one that was given.

    No derivative exists. Tensors that require a gradient while grad mode is on, dual tensors, and calls inside
    ``torch.func.grad`` and the like are refused.

    Raises:
        RuntimeError: if an argument breaks a rule above. Nothing has been written then.
        torch.OutOfMemoryError: if a GPU has no memory for the results. On the CPU, as in PyTorch, it is a RuntimeError.
    """
    norm = {"x": x, "weight": weight, "eps": eps, "gemma": gemma, "round_each_step": round_each_step}
    scales = {
        "scale_group_size": scale_group_size,
        "scale_ub": scale_ub,
        "scale_ue8m0": scale_ue8m0,
        "column_major_scale": column_major_scale,
    }
    results: tuple[Tensor, Tensor] = _call(
        rms_norm_quant, RMS_NORM_QUANT, scale, norm, scales, dtype=dtype, round_first=round_first
    )
    return results


def add_rms_norm_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    gemma: bool = False,
    round_each_step: bool = False,
    *,
    dtype: torch.dtype | None = None,
    scale_group_size: int | None = None,
    scale_ub: Tensor | None = None,
    round_first: bool = False,
    scale_ue8m0: bool = False,
    column_major_scale: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(q, scale, s)``: :func:`rms_norm_quant` of ``s = round(x + residual)``, and that sum.

    residual has x's shape and device and x's dtype or float32, which is also that of s, as for
    :func:`gemma_norm.add_rms_norm`. All other arguments and the errors are those of :func:`rms_norm_quant`.
    """
    norm = {"x": x, "residual": residual, "weight": weight, "eps": eps, "gemma": gemma}
    norm["round_each_step"] = round_each_step
    scales = {
        "scale_group_size": scale_group_size,
        "scale_ub": scale_ub,
        "scale_ue8m0": scale_ue8m0,
        "column_major_scale": column_major_scale,
    }
    options = {"dtype": dtype, "round_first": round_first}
    results: tuple[Tensor, Tensor, Tensor] = _call(
        add_rms_norm_quant, ADD_RMS_NORM_QUANT, scale, norm, scales, **options
    )
    return results


def fused_add_rms_norm_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    gemma: bool = False,
    round_each_step: bool = False,
    *,
    dtype: torch.dtype | None = None,
    scale_group_size: int | None = None,
    scale_ub: Tensor | None = None,
    round_first: bool = False,
    scale_ue8m0: bool = False,
    column_major_scale: bool = False,
) -> tuple[Tensor, Tensor]:
    """Overwrite residual with ``s = round(x + residual)``, and return :func:`rms_norm_quant` of s: ``(q, scale)``.

    x is only read, because q does not fit its dtype, unless it is residual itself. Otherwise residual must not overlap
    x. The bits are those of :func:`add_rms_norm_quant`, and so are the other arguments and the errors.
    """
    norm = {"x": x, "residual": residual, "weight": weight, "eps": eps, "gemma": gemma}
    norm["round_each_step"] = round_each_step
    scales = {
        "scale_group_size": scale_group_size,
        "scale_ub": scale_ub,
        "scale_ue8m0": scale_ue8m0,
        "column_major_scale": column_major_scale,
    }
    options = {"dtype": dtype, "round_first": round_first}
    op = FUSED_ADD_RMS_NORM_QUANT
    results: tuple[Tensor, Tensor] = _call(fused_add_rms_norm_quant, op, scale, norm, scales, **options)
    return results


for _function in (rms_norm_quant, add_rms_norm_quant, fused_add_rms_norm_quant):
    torch.fx.node.has_side_effect(_function)


def _call(
    function: Callable[..., Any],
    operators: tuple[Operator, Operator],
    scale: Any,
    norm: Arguments,
    scales: Arguments,
    **options: Any,
) -> Any:
    """Call the first of ``operators``, or if a scale is given the second. ``scales`` are the arguments of the first."""
    op = operators[0] if scale is None else operators[1]
    arguments = {**norm, **scales, **options} if scale is None else {**norm, "scale": scale, **options}
    tensors = tuple(arguments[name] for name in op.rules)
    for name, value in scales.items():
        if scale is not None and value is not None and value is not False:
            raise RuntimeError(f"{op.label}: {name} must be {_ABSENT[name]} with a scale, got {value!r}")
    if has_torch_function(tensors):
        results = overridden(function, op, tensors, **{**norm, **scales, **options, "scale": scale})
        is_definition = isinstance(results, tuple) and len(results) == len(op.extents) < len(operators[0].extents)
        return (results[0], scale, *results[1:]) if is_definition else results  # exported to ONNX, with a scale
    try:
        results = op.overload(**arguments)
    except RuntimeError as error:
        explain(error, op, **arguments)
        raise
    if scale is None:
        return results
    return (results, scale) if isinstance(results, Tensor) else (results[0], scale, *results[1:])


_ABSENT = {"scale_group_size": None, "scale_ub": None, "scale_ue8m0": False, "column_major_scale": False}


def _new_results(arguments: Arguments) -> tuple[Tensor, ...]:
    """Empty results of a call of any operator here: q, the scale, unless it is given, and the sum, if it is new."""
    x, residual = arguments["x"], arguments.get("residual")
    dtype = arguments["dtype"] or torch.float8_e4m3fn
    results = [torch.empty(x.shape, dtype=dtype, device=x.device)]
    if "scale" not in arguments:
        groups = 1 if arguments["scale_group_size"] is None else x.shape[-1] // arguments["scale_group_size"]
        shape = (*x.shape[:-1], groups)
        scale = x.new_empty(shape, dtype=torch.float32)
        results.append(reference.column_major(scale) if arguments["column_major_scale"] else scale)
    if residual is not None:
        results.append(residual.new_empty(residual.shape))
    return tuple(results)


def _operators(
    name: str, definition: Callable[..., Any], functional: str, *extents: Extent
) -> tuple[Operator, Operator]:
    """The operator that computes scales, and its overload that is given one."""
    norm: dict[str, Rule] = {"x": X, "weight": OPTIONAL_WEIGHT}
    if "add" in name:
        norm["residual"] = RESIDUAL
    dynamic = Operator(
        name,
        definition,
        {**norm, "scale_ub": OPTIONAL_ONE},
        functional,
        new_results=_new_results,
        extents=(Extent.ROWS, Extent.SCALES, *extents),
    )
    given = Operator(
        f"{name}.static",
        definition,
        {**norm, "scale": ONE},
        functional,
        new_results=_new_results,
        extents=(Extent.ROWS, *extents),
    )
    register(dynamic, given)
    return dynamic, given


RMS_NORM_QUANT = _operators("rms_norm_quant", reference.rms_norm_quant, "rms_norm")
ADD_RMS_NORM_QUANT = _operators("add_rms_norm_quant", reference.add_rms_norm_quant, "add_rms_norm", Extent.LIKE_X)
FUSED_ADD_RMS_NORM_QUANT = _operators("fused_add_rms_norm_quant", reference.add_rms_norm_quant, "add_rms_norm")
