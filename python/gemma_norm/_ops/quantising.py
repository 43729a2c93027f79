"""What the operators that quantise share: their overloads, and how a function calls them.

``rms_norm_quant`` computes scales, ``rms_norm_quant.static`` is given one. Those that return y as well are
``rms_norm_quant_y`` and ``rms_norm_quant_y.static``: TorchScript tells overloads apart by their arguments alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from .. import reference
from .._calls import check_eps, check_size, explain, overridden
from .._checks import ONE, OPTIONAL_ONE, Extent, Rule
from .._checks_quantized import QUANTIZED_DTYPES, SCALE_DTYPES, check_dtype
from .._registry import Arguments, Operator, register

_WITHOUT_SCALE = {
    "scale_group_size": None,
    "scale_ub": None,
    "scale_ue8m0": False,
    "column_major_scale": False,
    "scale_dtype": None,
    "global_scale": None,
}
"""The arguments that say how scales are computed, and what they must be where a scale is given."""


class QuantisingOperators:
    """The overloads of an operator: with scales that it computes or one that is given, and with y as well or not."""

    def __init__(
        self,
        function: Callable[..., Any],
        definition: Callable[..., Any],
        rules: Mapping[str, Rule],
        differentiable: str,
        *sums: Extent,
    ):
        """``sums`` are the extents of the results after q, the scales and y."""
        self.function = function
        self.overloads: dict[tuple[bool, bool], Operator] = {}
        for given in (False, True):
            for return_y in (False, True):
                overload = ("_y" if return_y else "") + (".static" if given else "")
                scales, ys = (() if given else (Extent.SCALES,)), ((Extent.LIKE_X,) if return_y else ())
                self.overloads[given, return_y] = Operator(
                    function.__name__ + overload,
                    _returning_y(definition) if return_y else definition,
                    {
                        **rules,
                        **({"scale": ONE} if given else {"scale_ub": OPTIONAL_ONE, "global_scale": OPTIONAL_ONE}),
                    },
                    differentiable,
                    new_results=_new_results_with_y if return_y else _new_results,
                    extents=(Extent.ROWS, *scales, *ys, *sums),
                )
        register(*self.overloads.values())

    def call(self, scale: Any, return_y: bool, **arguments: Any) -> tuple[Tensor, ...]:
        """Call the overload for these arguments, and return what the public function does."""
        if not isinstance(return_y, bool):
            raise RuntimeError(f"{self.function.__name__}: return_y must be a bool, got {return_y!r}")
        op = self.overloads[scale is not None, return_y]
        given = {**arguments, "scale": scale, "return_y": return_y}
        if scale is not None:
            arguments["scale"] = scale
            for name, absent in _WITHOUT_SCALE.items():
                value = arguments.pop(name)
                if value is not None and value is not False:
                    raise RuntimeError(f"{op.label}: {name} must be {absent} with a scale, got {value!r}")
        tensors = tuple(arguments[name] for name in op.rules)
        if has_torch_function(tensors):
            results: tuple[Tensor, ...] = overridden(self.function, op, tensors, **given)
            # An export to ONNX runs the definition, which does not return a scale that it is given.
            is_definition = isinstance(results, tuple) and scale is not None and len(results) == len(op.extents)
            return (results[0], scale, *results[1:]) if is_definition else results
        check_eps(op, arguments["eps"])
        for name in ("group_size", "scale_group_size"):
            check_size(op, name, arguments.get(name))
        for name, dtypes in (("dtype", QUANTIZED_DTYPES), ("scale_dtype", SCALE_DTYPES)):
            if (dtype := arguments.get(name)) is not None:  # PyTorch cannot pass on every dtype, and takes integers
                check_dtype(op.label, name, dtype, dtypes)
        try:
            results = op.overload(**arguments)
        except RuntimeError as error:
            explain(error, op, **arguments)
            raise
        if scale is None:
            return results
        return (results, scale) if isinstance(results, Tensor) else (results[0], scale, *results[1:])


def _returning_y(definition: Callable[..., Any]) -> Callable[..., Any]:
    def with_y(**arguments: Any) -> Any:
        return definition(**{**arguments, "return_y": True})

    return with_y


def _new_results(arguments: Arguments, return_y: bool = False) -> tuple[Tensor, ...]:
    """Empty results of a call of any operator here: q, the scale, unless it is given, y, and the sum."""
    x, residual = arguments["x"], arguments.get("residual")
    dtype = arguments["dtype"] or torch.float8_e4m3fn
    hidden = x.shape[-1]
    columns = hidden // 2 if dtype is torch.float4_e2m1fn_x2 else hidden
    results = [torch.empty((*x.shape[:-1], columns), dtype=dtype, device=x.device)]
    if "scale" not in arguments:
        groups = 1 if arguments["scale_group_size"] is None else hidden // arguments["scale_group_size"]
        packed = arguments["scale_dtype"] is torch.int32
        shape = (*x.shape[:-1], -(-groups // 4) if packed else groups)
        like = {"dtype": arguments["scale_dtype"] or torch.float32, "device": x.device}
        if packed or arguments["column_major_scale"]:
            strides = reference.column_major_strides(shape, 4 if packed else 1)
            results.append(torch.empty_strided(shape, strides, **like))
        else:
            results.append(torch.empty(shape, **like))
    if return_y:
        results.append(x.new_empty(x.shape))
    if residual is not None:
        results.append(residual.new_empty(residual.shape))
    return tuple(results)


def _new_results_with_y(arguments: Arguments) -> tuple[Tensor, ...]:
    return _new_results(arguments, return_y=True)
