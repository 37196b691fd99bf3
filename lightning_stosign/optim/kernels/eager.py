"""The reference: the formulas on plain tensors, in the paper's order and notation, on any device.

States are decoded before the formulas and encoded after them (:mod:`lightning_stosign.optim.states.codec`). Large
tensors go through in pieces that stay in the cache.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_stosign._torch_private import foreach_norm
from lightning_stosign.optim.kernels.job import Job, Kind, Numbers
from lightning_stosign.optim.numerics.noise import (
    Stream,
    fraction_of_runs,
    noise_of_runs,
    uniform_fraction,
    uniform_noise,
)
from lightning_stosign.optim.numerics.rounding import LARGEST_GRADIENT, round_stochastically, round_to_nearest
from lightning_stosign.optim.states.codec import Codec, Fp4Codec
from lightning_stosign.optim.states.state_precision import FP8_DTYPES

WORTH = 0

_OVERFLOWING_LR = 2.0**100  # with less, not even float32's largest number moves: its spacing is 2**104

# Values in a piece: on the CPU 1 MiB of float32.
_PIECE, _ACCELERATOR_PIECE = 1 << 18, 1 << 26


# The formulas. Arguments that end up in the result's memory come first.


def momentum(m: Tensor, g: Tensor, weight: float, largest: float = LARGEST_GRADIENT) -> Tensor:
    """m_t = beta1 m_{t-1} + (1 - beta1) g_t, with the weight 1 - beta1, and g_t at most so large that all is finite."""
    return m.add_(g.clamp(-largest, largest).sub_(m).mul_(weight))


def decayed(G: Tensor, beta2: float) -> Tensor:
    """beta2 G_{t-1}: all of it in Algorithm 3, less in Algorithm 11."""
    return G.mul_(beta2) if beta2 != 1 else G


def envelope(G: Tensor, m: Tensor, beta2: float) -> Tensor:
    """G_t = max(beta2 G_{t-1}, |m_t|)."""
    return decayed(G, beta2).clamp_min_(m.abs())


def stochastic_sign(n: Tensor, m: Tensor, G: Tensor) -> Tensor:
    """sign(m_t + G_t n_t) for n_t ~ Unif(-1, 1), of Algorithm 3."""
    return n.mul_(G).add_(m).sign_()


def mean_sign(m: Tensor, G: Tensor) -> Tensor:
    """m_t / G_t, the mean of that, of Algorithm 10; 0 where G_t = 0."""
    return torch.where(G == 0, 0.0, m / G)


def descend(x: Tensor, direction: Tensor, lr: Any, decay: Any) -> Tensor:
    """x_{t+1} = x_t - lr direction - lr lambda x_t, with the decay 1 - lr lambda."""
    if isinstance(decay, Tensor) or decay != 1:
        x.mul_(decay)
    x.sub_(direction.mul_(lr))
    if not isinstance(lr, Tensor) and lr < _OVERFLOWING_LR and -1 <= decay <= 1:
        return x
    largest = torch.finfo(x.dtype).max
    return x.clamp_(-largest, largest)


def step(
    x: Tensor,
    g: Tensor,
    m: Codec | None,
    G: Codec | None,
    kind: Kind,
    numbers: Numbers,
    draw: Callable[[Stream], Tensor],
) -> Tensor:
    """One step of StoSignSGD or SignSGD on some values of a parameter, in float32 or float64.

    Args:
        x: the parameter's values, changed in place.
        g: the gradient's values.
        m: the momentum; None if there is none.
        G: the envelope; None if there is none.
        kind: which step.
        numbers: its numbers.
        draw: returns the noise of a stream, a new tensor: in (-1, 1) for the update, in [0, 1) for rounding.

    Returns:
        ``x``.
    """
    lr, decay, weight, beta2 = numbers
    m_t = -g if kind.maximize else g
    if m is not None:
        fraction = draw(Stream.ROUND_STATE) if Stream.ROUND_STATE in kind.streams else None
        m_t = m.encode(momentum(m.decode(), m_t, weight, m.largest_gradient), fraction)
    if G is None:
        return descend(x, m_t.sign(), lr, decay)
    # Of m_t as it was stored, so that G_t covers it.
    if Stream.ROUND_ENVELOPE in kind.streams:
        G_t = G.encode_decayed(decayed(G.decode(), beta2), m_t.abs(), draw(Stream.ROUND_ENVELOPE))
    else:
        G_t = G.encode_up(envelope(G.decode(), m_t, beta2))
    if kind.stochastic:
        return descend(x, stochastic_sign(draw(Stream.UPDATE).to(m_t.dtype), m_t, G_t), lr, decay)
    return descend(x, mean_sign(m_t, G_t), lr, decay)


# The backend: jobs in, pieces through the formulas.


def refusal(job: Job) -> None:
    """Return None: the reference takes every job."""


def largest(jobs: Sequence[Job]) -> Tensor:
    """Look at jobs of one kind: :meth:`Backend.largest`."""
    if jobs[0].kind.has_tensor_scale:
        return torch.stack([_largest(job) for job in jobs])
    grads = [job.grad for job in jobs]
    if grads[0].device.type != "cpu":
        grads = [grad if grad.numel() > 0 else grad.new_zeros(1) for grad in grads]  # an empty shard has no norm
        return torch.stack(foreach_norm(grads, torch.inf)).to(torch.float32).unsqueeze(1)
    # Not finite if one value is not, but not only then; several times faster there than a largest magnitude.
    sums = [grad.sum(dtype=torch.promote_types(torch.float32, grad.dtype)) for grad in grads]
    return torch.stack(sums).to(torch.float32).unsqueeze(1)


def update(jobs: Sequence[Job], scales: Tensor | None, found_inf: Tensor | None) -> None:
    """Update jobs of one kind: :meth:`Backend.update`."""
    for i, job in enumerate(jobs):
        flat = _flat(job)
        for first, count, row in _pieces(job):
            piece = _piece(job, flat, first, count, row)
            if found_inf is None:
                _update(job, piece, first, row, None if scales is None else scales[i])
                continue
            changed = [None if part is None else part.clone() for part in piece]
            _update(job, changed, first, row, None if scales is None else scales[i])
            for part, new in zip(piece, changed, strict=True):
                if part is not None and new is not None:
                    part, new = (t.view(torch.uint8) if t.dtype in FP8_DTYPES else t for t in (part, new))
                    part.copy_(torch.where(found_inf == 0, new, part))
        for tensor, values in zip((job.param, job.grad, *job.stored), flat, strict=True):
            if not tensor.is_contiguous() and tensor is not job.grad:
                tensor.copy_(values.view(tensor.shape))


def _largest(job: Job) -> Tensor:
    """Return the largest |m_t| and beta2 G_{t-1} of this process's values: float32, one value per state."""
    kind, flat = job.kind, _flat(job)
    found = [torch.zeros(len(job.stored), dtype=torch.float32, device=job.param.device)]  # a shard without values
    for first, count, row in _pieces(job):
        x, g, *states = _piece(job, flat, first, count, row)
        assert x is not None and g is not None
        g = g.to(torch.promote_types(x.dtype, torch.float32))
        m, G = _codecs(job, states, x, row, None)
        values = []
        if m is not None:
            next_m = momentum(m.decode(), -g if kind.maximize else g, job.numbers.weight, m.largest_gradient)
            values.append(torch.where(g.isfinite(), next_m, g).abs().amax())
        if G is not None:
            values.append(decayed(G.decode(), job.numbers.beta2).amax())
        found.append(torch.stack(values).to(torch.float32))
    return torch.stack(found).amax(dim=0)


def _update(job: Job, piece: Sequence[Any], first: int, row: int, new_scales: Tensor | None) -> None:
    """Take a step on the values of a piece, the first of which is at a position in this process's part."""
    x, g, *states = piece
    kind, compute_dtype = job.kind, torch.promote_types(x.dtype, torch.float32)
    m, G = _codecs(job, states, x, row, new_scales)
    draw = partial(draw_noise, job, first, x)
    put(x, step(x.to(compute_dtype), g.to(compute_dtype), m, G, kind, job.numbers, draw), kind, draw)


def put(x: Tensor, value: Tensor, kind: Kind, draw: Callable[[Stream], Tensor]) -> None:
    """Store a parameter's new values, as computed, in ``x``; ``draw`` as in :func:`step`."""
    if value is x:
        return
    if kind.round_param:
        # A step of lr is often below half the spacing of the parameter's numbers, and would be lost each time.
        value = round_stochastically(value, x.dtype, draw(Stream.ROUND_PARAM))
    x.copy_(round_to_nearest(value, x.dtype))


def draw_noise(job: Job, first: int, like: Tensor, stream: Stream) -> Tensor:
    """Return a stream's noise for the values of a parameter from a position in this process's part on."""
    key, numel, device = job.keys[stream], like.numel(), like.device
    if job.start is not None:
        uniform = uniform_noise if stream is Stream.UPDATE else uniform_fraction
        return uniform(key, numel, start=job.start + first, device=device).view(like.shape)
    shard = job.shard
    assert shard is not None
    starts = shard.starts[first // shard.run : (first + numel) // shard.run]
    of_runs = noise_of_runs if stream is Stream.UPDATE else fraction_of_runs
    return of_runs(key, starts, shard.run, device=device).view(like.shape)


def _flat(job: Job) -> list[Tensor]:
    """Return parameter, gradient and states in one dimension: views of them where they are contiguous."""
    return [tensor.reshape(-1) for tensor in (job.param, job.grad, *job.stored)]


def _pieces(job: Job) -> Iterator[tuple[int, int, int]]:
    """Yield the position of a piece's first value, its number of values, and how many of them are in a row."""
    total = job.param.numel()
    piece = _PIECE if job.param.device.type == "cpu" else _ACCELERATOR_PIECE
    if job.kind.precision.scaling == "block":
        row = job.kind.precision.block_size
        whole, piece = total // row * row, max(piece // row, 1) * row
        for first in range(0, whole, piece):
            yield first, min(piece, whole - first), row
        if whole < total:
            yield whole, total - whole, total - whole
        return
    if job.start is None and job.shard is not None:  # whole runs
        piece = max(piece // job.shard.run, 1) * job.shard.run
    for first in range(0, total, piece):
        count = min(piece, total - first)
        yield first, count, count


def _piece(job: Job, flat: Sequence[Tensor], first: int, count: int, row: int) -> list[Tensor | None]:
    """Return views of a piece of parameter, gradient and states, and its part of the states' scales."""
    precision = job.kind.precision
    if precision.scaling != "block":
        if count == len(flat[0]):
            return [*flat, *job.scales]
        return [*(tensor[first : first + count] for tensor in flat), *job.scales]
    size = precision.block_size
    blocks = slice(first // size, -(-(first + count) // size))
    in_rows = flat[:2] if precision.is_fp4 else flat
    packed = [tensor.view(-1, size // 2)[blocks] for tensor in flat[len(in_rows) :]]
    scales = [None if scale is None else scale[blocks] for scale in job.scales]
    return [*(tensor[first : first + count].view(-1, row) for tensor in in_rows), *packed, *scales]


def _codecs(
    job: Job, states: Sequence[Any], x: Tensor, row: int, new_scales: Tensor | None
) -> tuple[Codec | None, Codec | None]:
    """Return the momentum and the envelope of a piece, from its stored values and then its scales."""
    kind, compute_dtype = job.kind, torch.promote_types(x.dtype, torch.float32)
    count = len(job.stored)
    codecs: list[Codec] = []
    for i in range(count):
        new = None if new_scales is None else new_scales[i]
        if kind.precision.is_fp4:
            old = job.tensor_scales[i]
            codecs.append(Fp4Codec(states[i], kind.precision, states[count + i], old, new, compute_dtype, row))
        else:
            codecs.append(Codec(states[i], kind.precision, states[count + i], new, compute_dtype))
    m = codecs.pop(0) if kind.momentum else None
    G = codecs.pop(0) if kind.envelope else None
    return m, G
