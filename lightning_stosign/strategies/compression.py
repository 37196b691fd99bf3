r"""What one worker sends of a bucket of gradients, and what the answers mean: tensors only, no communication.

Each parameter :math:`p` of a bucket has one number that all workers share, its *scale*. With stochastic signs it is the
envelope :math:`G_p = \max_w \max_i |v_{w,i}|`, and worker :math:`w` sends the bit :math:`[v_{w,i} + G_p n_{w,i} > 0]`
with noise of its own; the mean over workers of the signs times :math:`G_p` is an unbiased estimate of the mean
gradient. With plain signs it is the mean over workers of :math:`\mathrm{mean}_i |v_{w,i}|`, the scale that makes the
workers' squared errors sum up smallest, so that error feedback contracts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_stosign.optim.numerics.noise import CHUNK, Stream, fair_coins, noise_key, uniform_noise
from lightning_stosign.strategies.packing import packed_width


@dataclass(frozen=True)
class Slice:
    """A parameter's place in a bucket.

    Args:
        name: the parameter's name.
        index: its position among the model's parameters.
        start: its first value in the bucket's flat buffer.
        at: its first value among the bucket's compressed values, or among its uncompressed ones.
        numel: how many values it has.
    """

    name: str
    index: int
    start: int
    at: int
    numel: int

    def of_bucket(self, flat: Tensor) -> Tensor:
        """Return the parameter's part of the bucket's buffer."""
        return flat[self.start : self.start + self.numel]

    def of(self, values: Tensor) -> Tensor:
        """Return the parameter's part of the compressed (or uncompressed) values."""
        return values[self.at : self.at + self.numel]


@dataclass
class Layout:
    """How a bucket's gradients are divided: what is compressed and what is not, and into one part a worker.

    Args:
        workers: number of workers, each of which collects the votes on one part.
    """

    workers: int
    compressed: list[Slice] = field(default_factory=list)
    exact: list[Slice] = field(default_factory=list)
    numel: int = 0

    def add(self, name: str, index: int, numel: int, *, compress: bool) -> None:
        """Append the bucket's next parameter."""
        if numel == 0:
            return
        slices = self.compressed if compress else self.exact
        at = slices[-1].at + slices[-1].numel if slices else 0
        slices.append(Slice(name, index, self.numel, at, numel))
        self.numel += numel

    @property
    def n_compressed(self) -> int:
        """Number of compressed values."""
        return sum(s.numel for s in self.compressed)

    @property
    def exact_width(self) -> int:
        """Number of uncompressed values in a part, the last one padded."""
        return -(-sum(s.numel for s in self.exact) // self.workers)

    @property
    def width(self) -> int:
        """Bytes that the signs of one part take."""
        return packed_width(self.n_compressed, self.workers)

    @property
    def padded(self) -> int:
        """Number of compressed values with what fills up the last parts."""
        return 8 * self.width * self.workers


@dataclass(frozen=True)
class SignCode:
    """How values become bits.

    Args:
        stochastic: stochastic signs within the envelope, or plain ones.
        seed: of the noise, in [0, 2**64), the same on all workers.
        rank: this worker's rank.
    """

    stochastic: bool
    seed: int
    rank: int

    def local_scales(self, values: Tensor, layout: Layout) -> Tensor:
        """Return this worker's part in each parameter's scale: shape ``[len(layout.compressed)]``.

        The maximum over workers of the envelopes, or the sum of the mean magnitudes, is not finite if one worker's
        values are not: all workers see it in the same step.
        """
        if self.stochastic:
            # Both ends at once is several times faster on the CPU than the largest magnitude.
            ends = [torch.stack(torch.aminmax(s.of(values))) for s in layout.compressed]
            # NaN is not greater than a number for every backend's maximum; infinity is.
            return torch.stack(ends).abs().amax(1).nan_to_num(nan=torch.inf, posinf=torch.inf)
        return torch.stack([torch.linalg.vector_norm(s.of(values), 1) / s.numel for s in layout.compressed])

    def perturb_(self, values: Tensor, layout: Layout, scales: Tensor, step: int) -> None:
        """Turn values v into ``v + G n``, in place, if signs are stochastic; n is this worker's own noise."""
        if not self.stochastic:
            return
        worker_seed = noise_key(self.seed, self.rank, 0, Stream.WORKER)
        for s, scale in zip(layout.compressed, scales, strict=True):
            key = noise_key(worker_seed, step, s.index, Stream.WORKER)
            of_param = s.of(values)
            # On the CPU the noise is added while it is still in the cache; an accelerator wants few kernels.
            chunk = CHUNK if values.device.type == "cpu" else s.numel
            for start in range(0, s.numel, chunk):
                part = of_param[start : start + chunk]
                noise = uniform_noise(key, part.numel(), start=start, device=values.device)
                part.addcmul_(noise.to(values.dtype), scale)

    def zero_is_positive(self, step: int) -> bool:
        """Return the sign of an exact zero: plain signs alternate over steps and workers, so that zeros cancel."""
        return not self.stochastic and (step + self.rank) % 2 == 0

    def tie_breaker(self, layout: Layout, step: int, out: Tensor) -> Tensor:
        """Return one more voter for this worker's part: fair coins that are a function of (seed, step, parameter, i).

        Beside an even number of votes an odd one decides ties and nothing else.

        Args:
            layout: the bucket's.
            step: the number of the step.
            out: int8, shape ``[8 * width]``, to write the coins to: a vote for the positive sign is 0 or more.
        """
        keys = [noise_key(self.seed, step, s.index, Stream.TIE) for s in layout.compressed]
        return cast_coins(layout, self.rank, keys, out)


def cast_coins(
    layout: Layout, rank: int, keys: Sequence[int], out: Tensor, negated: Sequence[bool] | None = None
) -> Tensor:
    """Write one vote for each coordinate of a worker's part, fair coins that are a function of key and element.

    Args:
        layout: the bucket's.
        rank: of the worker whose part it is.
        keys: one noise key per compressed parameter.
        out: int8, shape ``[8 * width]``: a vote for the positive sign is 0 or more.
        negated: for each compressed parameter, whether its coins are turned over.

    Returns:
        ``out``.
    """
    out.zero_()
    low, high = rank * 8 * layout.width, (rank + 1) * 8 * layout.width
    for i, s in enumerate(layout.compressed):
        first, last = max(low - s.at, 0), min(high - s.at, s.numel)
        if first < last:
            part = out[s.at + first - low : s.at + last - low]
            part.copy_(fair_coins(keys[i], last - first, start=first, device=out.device))
            if negated is not None and negated[i]:
                part.bitwise_not_()
    return out


def collect_(values: Tensor, flat: Tensor, slices: list[Slice]) -> None:
    """Copy the slices' gradients out of the bucket's buffer; what is beyond them becomes zero."""
    done = 0
    for s in slices:
        s.of(values).copy_(s.of_bucket(flat))
        done += s.numel
    values[done:].zero_()


def add_residuals_(values: Tensor, layout: Layout, residuals: dict[str, Tensor]) -> None:
    """Add what was lost before to the values, in place; a parameter's first residual is zero."""
    for s in layout.compressed:
        of_param = s.of(values)
        if s.name not in residuals:
            residuals[s.name] = torch.zeros_like(of_param)
        of_param.add_(residuals[s.name])


def keep_residuals_(
    values: Tensor, layout: Layout, scales: Tensor, residuals: dict[str, Tensor], *, zero_is_positive: bool
) -> None:
    """Set each residual to what plain signs lose of the values: ``v - scale * sign(v)``.

    Where the scale is not finite, because some worker's gradient is not, the residual stays.
    """
    for s, scale in zip(layout.compressed, scales, strict=True):
        v = s.of(values)
        lost = v - torch.where(v >= 0 if zero_is_positive else v > 0, scale, -scale)
        residuals[s.name].copy_(torch.where(scale.isfinite(), lost, residuals[s.name]))


def decode_(flat: Tensor, counts: Tensor, layout: Layout, scales: Tensor, voters: int) -> None:
    """Write ``scale * (mean sign)`` into the bucket's buffer.

    Args:
        flat: the bucket's buffer.
        counts: how many of the voters are positive, for each compressed value; used up.
        layout: the bucket's.
        scales: the shared scales.
        voters: the number of voters that were counted; 1 after a majority vote.
    """
    counts.sub_(voters / 2)
    for s, scale in zip(layout.compressed, scales * (2 / voters), strict=True):
        torch.mul(s.of(counts), scale, out=s.of_bucket(flat))
