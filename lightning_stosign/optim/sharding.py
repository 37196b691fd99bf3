"""Sharded parameters (DTensor: FSDP2, tensor parallelism): which of the whole's values a process holds.

An optimizer step is elementwise but for two things, and a :class:`Shard` has both: the noise, which belongs to an
element's row-major index in the *unsharded* parameter, and the largest magnitude that a scale is made of, which is that
of the unsharded parameter too. With them the shards of a parameter are updated as the unsharded parameter would be.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.placement_types import Placement


class Shard:
    """The part of a sharded parameter that this process holds, as runs of values that follow each other in the whole.

    The local tensor's values, in its own row-major order, are ``starts.numel()`` runs of ``run`` values; run ``i``
    begins at row-major index ``starts[i]`` of the unsharded parameter. A parameter sharded along its first dimension,
    as FSDP2 does, has one run; one sharded along a later dimension has one a row. A shard without values has no run.

    Args:
        shape: of the unsharded parameter.
        mesh: the processes.
        placements: how the parameter is spread over each dimension of the mesh.

    Raises:
        ValueError: a placement is a pending sum (``Partial``).
    """

    def __init__(self, shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Placement]) -> None:
        if any(placement.is_partial() for placement in placements):
            raise ValueError(f"params: a DTensor with placements {tuple(placements)}; accepted: Shard and Replicate")
        indices = [_local_indices(shape, dim, mesh, placements) for dim in range(len(shape))]
        run, dim = 1, len(shape)
        while dim > 0:
            dim -= 1
            index, size = indices[dim], shape[dim]
            consecutive = index.numel() > 0 and int(index[-1] - index[0]) == index.numel() - 1
            if consecutive:
                run *= index.numel()
                indices[dim] = index[:1]
            if not consecutive or index.numel() < size:
                break
        starts = torch.zeros(1, dtype=torch.int64, device="cpu")
        stride = 1
        for index, size in zip(reversed(indices), reversed(shape), strict=True):
            starts = (index.unsqueeze(1) * stride + starts).flatten()
            stride *= size
        self.run, self.starts = run, starts

    def index(self, first: int, count: int) -> Tensor:
        """Return the row-major indices in the whole of values ``first`` to ``first + count``: int64 on the CPU."""
        position = torch.arange(first, first + count, device="cpu")
        return self.starts[position // self.run] + position % self.run

    def wrap(self, local: Tensor, param: DTensor) -> DTensor:
        """Return a tensor of this process's values, such as a state, as the DTensor sharded as ``param`` is."""
        return DTensor.from_local(
            local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
        )


def shard_of(param: Tensor) -> Shard | None:
    """Return which part of the parameter this process holds, or None if it is not a DTensor."""
    if not isinstance(param, DTensor):
        return None
    mesh = param.device_mesh
    # With the coordinate: meshes are equal that differ in nothing but which of their processes this one is.
    return _shard(tuple(param.shape), mesh, tuple(param.placements), tuple(mesh.get_coordinate() or ()))


def local(value: Any) -> Any:
    """Return a DTensor's values on this process, sharing memory; anything else as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


def local_grad(param: Tensor) -> Tensor:
    """Return this process's part of a parameter's gradient, spread over the processes as the parameter is.

    Communicates only if the gradient is spread otherwise, for instance where it is a sum still to be made.
    """
    grad = param.grad
    assert grad is not None
    if isinstance(param, DTensor) and isinstance(grad, DTensor) and grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    return local(grad)


def max_over_shards(values: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Replace each tensor by its elementwise largest over the processes that hold a part of its parameter.

    One communication for all parameters that are sharded alike, none for those that are not sharded. Every process of a
    mesh must call this with tensors of the same shapes in the same order.

    Args:
        values: (parameter, float tensor to be changed in place), all tensors of one dtype.
    """
    alike: dict[tuple[DeviceMesh, int], list[Tensor]] = {}
    for param, value in values:
        if isinstance(param, DTensor):
            for mesh_dim, placement in enumerate(param.placements):
                if not placement.is_replicate():
                    alike.setdefault((param.device_mesh, mesh_dim), []).append(value)
    for (mesh, mesh_dim), tensors in alike.items():
        merged = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(merged, dist.ReduceOp.MAX, group=mesh.get_group(mesh_dim))
        for tensor, largest in zip(tensors, merged.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(largest.view(tensor.shape))


@lru_cache(maxsize=4096)
def _shard(
    shape: tuple[int, ...], mesh: DeviceMesh, placements: tuple[Placement, ...], coordinate: tuple[int, ...]
) -> Shard:
    return Shard(shape, mesh, placements)


def _local_indices(shape: Sequence[int], dim: int, mesh: DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    """Return which indices along one dimension of the parameter this process holds: int64 on the CPU."""
    # Indices spread as the values are, along this dimension alone: torch's own rules for uneven and nested shards.
    along = [placement if getattr(placement, "dim", None) == dim else Replicate() for placement in placements]
    index = torch.arange(shape[dim], device="cpu").view([-1 if i == dim else 1 for i in range(len(shape))])
    return distribute_tensor(index, mesh, along, src_data_rank=None).to_local().flatten().cpu()
