"""The noise: uniform numbers that are a pure function of (seed, step, parameter index, element index).

Nothing here reads or writes a generator's state. Two replicas that count the same steps draw the same noise, a resumed
run draws what the uninterrupted one would have drawn, and a shard draws the part of its parameter's noise that is its
own. The function is a counter hash: two rounds of the 32-bit mixer *lowbias32* (C. Wellons, "Prospecting for Hash
Functions", 2018) over the element index, each round keyed with half of a 64-bit key that *splitmix64* (Steele et al.,
"Fast Splittable Pseudorandom Number Generators", 2014) makes of (seed, step, parameter index, stream).
"""

from collections.abc import Iterator
from enum import IntEnum
from functools import lru_cache

import torch
from torch import Tensor

# Elements hashed at a time: 1 MiB of int32, so that the two dozen passes of the mixer stay in the cache.
CHUNK = 1 << 18

_LOWBIAS32 = ((16, 0x7FEB352D), (15, 0x846CA68B), (16, None))  # shift, multiplier of each round

_MASK32 = (1 << 32) - 1
_MASK64 = (1 << 64) - 1


class Stream(IntEnum):
    """What a draw is for: different streams of one (seed, step, parameter) are independent."""

    UPDATE = 0  # the n_t of sign(m_t + G_t * n_t)
    ROUND_STATE = 1  # stochastic rounding of the stored momentum
    ROUND_PARAM = 2  # stochastic rounding of a bfloat16 or float16 parameter
    WORKER = 3  # the sign that a worker sends; the seed is made of the rank too
    TIE = 4  # the casting vote on a coordinate, the same for all workers


def noise_key(seed: int, step: int, index: int, stream: Stream = Stream.UPDATE) -> int:
    """Return the 64-bit key of one parameter's noise at one step.

    Args:
        seed: the optimizer's seed, 0 <= seed < 2**64.
        step: the number of the step, from 1.
        index: the parameter's position among all parameters of the optimizer, in group order.
        stream: what the noise is for.

    Example:
        >>> noise_key(0, 1, 0) == noise_key(0, 1, 0), noise_key(0, 1, 0) == noise_key(0, 2, 0)
        (True, False)
    """
    key = 0
    for word in (seed, step, index, int(stream)):
        key = _splitmix64(key ^ (word & _MASK64))
    return key


def uniform_noise(key: int, numel: int, *, start: int = 0, device: torch.device | str | None = None) -> Tensor:
    """Return elements ``start`` to ``start + numel`` of the noise ``n ~ Unif(-1, 1)`` that belongs to ``key``.

    Each value is an odd multiple of 2**-24: exact in float32, symmetric about 0, never 0 and never -1 or 1. Hence
    ``sign(m + G * n)`` is ``sign(m)`` where ``|m| = G`` and a fair coin where ``m = 0 < G``.

    Args:
        key: from :func:`noise_key`.
        numel: how many values.
        start: the first value's element index: the logical row-major index in the unsharded parameter.
        device: where to put them; the values do not depend on it.

    Returns:
        float32 tensor of shape ``[numel]``.

    Example:
        >>> whole = uniform_noise(7, 6)
        >>> bool((whole[2:] == uniform_noise(7, 4, start=2)).all())
        True
    """
    noise = torch.empty(numel, dtype=torch.float32, device=device)
    for at, bits in _hashed_chunks(key, numel, start, noise.device):
        # As noise_from_bits, in place.
        bits.bitwise_and_(-256).bitwise_or_(128)
        torch.mul(bits, 2.0**-31, out=noise[at : at + bits.numel()])
    return noise


def uniform_fraction(key: int, numel: int, *, start: int = 0, device: torch.device | str | None = None) -> Tensor:
    """Return elements ``start`` to ``start + numel`` of ``r ~ Unif[0, 1)`` that belong to ``key``, for rounding.

    Each value is a multiple of 2**-24, exact in float32. Arguments as in :func:`uniform_noise`.

    Returns:
        float32 tensor of shape ``[numel]``.
    """
    fraction = torch.empty(numel, dtype=torch.float32, device=device)
    for at, bits in _hashed_chunks(key, numel, start, fraction.device):
        bits.bitwise_and_((1 << 24) - 1)
        torch.mul(bits, 2.0**-24, out=fraction[at : at + bits.numel()])
    return fraction


def hash_bits(index: Tensor, key_low: Tensor, key_high: Tensor) -> Tensor:
    """Return the int32 hashes of element indices: the same function out of place, for a compiler to fuse.

    Args:
        index: int32, the element index modulo 2**32.
        key_low: int32, broadcast against it: the lower half of the :func:`segment_key`.
        key_high: int32: the upper half.
    """
    return _lowbias32(_lowbias32(index ^ key_low) ^ key_high)


def noise_from_bits(bits: Tensor) -> Tensor:
    """Turn int32 hashes into noise: the upper 24 bits, then a one: (2k + 1) / 2**24 for k in [-2**23, 2**23)."""
    return ((bits & -256) | 128).to(torch.float32) * 2.0**-31


def segment_key(key: int, segment: int) -> int:
    """Return the key of elements ``segment * 2**32`` and up, so that an element index may exceed 32 bits."""
    return _splitmix64(key ^ segment)


def signed32(word: int) -> int:
    """Return the lower 32 bits as a signed number, for an int32 tensor."""
    word &= _MASK32
    return word - (1 << 32) if word >> 31 else word


def _hashed_chunks(key: int, numel: int, start: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Yield (position, int32 hashes) in chunks; the tensor is reused, so the caller must be done with it in between."""
    if numel == 0:
        return
    counter = _counter(device)
    size = min(numel, CHUNK)
    buffers = torch.empty((2, size), dtype=torch.int32, device=device)
    done = 0
    while done < numel:
        high, low = divmod(start + done, 1 << 32)
        count = min(CHUNK, numel - done, (1 << 32) - low)
        segment = segment_key(key, high)
        bits, scratch = buffers[0, :count], buffers[1, :count]
        torch.add(counter[:count], signed32(low), out=bits)
        _lowbias32_(bits.bitwise_xor_(signed32(segment)), scratch)
        _lowbias32_(bits.bitwise_xor_(signed32(segment >> 32)), scratch)
        yield done, bits
        done += count


def _lowbias32_(x: Tensor, scratch: Tensor) -> Tensor:
    """Mix int32 ``x`` in place; torch's ``>>`` is arithmetic, so each shift is masked to make it logical."""
    for shift, multiplier in _LOWBIAS32:
        torch.bitwise_right_shift(x, shift, out=scratch)
        x.bitwise_xor_(scratch.bitwise_and_(_MASK32 >> shift))
        if multiplier is not None:
            x.mul_(signed32(multiplier))
    return x


def _lowbias32(x: Tensor) -> Tensor:
    """Mix int32 ``x`` out of place."""
    for shift, multiplier in _LOWBIAS32:
        x = x ^ ((x >> shift) & (_MASK32 >> shift))
        if multiplier is not None:
            x = x * signed32(multiplier)
    return x


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


@lru_cache(maxsize=32)
def _counter(device: torch.device) -> Tensor:
    return torch.arange(CHUNK, dtype=torch.int32, device=device)
