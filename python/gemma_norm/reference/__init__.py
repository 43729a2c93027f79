"""The numerical contract in plain PyTorch, the exact answer, and the distance of a result from it.

``rms_norm``, ``add_rms_norm``, ``gated_rms_norm``, ``rms_norm_add_rms_norm``, ``qk_norm_rope``, ``rms_norm_quant``,
``add_rms_norm_quant`` and ``gated_rms_norm_quant`` are the operators' definitions. They also run on devices without a
native kernel. ``oracle`` computes the exact answer in float64. ``ulp_error`` says how far a result is from it, and
``max_ulp_error`` how far it may be. The tests and ``python -m gemma_norm`` use these.
"""

from .error import max_ulp_error, oracle, ulp_error
from .norms import add_rms_norm, gated_rms_norm, rms_norm, rms_norm_add_rms_norm
from .quantised import (
    QUANTIZED_LARGEST,
    add_rms_norm_quant,
    column_major,
    column_major_strides,
    gated_rms_norm_quant,
    packed_scales,
    quantize,
    rms_norm_quant,
)
from .rotation import angles, mrope_axes, norm_of_heads, qk_norm_rope, rotate_half

__all__ = [
    "QUANTIZED_LARGEST",
    "add_rms_norm",
    "add_rms_norm_quant",
    "angles",
    "column_major",
    "column_major_strides",
    "gated_rms_norm",
    "gated_rms_norm_quant",
    "max_ulp_error",
    "mrope_axes",
    "norm_of_heads",
    "oracle",
    "packed_scales",
    "qk_norm_rope",
    "quantize",
    "rms_norm",
    "rms_norm_add_rms_norm",
    "rms_norm_quant",
    "rotate_half",
    "ulp_error",
]
