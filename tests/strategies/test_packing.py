"""Signs as bits, against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_stosign.strategies.packing import count_votes, majority, pack_signs, packed_width, unpack_planes


def numpy_packed(values, rows):
    """Bit j of byte i is the sign of value j * width + i."""
    lanes = values.reshape(rows, 8, -1) > 0
    return sum(lanes[:, j].astype(np.uint8) << j for j in range(8)).astype(np.uint8)


def random_votes(voters, width, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (voters, width), dtype=np.uint8))


def bits(packed):
    """The positive votes of each coordinate: shape [rows, 8, width]."""
    return np.stack([packed.numpy() >> j & 1 for j in range(8)], axis=-2)


@settings(deadline=None, max_examples=50)
@given(rows=st.integers(1, 4), width=st.integers(0, 70), seed=st.integers(0, 1000))
def test_packed_signs_are_numpys_and_come_back(rows, width, seed):
    values = np.random.default_rng(seed).standard_normal((rows, 8 * width)).astype(np.float32)
    packed = pack_signs(torch.from_numpy(values))
    assert np.array_equal(packed.numpy(), numpy_packed(values, rows))
    unpacked = unpack_planes(packed.view(rows, 1, width), torch.empty(rows, 8 * width))
    assert np.array_equal(unpacked.numpy(), values > 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zero_counts_as_asked_and_nan_as_negative(dtype):
    values = torch.tensor([[0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1.0, -1.0, 0.0]], dtype=dtype)
    assert pack_signs(values).item() == 0b00101000
    assert pack_signs(values, zero_is_positive=True).item() == 0b10101011


@pytest.mark.parametrize(
    ("numel", "rows", "width"), [(0, 3, 0), (1, 1, 1), (8, 1, 1), (9, 1, 2), (24, 3, 1), (25, 3, 2)]
)
def test_rows_are_wide_enough_and_no_wider(numel, rows, width):
    assert packed_width(numel, rows) == width


def test_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"shape \[2, 7\] must have rows of a multiple of 8"):
        pack_signs(torch.zeros(2, 7))


@settings(deadline=None, max_examples=60)
@given(voters=st.integers(1, 40), width=st.integers(0, 9), seed=st.integers(0, 1000))
def test_counts_are_numpys(voters, width, seed):
    votes = random_votes(voters, width, seed)
    planes = count_votes(votes)
    assert planes.shape == (voters.bit_length(), width)
    counts = unpack_planes(planes[None], torch.empty(1, 8 * width))
    assert np.array_equal(counts.numpy().reshape(8, width), bits(votes).sum(0))


@settings(deadline=None, max_examples=60)
@given(voters=st.integers(0, 20).map(lambda n: 2 * n + 1), width=st.integers(0, 9), seed=st.integers(0, 1000))
def test_majority_is_numpys(voters, width, seed):
    votes = random_votes(voters, width, seed)
    assert np.array_equal(bits(majority(votes))[0], bits(votes).sum(0) > voters / 2)


def test_votes_are_only_read():
    votes = random_votes(5, 3)
    before = votes.clone()
    majority(votes), count_votes(votes)
    assert torch.equal(votes, before)


def test_majority_of_an_even_number_is_refused():
    with pytest.raises(ValueError, match="votes of 4 voters may tie; accepted: an odd number of voters"):
        majority(random_votes(4, 1))


def test_counts_up_to_255_fit_their_planes():
    counts = unpack_planes(torch.full((1, 8, 2), 255, dtype=torch.uint8), torch.empty(1, 16))
    assert counts.unique().tolist() == [255]
