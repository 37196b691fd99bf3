"""What a storage format does to a run of a state's values, of which a rank may have only a part."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_stosign.health.sharding import Layout
from lightning_stosign.health.statistics import PART_SIZE
from lightning_stosign.optim.emulation import as_stored
from lightning_stosign.optim.numerics.rounding import power_of_two_scale
from lightning_stosign.optim.states.state_precision import StatePrecision

# (a run of this rank's values, its place among them) -> the run as stored, in float32
Store = Callable[[Tensor, slice], Tensor]

_EXPONENT_BITS = 0x7F800000  # of float32


class Rounding:
    """Rounds any run of a state's values as the format would round them within the whole state.

    A scale depends on the largest magnitude of the whole state, or of a block, of which this rank may have a part.

    Args:
        layout: where this rank's values lie.
        precision: the format.
        degree: of the state (:func:`lightning_stosign.optim.emulation.state_degree`).

    Attributes:
        block: how many values have a scale of their own; 1 if they have none.
        has_tensor_scale: whether there is a scale that depends on the whole state.
        rounds_rows: whether :meth:`store` also rounds the rows of a matrix, each as a state, given their largest
            magnitudes as ``[1, rows, 1]``.
    """

    def __init__(self, layout: Layout, precision: StatePrecision, degree: int) -> None:
        self._layout, self._precision, self._degree = layout, precision, degree
        self._applies = layout.numel >= precision.min_numel
        self.block = precision.block_size if precision.scaling == "block" else 1
        self.has_tensor_scale = self._applies and precision.has_tensor_scale
        self.rounds_rows = not self._applies or (precision.is_fp8 and self.block == 1)
        self._cuts = [cut for cut in layout.cuts if cut % self.block] if self._applies else []

    def cut_blocks(self, size: int) -> list[slice]:
        """Return what this rank has, of its ``size`` values, of each block that lies on several ranks."""
        begins = [cut // self.block * self.block - self._layout.start for cut in self._cuts]
        return [slice(min(max(begin, 0), size), min(max(begin + self.block, 0), size)) for begin in begins]

    def store(self, maxima: Tensor) -> Store:
        """Return what rounds runs that begin and end where blocks or this rank's values do.

        Args:
            maxima: the largest magnitudes, float32: of the state if there is a tensor scale, then of the cut blocks.
        """
        if not self._applies:
            return lambda values, part: values
        if self._precision.is_fp8 and self.block == 1:
            return self._store_fp8(maxima)
        return lambda values, part: self._store_beside_others(values, part, maxima)

    def _store_fp8(self, maxima: Tensor) -> Store:
        """Return what rounds without casting, which takes several times longer on the CPU."""
        info = torch.finfo(self._precision.dtype)
        scale: Tensor | float = 1 / self._precision.static_scale**self._degree
        if self.has_tensor_scale:
            scale = power_of_two_scale(maxima[0], info.max)
        elif scale == 1:
            return lambda values, part: _round_(values.float().clamp(-info.max, info.max), info)
        return lambda values, part: _round_((values.float() / scale).clamp_(-info.max, info.max), info).mul_(scale)

    def _store_beside_others(self, values: Tensor, part: slice, maxima: Tensor) -> Tensor:
        """Round beside values that stand for what the run lacks: the state's largest, the rest of cut blocks."""
        largest, of_cut_blocks = (maxima[0], maxima[1:]) if self.has_tensor_scale else (None, maxima)
        begin = self._layout.start + part.start
        end = begin + values.numel()
        before = [] if largest is None else [_standing_for(largest, self.block)]
        if begin % self.block:
            before.append(_standing_for(of_cut_blocks[self._cuts.index(begin)], begin % self.block))
        after = []
        if end % self.block and end != self._layout.numel:
            after.append(_standing_for(of_cut_blocks[self._cuts.index(end)], -end % self.block))
        if not before and not after:
            return as_stored(values, self._precision, self._degree)
        skipped = sum(filler.numel() for filler in before)
        together = as_stored(torch.cat([*before, values.float(), *after]), self._precision, self._degree)
        return together[skipped : skipped + values.numel()]


def runs_between_blocks(value: Tensor, layout: Layout, block: int) -> Iterator[slice]:
    """Cut this rank's values into runs, on the CPU small ones, that end where blocks end, or at the end.

    Args:
        value: the values on this rank, flat.
        layout: where they lie.
        block: how many values belong together.
    """
    size, start = value.numel(), layout.start
    wanted = PART_SIZE if value.device.type == "cpu" else size
    length = max(wanted // block, 1) * block
    begin = 0
    while begin < size:
        end = min(begin + length - (start + begin) % block, size)
        yield slice(begin, end)
        begin = end


def _standing_for(largest: Tensor, size: int) -> Tensor:
    return pad(largest.reshape(1), (0, size - 1))


def _round_(value: Tensor, info: torch.finfo) -> Tensor:
    """Round float32 values in place to the nearest of an FP8 dtype, ties to even; none may be beyond its largest."""
    binade = value.view(torch.int32).bitwise_and(_EXPONENT_BITS).view(torch.float32).clamp_(min=info.smallest_normal)
    # Beside 1.5 * 2**23 times the spacing of the dtype's numbers float32 has no smaller ones.
    multiple = 1.5 * 2.0**23 * info.eps
    return value.add_(binade, alpha=multiple).sub_(binade, alpha=multiple)
