"""Norms and inner products over all parameters of a model, sharded or not."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


class Part(NamedTuple):
    """What one parameter's values on this process add to the totals: terms of the sums and of the maximum; scalars."""

    param: Tensor
    sums: Sequence[Tensor]
    largest: Tensor


def totals(parts: Iterable[Part], device: torch.device) -> Tensor:
    """Return the sums, and last the maximum, over all parameters and all processes that hold parts of them.

    One communication for all parameters that are sharded alike, none for those that are not sharded. Nothing is
    transferred to the host. The processes' parts are added in the order of their ranks: each gets the same bits.

    Args:
        parts: of each parameter, with the same number of sums. Every process of a mesh must bring the same parameters.
        device: where the result is wanted.

    Returns:
        Float64 (float32 on MPS) of shape (sums + 1,).
    """
    dtype = torch.float32 if device.type == "mps" else torch.float64
    rows: dict[Sharding, list[Tensor]] = {}
    for part in parts:
        row = torch.stack([value.to(device=device, dtype=dtype) for value in (*part.sums, part.largest)])
        rows.setdefault(_sharding(part.param), []).append(row)
    everywhere = []
    for (mesh, mesh_dims), alike in rows.items():
        row = _add_up(torch.stack(alike))
        for mesh_dim in mesh_dims:
            assert mesh is not None
            gathered = [torch.empty_like(row) for _ in range(mesh.size(mesh_dim))]
            dist.all_gather(gathered, row, group=mesh.get_group(mesh_dim))
            row = _add_up(torch.stack(gathered))
        everywhere.append(row)
    return _add_up(torch.stack(everywhere))


def mean_over_processes(value: Tensor) -> Tensor:
    """Return the mean over all processes of a distributed run; the value itself outside of one."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return value
    gathered = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, value)
    return torch.stack(gathered).mean()


Sharding = tuple[DeviceMesh | None, tuple[int, ...]]


def _sharding(param: Tensor) -> Sharding:
    """Return the mesh of a parameter and the dimensions of it that hold different parts of the parameter."""
    if not isinstance(param, DTensor):
        return None, ()
    dims = tuple(dim for dim, placement in enumerate(param.placements) if not placement.is_replicate())
    return (param.device_mesh, dims) if dims else (None, ())


def _add_up(rows: Tensor) -> Tensor:
    return torch.cat([rows[:, :-1].sum(0), rows[:, -1:].amax(0)])
