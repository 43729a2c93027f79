"""A norm in a tensor-parallel model: a style for ``torch.distributed.tensor.parallel.parallelize_module``.

Importing this module imports torch.distributed.tensor, so ``import gemma_norm`` does not import it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from ._module_checks import check_flags, is_integer

__all__ = ["NormSequenceParallel"]


class NormSequenceParallel(ParallelStyle):
    """Sequence parallelism for norms that are called with several tensors, such as ``y, s = norm(x, residual)``.

    ``torch.distributed.tensor.parallel.SequenceParallel`` passes on the first input alone: a residual or a gate that
    is given by position is dropped without an error. This style takes all of them. Each rank normalises its part of
    the sequence, without communication::

        y[rank], s[rank] = norm(x[rank], residual[rank])
        weight.grad      = sum over ranks of the gradients of their parts

    Of the module's inputs, positional and by keyword, each tensor becomes a DTensor that is sharded on the sequence
    dimension; the results are sharded alike. The parameters are replicated, with the values of the first rank, and
    keep ``requires_grad``. Their gradients are summed over the ranks in the backward pass and replicated. Any module
    serves that normalises the last dimension: :class:`gemma_norm.RMSNorm`, :class:`gemma_norm.GemmaRMSNorm`,
    :class:`gemma_norm.GatedRMSNorm`.

    Args:
        sequence_dim: the dimension of the inputs, ``[..., hidden]``, that is sharded: any but the last, which is
            normalised. All tensors that the module is given have that dimension.
        use_local_output: return this rank's part as a plain tensor; otherwise a DTensor.

    An input that is a DTensor is redistributed if its placement differs. One that is a plain tensor is taken as this
    rank's part, and then all ranks must have parts of the same shape, as for ``SequenceParallel``. Inputs that are no
    tensors, such as None, are passed on as they are.

    The style is for one dimension of a mesh, as PyTorch's own are::

        plan = {"attention_norm": NormSequenceParallel(), "attention.wq": ColwiseParallel(), ...}
        parallelize_module(block, mesh["tp"], plan)

    Raises:
        ValueError: for an argument of a wrong type; when it is applied to a mesh of several dimensions; when the module
            is called with a tensor of which ``sequence_dim`` is no dimension or the last.
    """

    def __init__(self, *, sequence_dim: int = 1, use_local_output: bool = False) -> None:
        super().__init__()
        check_flags(type(self).__name__, use_local_output=use_local_output)
        if not is_integer(sequence_dim):
            raise ValueError(f"{type(self).__name__}: sequence_dim must be an integer, got {sequence_dim!r}")
        self.sequence_dim = sequence_dim
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if device_mesh.ndim != 1:
            shape = tuple(device_mesh.shape)
            raise ValueError(f"NormSequenceParallel: device_mesh must have one dimension, got a mesh of shape {shape}")
        distribute_module(module, device_mesh, self._replicate)

        def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            taken = {name: self._shard(value, device_mesh) for name, value in kwargs.items()}
            return tuple(self._shard(value, device_mesh) for value in args), taken

        def give(_: nn.Module, args: tuple[Any, ...], results: Any) -> Any:
            if isinstance(results, tuple):
                return tuple(self._give(result, device_mesh) for result in results)
            return self._give(results, device_mesh)

        module.register_forward_pre_hook(take, with_kwargs=True)
        module.register_forward_hook(give)
        return module

    def _replicate(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        for key, parameter in module.named_parameters(recurse=False):
            if not isinstance(parameter, DTensor):
                made = distribute_tensor(parameter.data, device_mesh, [Replicate()], src_data_rank=self.src_data_rank)
                parameter = nn.Parameter(made, requires_grad=parameter.requires_grad)
                if parameter.requires_grad:
                    # A partial gradient would be summed again by each operation of the optimizer that reads it. In
                    # PyTorch 2.10, clip_grad_norm_ and SGD with momentum give wrong results for one, without an error.
                    parameter.register_hook(_summed)  # type: ignore[no-untyped-call]
                module.register_parameter(key, parameter)

    def _shard(self, value: Any, device_mesh: DeviceMesh) -> Any:
        if not isinstance(value, Tensor):
            return value
        dim = self.sequence_dim + (value.dim() if self.sequence_dim < 0 else 0)
        if not 0 <= dim < value.dim() - 1:
            rule = "sequence_dim must be a dimension of the inputs before the last, which is normalised"
            got = f"got {self.sequence_dim} and a tensor of shape {list(value.shape)}"
            raise ValueError(f"NormSequenceParallel: {rule}, {got}")
        placements = (Shard(dim),)
        if not isinstance(value, DTensor):
            return DTensor.from_local(value, device_mesh, placements, run_check=False)
        return value if value.placements == placements else value.redistribute(placements=placements, async_op=True)

    def _give(self, result: Any, device_mesh: DeviceMesh) -> Any:
        # PyTorch gathers what has fewer rows than there are ranks, so a result may be replicated.
        result = self._shard(result, device_mesh)
        return result.to_local() if self.use_local_output and isinstance(result, DTensor) else result

    def __repr__(self) -> str:
        name = type(self).__name__
        return f"{name}(sequence_dim={self.sequence_dim}, use_local_output={self.use_local_output})"


def _summed(gradient: Tensor) -> Tensor:
    return gradient.redistribute(placements=[Replicate()]) if isinstance(gradient, DTensor) else gradient
