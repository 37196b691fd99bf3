"""Signs as bits: eight to a byte, and votes counted without unpacking them.

A row of ``8 * width`` values becomes ``width`` bytes: bit ``j`` of byte ``i`` is the sign of value ``j * width + i``.
Neighbours in memory go to neighbouring bytes, so that packing and unpacking are eight passes over contiguous values,
which vectorise, instead of a shuffle within each byte. Measured on one CPU core: 0.44 ns a value to pack and 0.22 ns to
unpack in eager torch, against 3.4 ns and 0.5 ns for the same loops under torch.compile.
"""

import torch
from torch import Tensor


def packed_width(numel: int, rows: int) -> int:
    """Return how many bytes each of ``rows`` equal parts of ``numel`` values takes, the last one padded.

    Example:
        >>> packed_width(17, rows=2), packed_width(0, rows=2)
        (2, 0)
    """
    return -(-numel // (8 * rows))


def pack_signs(values: Tensor, *, zero_is_positive: bool = False, out: Tensor | None = None) -> Tensor:
    """Return the signs of values as bits.

    Args:
        values: floating point or signed integers, shape ``[rows, 8 * width]``.
        zero_is_positive: whether the bit of a zero is 1. The bit of NaN is 0.
        out: uint8, shape ``[rows, width]``, to write to.

    Returns:
        uint8 of shape ``[rows, width]``.

    Raises:
        ValueError: a row is not a multiple of 8 values long.

    Example:
        >>> pack_signs(torch.tensor([[1.0, -1.0, 2.0, 0.0, -3.0, -1.0, -1.0, 5.0]]))
        tensor([[133]], dtype=torch.uint8)
    """
    rows, length = values.shape
    if length % 8 != 0:
        raise ValueError(f"values of shape {list(values.shape)} must have rows of a multiple of 8 values")
    width = length // 8
    lanes = values.view(rows, 8, width)
    compare = torch.ge if zero_is_positive else torch.gt
    if out is None:
        out = torch.empty((rows, width), dtype=torch.uint8, device=values.device)
    positive = torch.empty((rows, width), dtype=torch.bool, device=values.device)
    out.zero_()
    for j in reversed(range(8)):
        compare(lanes[:, j], 0, out=positive)
        out.bitwise_left_shift_(1).bitwise_or_(positive.view(torch.uint8))
    return out


def unpack_planes(planes: Tensor, out: Tensor) -> Tensor:
    """Write the numbers that bit planes spell: each packed as signs are, the lowest bit's plane first.

    Args:
        planes: uint8, shape ``[rows, bits, width]``, 1 <= bits <= 8.
        out: floating point, shape ``[rows, 8 * width]``.

    Returns:
        ``out``.
    """
    rows, bits, width = planes.shape
    lanes = out.view(rows, 8, width)
    count, plane = torch.empty((2, rows, width), dtype=torch.uint8, device=planes.device)
    for j in range(8):
        for b in range(bits):
            digit = count if b == 0 else plane
            torch.bitwise_right_shift(planes[:, b], j, out=digit).bitwise_and_(1)
            if b > 0:
                count.bitwise_or_(plane.bitwise_left_shift_(b))
        lanes[:, j].copy_(count)
    return out


def count_votes(votes: Tensor) -> Tensor:
    """Return how many of the packed votes are positive, as bit planes: eight coordinates a byte, added at once.

    Args:
        votes: uint8, shape ``[voters, width]``.

    Returns:
        uint8 of shape ``[bits, width]``, where ``bits = voters.bit_length()``; the lowest bit first.
    """
    voters, width = votes.shape
    planes = torch.zeros((voters.bit_length(), width), dtype=torch.uint8, device=votes.device)
    for voter, carry in enumerate(votes, start=1):
        for plane in planes[: voter.bit_length()]:
            overflow = plane & carry
            plane.bitwise_xor_(carry)
            carry = overflow
    return planes


def majority(votes: Tensor) -> Tensor:
    """Return the packed majority of an odd number of packed votes.

    Args:
        votes: uint8, shape ``[voters, width]``.

    Returns:
        uint8 of shape ``[1, width]``.

    Raises:
        ValueError: the number of voters is even, so that there might be a tie.
    """
    voters, width = votes.shape
    if voters % 2 == 0:
        raise ValueError(f"votes of {voters} voters may tie; accepted: an odd number of voters")
    planes = count_votes(votes)
    # count > voters / 2 if and only if adding this constant to the count carries beyond its highest bit.
    constant = (1 << len(planes)) - (voters // 2 + 1)
    carry = torch.zeros((1, width), dtype=torch.uint8, device=votes.device)
    for b, plane in enumerate(planes):
        carry = carry | plane if constant >> b & 1 else carry & plane
    return carry


def count_unanimous(votes: Tensor) -> Tensor:
    """Return on how many coordinates all packed votes are the same.

    Args:
        votes: uint8, shape ``[voters, width]``.

    Returns:
        int64, 0-dimensional.
    """
    all_positive, any_positive = votes[0].clone(), votes[0].clone()
    for vote in votes[1:]:
        all_positive.bitwise_and_(vote)
        any_positive.bitwise_or_(vote)
    bits = all_positive | ~any_positive
    bits = (bits & 0x55) + (bits >> 1 & 0x55)  # in pairs, then in fours, then in the whole byte
    bits = (bits & 0x33) + (bits >> 2 & 0x33)
    return ((bits & 0x0F) + (bits >> 4)).sum(dtype=torch.int64)
