"""RMSNorm as modules, with the calling convention of SGLang's and vLLM's layers."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from . import ops, reference, routing

Output = Tensor | tuple[Tensor, Tensor]

_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_on_rocm = torch.version.hip is not None


class RMSNorm(nn.Module):
    """``y = round(s * rstd * weight)`` over the last dimension.

    :func:`gemma_norm.rms_norm` states formula, dtypes and strides, :meth:`forward` what is written.

    Args:
        hidden_size: size of the last dimension of the inputs.
        eps: added to the mean of squares.
        device, dtype: of the weight, which may be float32 with 16-bit inputs and is read anew in every call.
        backend: what :meth:`forward_hip` uses on AMD GPUs, see :mod:`gemma_norm.routing`: "auto" or, to force one,
            "native", "aiter", "vllm" or "torch". Other devices have one backend.
    """

    gemma: ClassVar[bool] = False
    weight: nn.Parameter

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.backend = routing.checked(backend)
        self.hidden_size = hidden_size
        self.variance_epsilon = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The identity's weight: ones, or zeros where it is zero-centred."""
        nn.init.constant_(self.weight, 0.0 if self.gemma else 1.0)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, post_residual_addition: Tensor | None = None
    ) -> Output:
        """``y``; with a residual ``(y, s)``, ``s = round(x + residual)`` being the next residual.

        With a residual, in inference (``torch.no_grad()`` or ``inference_mode()``), the work is done in place as in
        SGLang and vLLM: **the results are x and residual themselves, overwritten**. While gradients are recorded they
        are new tensors. ``post_residual_addition`` is added to the residual first, and needs one.
        """
        if x.is_cuda:
            if _on_rocm:
                return self.forward_hip(x, residual, post_residual_addition)
            return self.forward_cuda(x, residual, post_residual_addition)
        return self.forward_cpu(x, residual, post_residual_addition)

    def forward_native(
        self, x: Tensor, residual: Tensor | None = None, post_residual_addition: Tensor | None = None
    ) -> Output:
        """Plain PyTorch on any device: never in place, differentiable any number of times. For comparison."""
        if residual is None:
            self._refuse_lone(post_residual_addition)
            return reference.rms_norm(x, self.weight, self.variance_epsilon, self.gemma)
        return reference.add_rms_norm(
            x, residual, self.weight, self.variance_epsilon, self.gemma, post_residual_addition
        )

    def _forward_op(
        self, x: Tensor, residual: Tensor | None = None, post_residual_addition: Tensor | None = None
    ) -> Output:
        weight = self.weight
        if residual is None:
            self._refuse_lone(post_residual_addition)
            return ops.rms_norm(x, weight, self.variance_epsilon, self.gemma)
        if _is_grad_enabled():
            return ops.add_rms_norm(x, residual, weight, self.variance_epsilon, self.gemma, post_residual_addition)
        ops.fused_add_rms_norm(x, residual, weight, self.variance_epsilon, self.gemma, post_residual_addition)
        return x, residual

    # One method a device, as in SGLang and vLLM, for subclasses to replace. The operators' own dispatch serves these
    # two, and through forward_cpu meta tensors and devices on plain PyTorch as well.
    forward_cuda = forward_cpu = _forward_op

    def forward_hip(
        self, x: Tensor, residual: Tensor | None = None, post_residual_addition: Tensor | None = None
    ) -> Output:
        """Our HIP kernels, or those of another package where ours are absent, see :mod:`gemma_norm.routing`."""
        # Not while compiling: a graph would be bound to what the set holds now.
        if self.backend in routing.served_by_ours and not _is_compiling():
            return self._forward_op(x, residual, post_residual_addition)
        return routing.forward(self, x, residual, post_residual_addition)

    def _refuse_lone(self, post_residual_addition: Tensor | None) -> None:
        if post_residual_addition is not None:
            raise RuntimeError(f"{type(self).__name__}: post_residual_addition needs a residual, got residual=None")

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.variance_epsilon}, gemma={self.gemma}"


class GemmaRMSNorm(RMSNorm):
    """RMSNorm with a zero-centred weight, ``y = round(s * rstd * (1 + weight))``: Gemma, Qwen3-Next, Qwen3.5.

    ``1 + weight`` is computed inside the kernel in float32 and kept nowhere, so a weight that is loaded or synchronised
    later, or under a captured CUDA graph, counts at once.
    """

    gemma = True
