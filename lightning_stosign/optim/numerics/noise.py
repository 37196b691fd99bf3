"""The noise: uniform numbers that are a pure function of (seed, step, parameter index, element index).

Nothing here reads or writes a generator's state. Two replicas that count the same steps draw the same noise, a resumed
run draws what the uninterrupted one would have drawn, and a shard draws the part of its parameter's noise that is its
own. The function is a counter hash: a Weyl sequence of the element index through the 32-bit mixer *lowbias32* (C.
Wellons, "Prospecting for Hash Functions", 2018), without its last shift, which only mends bits that are not used. Half
of a 64-bit key is where the sequence starts, the other half goes in between the multiplications; *splitmix64* (Steele
et al., "Fast Splittable Pseudorandom Number Generators", 2014) makes it of (seed, step, parameter index, stream).
"""

from collections.abc import Iterator
from enum import IntEnum
from functools import lru_cache

import torch
from torch import Tensor

# Elements hashed at a time. On the CPU 1 MiB of int32, so that the dozen passes of the mixer stay in the cache.
CHUNK = 1 << 18
_ACCELERATOR_CHUNK = 1 << 22

_WEYL = 0x9E3779B1  # odd, close to 2**32 divided by the golden ratio
_SHIFT_1, _MULTIPLIER_1 = 16, 0x7FEB352D  # lowbias32
_SHIFT_2, _MULTIPLIER_2 = 15, 0x846CA68B
_SHIFT_3 = 16

_MASK32 = (1 << 32) - 1
_MASK64 = (1 << 64) - 1


class Stream(IntEnum):
    """What a draw is for: different streams of one (seed, step, parameter) are independent."""

    UPDATE = 0  # the n_t of sign(m_t + G_t * n_t)
    ROUND_STATE = 1  # stochastic rounding of the stored momentum
    ROUND_PARAM = 2  # stochastic rounding of a bfloat16 or float16 parameter
    WORKER = 3  # the sign that a worker sends; the seed is made of the rank too
    TIE = 4  # the casting vote on a coordinate, the same for all workers
    ROUND_ENVELOPE = 5  # stochastic rounding of a decayed envelope


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
    key = _key_of_step(seed, step)
    for word in (index, int(stream)):
        key = _splitmix64(key ^ (word & _MASK64))
    return key


@lru_cache(maxsize=16)
def _key_of_step(seed: int, step: int) -> int:
    return _splitmix64(_splitmix64(seed & _MASK64) ^ (step & _MASK64))


def uniform_noise(key: int, numel: int, *, start: int = 0, device: torch.device | str = "cpu") -> Tensor:
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
        # As noise_from_bits, in place; two passes are faster than one multiplication of mixed types.
        part = noise[at : at + bits.numel()]
        part.copy_(bits.bitwise_and_(_scalar(-256)).bitwise_or_(_scalar(128))).mul_(2.0**-31)
    return noise


def uniform_fraction(key: int, numel: int, *, start: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Return elements ``start`` to ``start + numel`` of ``r ~ Unif[0, 1)`` that belong to ``key``, for rounding.

    Each value is a multiple of 2**-24, exact in float32. Arguments as in :func:`uniform_noise`.

    Returns:
        float32 tensor of shape ``[numel]``.
    """
    fraction = torch.empty(numel, dtype=torch.float32, device=device)
    for at, bits in _hashed_chunks(key, numel, start, fraction.device):
        part = fraction[at : at + bits.numel()]
        part.copy_(bits.bitwise_right_shift_(_scalar(8)).bitwise_and_(_scalar((1 << 24) - 1))).mul_(2.0**-24)
    return fraction


def noise_of_runs(key: int, starts: Tensor, run: int, *, device: torch.device) -> Tensor:
    """Return the noise ``n ~ Unif(-1, 1)`` of elements that are not consecutive, but in runs.

    Args:
        key: from :func:`noise_key`.
        starts: int64 on the CPU, ``[runs]``: each run's first element index.
        run: the number of consecutive elements in a run.
        device: where to put the values.

    Returns:
        float32 tensor of shape ``[runs, run]``: the values of :func:`uniform_noise` at these elements.
    """
    return noise_from_bits(_hashed_runs(key, starts, run, device))


def fraction_of_runs(key: int, starts: Tensor, run: int, *, device: torch.device) -> Tensor:
    """Return ``r ~ Unif[0, 1)`` of elements in runs: the values of :func:`uniform_fraction`; else as above."""
    return fraction_from_bits(_hashed_runs(key, starts, run, device))


def fair_coins(key: int, numel: int, *, start: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Return coins ``start`` to ``start + numel`` of ``key``: one side is 0 and more, the other less. Four of a hash.

    Arguments as in :func:`uniform_noise`.

    Returns:
        int8 tensor of shape ``[numel]``.
    """
    first = start // 4
    coins = torch.empty(4 * (-(-(start + numel) // 4) - first), dtype=torch.int8, device=device)
    words = coins.view(torch.int32)
    for at, bits in _hashed_chunks(key, words.numel(), first, words.device):
        # The mixer's last shift: the sign of a lower byte needs it.
        part = words[at : at + bits.numel()]
        torch.bitwise_right_shift(bits, _scalar(_SHIFT_3), out=part)
        part.bitwise_and_(_scalar(_MASK32 >> _SHIFT_3)).bitwise_xor_(bits)
    return coins[start % 4 : start % 4 + numel]


def hash_words(key: int, start: int = 0) -> tuple[int, int]:
    """Return what :func:`hash_bits` needs of a key to hash elements ``start`` and on, as two signed 32-bit numbers.

    The elements must not go beyond the next multiple of 2**32: the key changes there.
    """
    high, low = divmod(start, 1 << 32)
    key = _splitmix64(key ^ high)
    return signed32((low + key) * _WEYL), signed32(key >> 32)


def weyl_sequence(numel: int, *, step: int = 1, device: torch.device | str = "cpu") -> Tensor:
    """Return the Weyl sequence of elements 0, ``step``, 2 * ``step``, ...: an int32 tensor of shape ``[numel]``."""
    return (torch.arange(0, step * numel, step, dtype=torch.int64, device=device) * signed32(_WEYL)).to(torch.int32)


def hash_bits(sequence: Tensor, origin: Tensor | int, key_high: Tensor | int) -> Tensor:
    """Return the int32 hashes of elements: the same function out of place, for a compiler to fuse, and for many keys.

    Args:
        sequence: int32, :func:`weyl_sequence` of the elements counted from the origin.
        origin: int32, broadcast against it: the first of the :func:`hash_words`.
        key_high: int32, the second.
    """
    x = sequence + origin
    x = x ^ ((x >> _SHIFT_1) & (_MASK32 >> _SHIFT_1))
    x = (x * signed32(_MULTIPLIER_1)) ^ key_high
    x = x ^ ((x >> _SHIFT_2) & (_MASK32 >> _SHIFT_2))
    return x * signed32(_MULTIPLIER_2)


def noise_from_bits(bits: Tensor) -> Tensor:
    """Turn int32 hashes into noise: the upper 24 bits, then a one: (2k + 1) / 2**24 for k in [-2**23, 2**23)."""
    return ((bits & -256) | 128).to(torch.float32) * 2.0**-31


def fraction_from_bits(bits: Tensor) -> Tensor:
    """Turn int32 hashes into fractions: the upper 24 bits, as k / 2**24 for k in [0, 2**24)."""
    return ((bits >> 8) & ((1 << 24) - 1)).to(torch.float32) * 2.0**-24


def signed32(word: int) -> int:
    """Return the lower 32 bits as a signed number, for an int32 tensor."""
    word &= _MASK32
    return word - (1 << 32) if word >> 31 else word


def _hashed_chunks(key: int, numel: int, start: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Yield (position, int32 hashes) in chunks; the tensor is reused, so the caller must be done with it in between."""
    if numel == 0:
        return
    sequence = _sequence(device)
    chunk = sequence.numel()
    buffers = torch.empty((2, min(numel, chunk)), dtype=torch.int32, device=device)
    done = 0
    while done < numel:
        count = min(chunk, numel - done, (1 << 32) - (start + done) % (1 << 32))
        bits, scratch = (buffers if count == buffers.shape[1] else buffers[:, :count]).unbind()
        origin, high = hash_words(key, start + done)
        torch.add(sequence[:count], origin, out=bits)
        # torch's >> is arithmetic: the mask makes it logical.
        torch.bitwise_right_shift(bits, _scalar(_SHIFT_1), out=scratch)
        bits.bitwise_xor_(scratch.bitwise_and_(_scalar(_MASK32 >> _SHIFT_1)))
        bits.mul_(_scalar(signed32(_MULTIPLIER_1))).bitwise_xor_(high)
        torch.bitwise_right_shift(bits, _scalar(_SHIFT_2), out=scratch)
        bits.bitwise_xor_(scratch.bitwise_and_(_scalar(_MASK32 >> _SHIFT_2)))
        bits.mul_(_scalar(signed32(_MULTIPLIER_2)))
        yield done, bits
        done += count


def _hashed_runs(key: int, starts: Tensor, run: int, device: torch.device) -> Tensor:
    """Return the int32 hashes of elements in runs, ``[runs, run]``."""
    first, last = starts >> 32, (starts + (run - 1)) >> 32
    index = starts.to(device).unsqueeze(1) + torch.arange(run, dtype=torch.int64, device=device)
    sequence = (index * signed32(_WEYL)).to(torch.int32)  # keeps the lower 32 bits
    bits = torch.zeros_like(sequence)
    for high in torch.cat([first, last]).unique().tolist():  # the key changes at multiples of 2**32
        of_segment = hash_bits(sequence, *hash_words(key, high << 32))
        bits = torch.where(index >> 32 == high, of_segment, bits)
    return bits


@lru_cache(maxsize=64)
def _scalar(number: int) -> Tensor:
    """Return an operand for int32 tensors on any device: torch would make a 64-bit one of a number, and convert it."""
    return torch.tensor(number, dtype=torch.int32, device="cpu")


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


@lru_cache(maxsize=32)
def _sequence(device: torch.device) -> Tensor:
    return weyl_sequence(CHUNK if device.type == "cpu" else _ACCELERATOR_CHUNK, device=device)
