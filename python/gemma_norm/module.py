"""RMSNorm as modules, with the calling convention of SGLang's and vLLM's layers."""

from __future__ import annotations

from numbers import Integral, Real
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import reference, routing
from ._calls import functorch_is_active
from ._checks import UNWRITABLE
from ._ops import rms_norm as ops

Output = Tensor | tuple[Tensor, Tensor]

_is_compiling = torch.compiler.is_compiling
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_fused_add_rms_norm = torch.ops.gemma_norm.fused_add_rms_norm.default
_is_grad_enabled = torch.is_grad_enabled
_is_tracing = torch._C._is_tracing
_is_inference_mode_enabled = torch.is_inference_mode_enabled
_on_rocm = torch.version.hip is not None


def check_size_and_eps(name: str, hidden_size: int, eps: float) -> None:
    if not isinstance(hidden_size, Integral) or isinstance(hidden_size, bool) or hidden_size < 1:
        rule = "hidden_size must be an integer of at least 1, the size of the dimension that is normalised"
        raise ValueError(f"{name}: {rule}, got {hidden_size!r}")
    if not isinstance(eps, Real):
        hint = "; torch.nn.RMSNorm takes torch.finfo(dtype).eps for None" if eps is None else ""
        raise ValueError(f"{name}: eps must be a number, got {eps!r}{hint}")


class RMSNorm(nn.Module):
    """``y = round(s * rstd * weight)`` over the last dimension.

    :func:`gemma_norm.rms_norm` states formula, dtypes and strides, :meth:`forward` what is written.

    Args:
        hidden_size: size of the last dimension of the inputs.
        eps: added to the mean of squares. A number: None, which ``torch.nn.RMSNorm`` takes for the dtype's epsilon, is
            refused.
        device, dtype: of the weight, which may be float32 with 16-bit inputs and is read anew in every call.
        provider: what :meth:`forward_hip` uses on AMD GPUs, see :mod:`gemma_norm.routing`: "auto" or, to force one,
            "native", "aiter", "vllm" or "torch". Other devices have one provider.
        inplace: whether :meth:`forward` may overwrite x and residual, under the conditions stated there. False: never.
        elementwise_affine, has_weight: what ``torch.nn.RMSNorm`` and vLLM call having a weight. If either is False,
            ``weight`` is None, and nothing is multiplied.
        round_each_step: ``y = round(round(s * rstd) * weight)``, see :func:`gemma_norm.rms_norm`.

    Raises:
        ValueError: for an argument that breaks a rule above.
    """

    gemma: ClassVar[bool] = False
    weight: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        provider: str = "auto",
        inplace: bool = True,
        elementwise_affine: bool = True,
        has_weight: bool = True,
        round_each_step: bool = False,
    ) -> None:
        super().__init__()
        self._check(hidden_size, eps, round_each_step, elementwise_affine=elementwise_affine, has_weight=has_weight)
        self.provider = routing.checked(provider)
        self.hidden_size = hidden_size
        self.variance_epsilon = eps
        self.inplace = inplace
        self.round_each_step = round_each_step
        has_weight = has_weight and elementwise_affine
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype)) if has_weight else None
        self.reset_parameters()

    def _check(self, hidden_size: int, eps: float, round_each_step: bool, **weight: bool) -> None:
        name = type(self).__name__
        check_size_and_eps(name, hidden_size, eps)
        if self.gemma and round_each_step:
            raise ValueError(f"{name}: round_each_step must be False with a zero-centred weight, got True")
        for argument, value in weight.items():
            if self.gemma and not value:
                hint = "RMSNorm is the norm without scale"
                raise ValueError(f"{name}: {argument} must be True, got {value!r}; {hint}")

    def reset_parameters(self) -> None:
        """The identity's weight: ones, or zeros where it is zero-centred."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 0.0 if self.gemma else 1.0)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, post_residual_addition: Tensor | None = None
    ) -> Output:
        """``y``; with a residual ``(y, s)``, ``s = round(x + residual)`` being the next residual.

        With a residual in inference, the work is done in place as in SGLang and vLLM: **the results are x and residual
        themselves, overwritten**, and so is whatever shares their memory, such as a hidden state that was kept. That
        is done when all of this holds, so that the gradients that PyTorch knows of do not depend on the old values:

        - the module's ``inplace`` is True, as it is by default;
        - grad mode is off, and the module is in eval mode or the call in ``torch.inference_mode()``;
        - x, residual and post_residual_addition require no gradient, and there are no dual tensors about nor a
          ``torch.func`` transform;
        - x and residual are plain tensors, not parameters or views of one, nor of another subclass;
        - x and residual lie apart, no two elements of either share memory, and neither is an inference tensor outside
          of inference mode;
        - nothing traces the call: under ``torch.compile``, ``torch.export`` and ``torch.jit.trace`` the results are
          new tensors.

        Else the results are new tensors, and x and residual stay as they are. It cannot see everything: a buffer, a
        tensor from ``detach()`` or ``.data`` (the parameters given to ``torch.func.functional_call`` often are), the
        output of frozen layers, or an input of a reentrant checkpoint that requires no gradient looks like any other,
        though something may still need it. Pass a clone, or make the module with ``inplace=False``, where such a
        tensor is used again.

        ``post_residual_addition`` is added to the residual first, and needs one.
        """
        # A traced value of torch.fx has no device yet, and no truth value: it goes to the operator, which any device has.
        if getattr(x, "is_cuda", False) is True:
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
            return reference.rms_norm(x, self.weight, self.variance_epsilon, self.gemma, self.round_each_step)
        eps, gemma, each_step = self.variance_epsilon, self.gemma, self.round_each_step
        return reference.add_rms_norm(x, residual, self.weight, eps, gemma, post_residual_addition, each_step)

    def _forward_op(
        self, x: Tensor, residual: Tensor | None = None, post_residual_addition: Tensor | None = None
    ) -> Output:
        weight = self.weight
        if residual is None:
            self._refuse_lone(post_residual_addition)
            return ops.rms_norm(x, weight, self.variance_epsilon, self.gemma, self.round_each_step)
        eps, gemma, each_step = self.variance_epsilon, self.gemma, self.round_each_step
        if self.may_overwrite(x, residual, post_residual_addition):
            try:
                _fused_add_rms_norm(x, residual, weight, eps, gemma, post_residual_addition, each_step)
                return x, residual
            except RuntimeError as error:  # nothing has been written
                if not any(reason in str(error) for reason in UNWRITABLE):
                    raise
        return ops.add_rms_norm(x, residual, weight, eps, gemma, post_residual_addition, each_step)

    def may_overwrite(self, x: Tensor, residual: Tensor, post_residual_addition: Tensor | None) -> bool:
        """Whether the conditions in :meth:`forward` hold, except that of memory, which the operator checks."""
        return (
            not _is_grad_enabled()
            and self.inplace
            and not _is_dynamo_compiling()
            and not _is_tracing()
            and (not self.training or _is_inference_mode_enabled())
            and type(x) is type(residual) is Tensor
            and not (x.requires_grad or residual.requires_grad)
            and (x._base is None or type(x._base) is Tensor)
            and (residual._base is None or type(residual._base) is Tensor)
            and (post_residual_addition is None or not post_residual_addition.requires_grad)
            and forward_ad._current_level < 0
            and not functorch_is_active()
        )

    # One method a device, as in SGLang and vLLM, for subclasses to replace. The operators' own dispatch serves these
    # two, and through forward_cpu meta tensors and devices on plain PyTorch as well.
    forward_cuda = forward_cpu = _forward_op

    def forward_hip(
        self, x: Tensor, residual: Tensor | None = None, post_residual_addition: Tensor | None = None
    ) -> Output:
        """Our HIP kernels, or those of another package where ours are absent, see :mod:`gemma_norm.routing`."""
        # Not while compiling: a graph would be bound to what the set holds now.
        if self.provider in routing.served_by_ours and not _is_compiling():
            return self._forward_op(x, residual, post_residual_addition)
        return routing.forward(self, x, residual, post_residual_addition)

    def _refuse_lone(self, post_residual_addition: Tensor | None) -> None:
        if post_residual_addition is not None:
            raise RuntimeError(f"{type(self).__name__}: post_residual_addition needs a residual, got residual=None")

    def extra_repr(self) -> str:
        modes = ", weight=None" if self.weight is None else ""
        modes += ", round_each_step=True" if self.round_each_step else ""
        return f"{self.hidden_size}, eps={self.variance_epsilon}, gemma={self.gemma}{modes}"

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles in place of this module, which has two signatures: ``y = norm(x)`` alone."""
        return _Scriptable(self)


class _Scriptable(nn.Module):
    """``y = norm(x)`` for TorchScript: the operator in inference, its definition while gradients are recorded."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.variance_epsilon, self.gemma = norm.weight, norm.variance_epsilon, norm.gemma
        self.round_each_step = norm.round_each_step
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return reference.rms_norm(x, self.weight, self.variance_epsilon, self.gemma, self.round_each_step)
        y: Tensor = torch.ops.gemma_norm.rms_norm(
            x, self.weight, self.variance_epsilon, self.gemma, self.round_each_step
        )
        return y


class GemmaRMSNorm(RMSNorm):
    """RMSNorm with a zero-centred weight, ``y = round(s * rstd * (1 + weight))``: Gemma, Qwen3-Next, Qwen3.5.

    ``1 + weight`` is computed inside the kernel in float32 and kept nowhere, so a weight that is loaded or synchronised
    later, or under a captured CUDA graph, counts at once.
    """

    gemma = True
