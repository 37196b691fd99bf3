"""The collectives of the sign exchange, each counting what it sends."""

import torch
import torch.distributed as dist
from torch import Tensor


class Wire:
    """A process group and a count of the bytes this worker sends through it.

    The count is of payload, for the algorithms that gloo and NCCL use where bandwidth matters: a ring for all_reduce
    and all_gather, pairs for all_to_all.

    Args:
        group: the process group; None: the default one.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.workers = dist.get_rank(group), dist.get_world_size(group)
        self.bytes_sent = 0

    def all_reduce_(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        """Reduce a tensor over the workers, in place."""
        dist.all_reduce(tensor, op=op, group=self.group)
        self.bytes_sent += 2 * tensor.nbytes * (self.workers - 1) // self.workers

    def all_to_all(self, rows: Tensor, out: Tensor) -> None:
        """Send row w to worker w; row w of ``out`` is what worker w sent here."""
        dist.all_to_all_single(out, rows, group=self.group)
        self.bytes_sent += rows.nbytes * (self.workers - 1) // self.workers

    def all_gather(self, mine: Tensor) -> Tensor:
        """Return every worker's tensor, of the same shape on each: shape ``[workers, *mine.shape]``."""
        out = torch.empty((self.workers, *mine.shape), dtype=mine.dtype, device=mine.device)
        dist.all_gather_into_tensor(out.view(-1), mine.view(-1), group=self.group)
        self.bytes_sent += mine.nbytes * (self.workers - 1)
        return out

    def close(self) -> None:
        """Close the group, if it is not the default one."""
        if self.group is not None:
            dist.destroy_process_group(self.group)
            self.group = None

    def gather(self, mine: Tensor) -> list[Tensor]:
        """Return every worker's tensor on worker 0, an empty list on the others; not counted.

        Through the default group, so that it works after the wire's own is closed.
        """
        out = [torch.empty_like(mine) for _ in range(self.workers)] if self.rank == 0 else None
        dist.gather(mine, out)
        return out or []
