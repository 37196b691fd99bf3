"""Rounding by bits: exact, for every FP8 number, for subnormal numbers, for what lies beyond the range, and for NaN."""

import pytest
import torch

from lightning_stosign.optim.numerics.fp8 import widen
from lightning_stosign.optim.numerics.rounding import (
    round_stochastically,
    round_up,
)

FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
SHORT = [*FP8, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def values():
    """Float32 numbers of every exponent, and what the formats have limits and ties at."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 18,), generator=generator).to(torch.int32)
    normal = torch.randn(1 << 18, generator=generator) * 10.0 ** torch.randint(-9, 6, (1 << 18,), generator=generator)
    ties = torch.arange(-1024, 1024) / 2**10
    edges = torch.tensor([0.0, 448.0, 464.0, 480.0, 57344.0, 61440.0, 65504.0, 65520.0, 1e-45, 3.4e38, torch.inf])
    return torch.cat([bits.view(torch.float32), normal, ties, edges, -edges])


def assert_same(actual, expected):
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.nan_to_num(nan=-1e38), expected.nan_to_num(nan=-1e38))
    assert torch.equal(actual.isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", [*SHORT, torch.float32])
@pytest.mark.parametrize("shape", [(0,), (), (256,), (3, 1 << 15), (5, 7, 1001)])
def test_widening_is_the_cast_into_a_new_tensor(dtype, shape):
    numel = torch.Size(shape).numel()
    stored = (torch.arange(numel * dtype.itemsize) * 37 % 256).to(torch.uint8).view(dtype).view(shape)
    if dtype in FP8 and numel > 1:
        assert stored.view(torch.uint8).unique().numel() == min(numel, 256)  # NaN and inf, too
    wide = widen(stored)
    assert_same(wide, stored.to(torch.float32))
    assert wide.dtype == torch.float32 and (numel == 0 or wide.data_ptr() != stored.data_ptr())
    assert_same(
        widen(stored.transpose(0, -1) if shape else stored),
        stored.transpose(0, -1).to(torch.float32) if shape else wide,
    )


@pytest.mark.parametrize("dtype", SHORT)
def test_rounding_up_gives_the_smallest_number_not_below(dtype, values):
    value = values.abs()
    rounded = round_up(value, dtype)
    assert torch.equal(rounded.isnan(), value.isnan())
    value, rounded = value[~value.isnan()], rounded[~value.isnan()]
    assert_same(rounded.to(dtype).to(torch.float32), rounded)
    largest = torch.finfo(dtype).max
    assert bool((rounded >= value.clamp(max=largest)).all())
    # Its lower neighbour, by its bits in the format, is below.
    width = {1: torch.int8, 2: torch.int16}[dtype.itemsize]
    below = (rounded.to(dtype).view(width) - 1).view(dtype).to(torch.float32)
    assert bool((below < value)[rounded > 0].all())


@pytest.mark.parametrize("dtype", SHORT)
def test_random_rounding_takes_the_upper_neighbour_where_the_fraction_is_below_the_position(dtype, values):
    fraction = torch.randint(0, 1 << 24, values.shape, generator=torch.Generator().manual_seed(1)) * 2.0**-24
    rounded = round_stochastically(values, dtype, fraction)
    assert torch.equal(rounded.isnan(), values.isnan())
    finite = ~values.isnan()
    value, rounded, fraction = values[finite].double(), rounded[finite], fraction[finite]
    assert_same(rounded.to(dtype).to(torch.float32), rounded)
    magnitude = value.abs().clamp(max=torch.finfo(dtype).max)
    upper = round_up(magnitude.float(), dtype).double()
    width = {1: torch.int8, 2: torch.int16}[dtype.itemsize]
    lower = (upper.float().to(dtype).view(width) - (upper > 0).to(width)).view(dtype).double()
    position = torch.where(upper == magnitude, 1.0, (magnitude - lower) / (upper - lower))
    expected = torch.where(fraction < position, upper, lower) * value.sign()
    assert torch.equal(rounded.double(), expected)
