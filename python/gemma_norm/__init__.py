"""RMSNorm, plain, with the residual addition or with a gate, by native kernels on AMD and NVIDIA GPUs and on the CPU.

Importing this package loads the native libraries and defines ``torch.ops.gemma_norm``. The functions are
:func:`rms_norm`, :func:`add_rms_norm`, :func:`rms_norm_add_rms_norm`, :func:`gated_rms_norm`, :func:`qk_norm_rope` and,
in place, :func:`fused_add_rms_norm`, :func:`fused_rms_norm_add_rms_norm` and :func:`fused_qk_norm_rope`. For products
in 8 bits there are :func:`rms_norm_quant`, :func:`add_rms_norm_quant`, :func:`fused_add_rms_norm_quant` and
:func:`gated_rms_norm_quant`. The modules are :class:`RMSNorm`, :class:`GemmaRMSNorm` and :class:`GatedRMSNorm`.
:func:`libraries` says what is installed, and ``python -m gemma_norm`` checks and times it.
"""

from . import _library

_library.load()

from . import reference  # noqa: E402
from ._build_info import VERSION as __version__  # noqa: E402
from ._library import Library, libraries  # noqa: E402
from ._ops.gated_rms_norm import gated_rms_norm  # noqa: E402
from ._ops.gated_rms_norm_quant import gated_rms_norm_quant  # noqa: E402
from ._ops.qk_norm_rope import fused_qk_norm_rope, qk_norm_rope  # noqa: E402
from ._ops.rms_norm import add_rms_norm, fused_add_rms_norm, rms_norm  # noqa: E402
from ._ops.rms_norm_add_rms_norm import fused_rms_norm_add_rms_norm, rms_norm_add_rms_norm  # noqa: E402
from ._ops.rms_norm_quant import add_rms_norm_quant, fused_add_rms_norm_quant, rms_norm_quant  # noqa: E402
from .gated_module import GatedRMSNorm  # noqa: E402
from .module import GemmaRMSNorm, RMSNorm  # noqa: E402

__all__ = [
    "GatedRMSNorm",
    "GemmaRMSNorm",
    "Library",
    "RMSNorm",
    "__version__",
    "add_rms_norm",
    "add_rms_norm_quant",
    "fused_add_rms_norm",
    "fused_add_rms_norm_quant",
    "fused_qk_norm_rope",
    "fused_rms_norm_add_rms_norm",
    "gated_rms_norm",
    "gated_rms_norm_quant",
    "libraries",
    "qk_norm_rope",
    "reference",
    "rms_norm",
    "rms_norm_add_rms_norm",
    "rms_norm_quant",
]
