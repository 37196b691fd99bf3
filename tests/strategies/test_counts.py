"""Counts as digits of 16 bit words, against numpy's whole numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_stosign.strategies.counts import counts_width, digits_per_word, pack_counts, unpack_counts


def planes_of(counts, largest):
    """Bit j of byte i of plane b is bit b of count j * width + i."""
    lanes = counts.reshape(8, -1)
    planes = [sum((lanes[j] >> b & 1) << j for j in range(8)) for b in range(largest.bit_length())]
    return torch.from_numpy(np.stack(planes).astype(np.uint8))


def packed(counts, largest):
    out = torch.empty(counts_width(len(counts) // 8, largest), dtype=torch.uint8)
    pack_counts(planes_of(counts, largest), largest, out)
    return out


@settings(deadline=None, max_examples=200)
@given(
    largest=st.one_of(st.sampled_from([1, 2, 4, 5, 8, 32, 39]), st.integers(1, 255)),
    rows=st.integers(1, 3),
    width=st.integers(0, 40),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_counts_come_back(largest, rows, width, seed, dtype):
    counts = np.random.default_rng(seed).integers(0, largest, (rows, 8 * width), endpoint=True)
    rows_of_bytes = torch.stack([packed(row, largest) for row in counts])
    out = torch.full((rows, 8 * width), torch.nan, dtype=dtype)
    assert unpack_counts(rows_of_bytes, largest, out) is out
    assert np.array_equal(out.numpy(), counts)


@pytest.mark.parametrize("largest", [voters for voters in range(1, 256) if digits_per_word(voters)])
def test_words_hold_the_fraction_of_all_their_digits_rounded_up(largest):
    base, digits = largest + 1, digits_per_word(largest)
    # The smallest and the largest word, and those where one more changes all digits.
    numbers = {0, base**digits - 1} | {base**k + offset for k in range(digits) for offset in (-1, 0, 1)}
    numbers = sorted(n for n in numbers if n < base**digits)
    numbers += [0] * (-len(numbers) % 8)  # so that the counts fill bytes
    lanes = [[n // base ** (digits - 1 - j) % base for n in numbers] for j in range(digits)]
    words = packed(np.array(lanes).ravel(), largest).view(2, -1).long()
    expected = [-(-(n << 16) // base**digits) for n in numbers]
    assert (words[0] + 256 * words[1]).tolist() == expected
    assert max(expected) < 1 << 16


@pytest.mark.parametrize(
    ("voters", "bits"), [(1, 1), (2, 1.6), (3, 2), (4, 8 / 3), (5, 8 / 3), (7, 3), (8, 3.2), (15, 4), (31, 5), (255, 8)]
)
def test_bits_a_count(voters, bits):
    assert counts_width(30_000, voters) == pytest.approx(30_000 * bits, rel=1e-4)


def test_counts_never_take_more_than_bit_planes():
    assert all(counts_width(30_000, voters) <= 30_000 * voters.bit_length() for voters in range(1, 256))


def test_row_of_a_longer_message_is_written_in_place():
    room = torch.full((2, 40), 77, dtype=torch.uint8)
    counts = np.arange(40) % 3
    pack_counts(planes_of(counts, 2), 2, out=room[0, 8:16])
    assert (room[0, :8] == 77).all() and (room[0, 16:] == 77).all() and (room[1] == 77).all()
    out = unpack_counts(room[:1, 8:16], 2, torch.empty(1, 40))
    assert np.array_equal(out[0].numpy(), counts)
