"""Where the values on this rank lie in the tensor they are a part of."""

from dataclasses import dataclass

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate, Shard


@dataclass(frozen=True)
class Layout:
    """The place of a run of values in an unsharded tensor, by row-major index.

    Args:
        numel: size of the unsharded tensor.
        start: index of the first value on this rank.
        cuts: the indices at which one rank's values end and the next one's begin.
        group: the ranks that hold the tensor together; None where this rank has it all.
    """

    numel: int
    start: int = 0
    cuts: tuple[int, ...] = ()
    group: ProcessGroup | None = None


def localize(value: Tensor) -> tuple[Tensor, Layout]:
    """Return the values that this rank holds, and where they lie.

    A DTensor that is sharded along its first dimension over one dimension of its mesh, as FSDP2 shards, is taken as it
    lies; one that is sharded otherwise is gathered, which every rank has to take part in.

    Args:
        value: a tensor or DTensor.

    Returns:
        A plain tensor and its layout.
    """
    if not isinstance(value, DTensor):
        return value, Layout(value.numel())
    sharded = [i for i, placement in enumerate(value.placements) if not isinstance(placement, Replicate)]
    if not sharded:
        return value.to_local(), Layout(value.numel())
    mesh_dim = sharded[0]
    # Of this very class: strided shards, a subclass in some versions of torch, are not runs of values.
    if len(sharded) > 1 or type(value.placements[mesh_dim]) is not Shard or not value.placements[mesh_dim].is_shard(0):
        return value.full_tensor(), Layout(value.numel())
    mesh = value.device_mesh
    ranks, rows = mesh.size(mesh_dim), value.shape[0]
    chunk = -(-rows // ranks)
    row_size = value.numel() // max(rows, 1)
    starts = [min(rank * chunk, rows) * row_size for rank in range(ranks)]
    start = starts[mesh.get_local_rank(mesh_dim)]
    return value.to_local(), Layout(value.numel(), start, tuple(starts[1:]), mesh.get_group(mesh_dim))
