"""Other libraries' norms, through their own Python functions, as make compare-amdgpu installs them from PyPI.

Each function takes a dictionary of PyTorch CPU tensors and returns another. A library's packages are imported without
their __init__, which would import all of it, and what their kernels do not need is replaced by stand-ins.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
from oracle import EPS

PACKAGES = [
    "liger_kernel", "liger_kernel.ops", "aiter", "aiter.ops", "aiter.ops.triton", "sglang", "sglang.kernels",
    "sglang.kernels.ops", "sglang.kernels.ops.layernorm", "sglang.kernels.ops.attention",
    "sglang.kernels.ops.attention.fla",
]  # fmt: skip
Tensors = dict[str, torch.Tensor]


def _no(*_, **__) -> bool:
    return False


STAND_INS = {
    "einops": {"rearrange": _no},
    "sglang.kernels.jit.utils": {"is_arch_support_pdl": _no},
    "sglang.srt.batch_invariant_ops": {"is_batch_invariant_mode_enabled": _no},
    "sglang.srt.model_executor.cuda_graph_config": {
        "Backend": types.SimpleNamespace(TC_PIECEWISE=0),
        "Phase": types.SimpleNamespace(PREFILL=0),
        "check_cuda_graph_backend": _no,
    },
    "sglang.srt.utils": {
        "cdiv": lambda a, b: -(-a // b),
        "cpu_has_amx_support": _no,
        "device_context": lambda device: contextlib.nullcontext(),
        "is_cpu": _no,
        "is_npu": _no,
        "next_power_of_2": lambda n: 1 << (n - 1).bit_length(),
    },
}


def find_in(folder: Path) -> None:
    """Imports them from this folder from here on."""
    sys.path.append(str(folder))
    for name in PACKAGES:
        module = types.ModuleType(name)
        module.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = module
    for name, content in STAND_INS.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        sys.modules[name] = module


def liger(t: Tensors) -> Tensors:
    ops = import_module("liger_kernel.ops.rms_norm")
    return {"out": ops.rms_norm_forward(t["x"], t["weight"], EPS, 1.0, "gemma", None)[0]}


def liger_add(t: Tensors) -> Tensors:
    ops = import_module("liger_kernel.ops.fused_add_rms_norm")
    out, total, *_ = ops.fused_add_rms_norm_forward(t["x"], t["residual"], t["weight"], EPS, 1.0, "gemma")
    return {"out": out, "residual_out": total}


def liger_backward(t: Tensors) -> Tensors:
    ops = import_module("liger_kernel.ops.rms_norm")
    block, warps = ops.calculate_settings(t["x"].shape[-1])
    dx, dweight = ops.rms_norm_backward(
        t["dout"].clone(), t["x"], t["weight"], t["rstd"], 1.0, ops._CASTING_MODE_GEMMA.value, block, warps, False, None
    )
    return {"dx": dx, "dweight": dweight}


def sglang(t: Tensors) -> Tensors:
    ops = import_module("sglang.kernels.ops.layernorm.minimax_m3_rmsnorm")
    return {"out": ops.gemma_rmsnorm(t["x"], t["weight"], EPS)}


def sglang_add(t: Tensors) -> Tensors:
    ops = import_module("sglang.kernels.ops.layernorm.minimax_m3_rmsnorm")
    out, total = ops.gemma_fused_add_rmsnorm(t["x"], t["residual"], t["weight"], EPS)
    return {"out": out, "residual_out": total}


def sglang_gated(t: Tensors) -> Tensors:
    ops = import_module("sglang.kernels.ops.attention.fla.layernorm_gated")
    return {"out": ops._layer_norm_fwd(t["x"], t["weight"], None, EPS, z=t["gate"], is_rms_norm=True)[0]}


def aiter(t: Tensors) -> Tensors:
    ops = import_module("aiter.ops.triton.rmsnorm")
    return {"out": ops._rmsnorm_forward(t["x"], t["weight"], EPS)[0]}


def aiter_add(t: Tensors) -> Tensors:
    ops = import_module("aiter.ops.triton.rmsnorm")
    out, total = torch.empty_like(t["x"]), torch.empty_like(t["x"])
    rsigma = torch.empty(len(out))
    ops._rmsnorm_forward_with_add(out, t["x"], t["residual"], total, t["weight"], rsigma, EPS)
    return {"out": out, "residual_out": total}


def aiter_backward(t: Tensors) -> Tensors:
    ops = import_module("aiter.ops.triton.rmsnorm")
    dx, dweight = ops._rmsnorm_backward(t["dout"], t["x"], t["weight"], t["rstd"])
    return {"dx": dx, "dweight": dweight}


def sglang_rope(t: Tensors) -> Tensors:
    """Rounds to bfloat16 whatever is not float16, so float32 heads come out with errors of bfloat16."""
    ops = import_module("sglang.kernels.ops.attention.fused_qk_rmsnorm_rope_gate")
    (tokens, heads, size), k_heads = t["x"].shape, t["k"].shape[1]
    q, k, _ = ops.fused_qk_gemma_rmsnorm_rope_gate(
        t["x"].view(tokens, -1), t["k"].view(tokens, -1), t["weight"], t["k_weight"], t["cos_sin_cache"],
        t["positions"], EPS, heads, k_heads, size, size, has_gate=False,
    )  # fmt: skip
    return {"out": q.view(t["x"].shape), "k_out": k.view(t["k"].shape)}


def aiter_quant(t: Tensors) -> Tensors:
    ops = import_module("aiter.ops.triton.rmsnorm")
    out, scale = torch.empty_like(t["x"], dtype=torch.int8), torch.empty(len(t["x"]))
    ops.rmsnorm2d_fwd_with_dynamicquant(out, t["x"], scale, t["weight"], EPS)
    return {"out": out, "scale_out": scale[:, None]}


def aiter_add_quant(t: Tensors) -> Tensors:
    ops = import_module("aiter.ops.triton.rmsnorm")
    out, scale, total = torch.empty_like(t["x"], dtype=torch.int8), torch.empty(len(t["x"])), torch.empty_like(t["x"])
    ops.rmsnorm2d_fwd_with_add_dynamicquant(out, t["x"], t["residual"], total, scale, t["weight"], EPS)
    return {"out": out, "scale_out": scale[:, None], "residual_out": total}


# By operator. aiter's multiply by the weight, the others by 1 + weight, which is what the tensors are made for.
RUN: dict[str, dict[str, Callable[[Tensors], Tensors]]] = {
    "rms_norm": {"Liger": liger, "SGLang": sglang, "aiter Triton": aiter},
    "add_rms_norm": {"Liger": liger_add, "SGLang": sglang_add, "aiter Triton": aiter_add},
    "gated_rms_norm": {"SGLang": sglang_gated},
    "rms_norm_add_rms_norm": {},
    "rms_norm_backward": {"Liger": liger_backward, "aiter Triton": aiter_backward},
    "gated_rms_norm_backward": {},
    "qk_norm_rope": {"SGLang": sglang_rope},
    "rms_norm_quant": {"aiter Triton": aiter_quant},
    "add_rms_norm_quant": {"aiter Triton": aiter_add_quant},
    "gated_rms_norm_quant": {},
}
PLAIN_WEIGHT = ("aiter Triton", "aiter CK")  # and every gated norm
