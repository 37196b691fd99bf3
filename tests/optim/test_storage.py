import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torchao.optim.subclass_fp8 import OptimStateFp8

from lightning_stosign import StatePrecision, state_bytes
from lightning_stosign.optim.numerics.rounding import power_of_two_scale
from lightning_stosign.optim.states.storage import (
    dequantize,
    quantize,
    round_by_noise,
    round_to_nearest,
)

LIMITED = ["float8_e4m3fn", "float8_e5m2", "float16"]
STORED = ["bfloat16", "float16", "fp8", "fp8-raw", "fp8-block", "fp8-block:block_size=3", "fp8:dtype=float8_e5m2"]
arrays = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-(2.0**20), 2.0**20, width=32))


@pytest.mark.parametrize("dtype", LIMITED)
@given(arrays)
def test_nearest_is_the_nearest_number_of_the_format(dtype, values):
    rounded = round_to_nearest(torch.from_numpy(values), getattr(torch, dtype)).double().numpy()
    np.testing.assert_array_equal(rounded, reference.round_nearest(values.astype(float), reference.FORMATS[dtype]))


@pytest.mark.parametrize("dtype", LIMITED)
@given(arrays)
def test_up_is_the_smallest_number_of_the_format_not_below(dtype, values):
    values = np.abs(values)
    stored, _ = quantize(torch.from_numpy(values), StatePrecision(dtype), rounding="up")
    np.testing.assert_array_equal(
        stored.double().numpy(), reference.round_up(values.astype(float), reference.FORMATS[dtype])
    )


def test_up_in_bfloat16_never_goes_below():
    values = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    stored, _ = quantize(values, StatePrecision(torch.bfloat16), rounding="up")
    assert bool((stored.float() >= values).all())
    assert bool((stored.float() <= values * (1 + 2**-7)).all())


@pytest.mark.parametrize("dtype", [*LIMITED, "bfloat16"])
def test_stochastic_rounding_is_unbiased_between_the_two_neighbours(dtype):
    dtype = getattr(torch, dtype)
    draws = 20_000
    values = torch.tensor([0.3, -0.3, 1.01, -17.3, 2.0**-11 * 1.1, 2.0**-12 * 0.7, 0.0, 1.5, 300.1])
    rounded = round_by_noise(values.repeat(draws, 1), dtype, 1).double()
    low, high = rounded.min(0).values, rounded.max(0).values
    nearest = round_to_nearest(values, dtype).double()
    assert bool(((nearest == low) | (nearest == high)).all())
    assert all(len(rounded[:, i].unique()) <= 2 for i in range(len(values)))
    error = (rounded.mean(0) - values.double()).abs()
    assert bool((error <= 5 * (high - low) / 2 / math.sqrt(draws)).all())


@pytest.mark.parametrize("dtype", [*LIMITED, "bfloat16"])
def test_stochastic_rounding_leaves_numbers_of_the_format_alone(dtype):
    dtype = getattr(torch, dtype)
    exact = torch.randn(50_000, generator=torch.Generator().manual_seed(0)).mul_(30).to(dtype).float()
    assert torch.equal(round_by_noise(exact, dtype, 3).float(), exact)


def test_stochastic_rounding_saturates():
    assert round_by_noise(torch.tensor([1e9, -1e9]), torch.float8_e4m3fn, 0).float().tolist() == [448, -448]


@pytest.mark.parametrize("largest", [448.0, 57344.0, 65504.0])
@given(amax=st.floats(2.0**-100, 2.0**100, width=32))
def test_scale_is_the_smallest_power_of_two_that_fits(largest, amax):
    scale = power_of_two_scale(torch.tensor(amax), largest).item()
    assert math.frexp(scale)[0] == 0.5
    assert amax / scale <= largest < amax / (scale / 2)


@pytest.mark.parametrize("k", [-40, 0, 9])
def test_scale_of_the_exact_largest_value_is_not_doubled(k):
    assert power_of_two_scale(torch.tensor(448.0 * 2.0**k), 448.0).item() == 2.0**k


def test_scale_of_zero_is_one():
    assert power_of_two_scale(torch.tensor(0.0), 448.0).item() == 1


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("rounding", ["nearest", "up"])
@given(arrays)
def test_storing_what_was_stored_changes_nothing(name, rounding, values):
    # Otherwise an envelope that is rounded up at every step would creep upwards.
    precision = StatePrecision.parse(name)
    once = dequantize(*quantize(torch.from_numpy(np.abs(values)), precision, rounding=rounding), precision)
    twice = dequantize(*quantize(once, precision, rounding=rounding), precision)
    assert torch.equal(once, twice)


@pytest.mark.parametrize("name", ["fp8", "fp8-block", "fp8-block:block_size=3"])
@given(arrays, st.integers(-60, 60))
def test_relative_error_of_a_scaled_format_is_bounded_at_any_magnitude(name, values, exponent):
    precision = StatePrecision.parse(name)
    value = torch.from_numpy(values) * 2.0**exponent
    restored = dequantize(*quantize(value, precision), precision)
    # Half a unit in the last of E4M3's three bits, or half its smallest number at this amax.
    floor = (value.abs().max() * 2.0**-10 / 224).clamp(min=2.0**-136)  # no scale is smaller than 2**-126
    assert bool(((restored - value).abs() <= torch.maximum(value.abs() * 2.0**-4, floor)).all())


def test_blocks_are_scaled_apart_in_row_major_order():
    precision = StatePrecision.parse("fp8-block:block_size=4")
    value = torch.tensor([[1e-6] * 3, [1e-6, 1e6, 1e6]])
    stored, scale = quantize(value, precision)
    assert scale.shape == (2,)
    torch.testing.assert_close(dequantize(stored, scale, precision), value, rtol=2.0**-4, atol=0)


@pytest.mark.parametrize("name", STORED)
def test_memory_format_does_not_matter(name):
    precision = StatePrecision.parse(name)
    value = torch.randn(2, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    other = value.to(memory_format=torch.channels_last)
    stored, scale = quantize(other, precision)
    expected, expected_scale = quantize(value, precision)
    assert stored.stride() == other.stride()
    assert torch.equal(stored.float(), expected.float())
    assert (scale is None and expected_scale is None) or torch.equal(scale, expected_scale)


def test_raw_formats_saturate_and_keep_nan():
    stored, _ = quantize(torch.tensor([1e9, -1e9, float("nan")]), StatePrecision.parse("fp8-raw"))
    assert stored.float()[:2].tolist() == [448, -448] and math.isnan(stored.float()[2])


def test_static_scale_moves_the_range():
    precision = StatePrecision.parse("fp8-raw:static_scale=1024")
    stored, _ = quantize(torch.tensor([2.0**-19, 2.0**-20]), precision, static_scale=1024.0)
    assert dequantize(stored, None, precision, static_scale=1024.0).tolist() == [2.0**-19, 0.0]


def test_bytes_of_a_tensor_subclass_are_those_of_what_it_is_made_of():
    x = torch.nn.Parameter(torch.zeros(4096))
    optimizer = torch.optim.SGD([x])
    optimizer.state[x] = {"exp_avg": OptimStateFp8.zeros((4096,), 256), "step": torch.tensor(1.0)}
    assert state_bytes(optimizer) == 4096 + 16 * 4
