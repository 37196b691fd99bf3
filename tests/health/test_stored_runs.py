"""Rounding in float32, by which forecasts look at FP8, gives what casting to FP8 and back gives."""

import pytest
import torch

from lightning_stosign.health.rounding import Rounding
from lightning_stosign.health.sharding import Layout
from lightning_stosign.optim.emulation import as_stored
from lightning_stosign.optim.states.state_precision import FP8_DTYPES, StatePrecision

NAN, INF = float("nan"), float("inf")


def numbers_and_midpoints(dtype):
    """Each number of the dtype, the ties between neighbours, what is next to both in float32, and special values."""
    magnitudes = torch.arange(0x7F, dtype=torch.uint8).view(dtype).float()
    numbers = magnitudes[magnitudes.isfinite()]
    ties = (numbers[1:] + numbers[:-1]) / 2
    largest = torch.finfo(dtype).max
    special = torch.tensor([largest * 1.03, largest * 1.07, 1e30, 3e38, 1e-41, 2.0**-149, 2.0**-126, INF, NAN])
    values = torch.cat([numbers, ties, special])
    near = [values, values.nextafter(torch.tensor(INF)), values.nextafter(torch.tensor(-INF))]
    return torch.cat([*near, *(-value for value in near)])


def rounded(values, precision, degree=1):
    """What a run of values is rounded to that is the whole state."""
    rounding = Rounding(Layout(values.numel()), precision, degree)
    maxima = [values.abs().amax()] if rounding.has_tensor_scale else []
    return rounding.store(torch.stack(maxima) if maxima else torch.zeros(0))(values, slice(0, values.numel()))


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FP8_DTYPES)
@pytest.mark.parametrize(("static_scale", "degree"), [(1.0, 1), (2.0**10, 2), (2.0**-3, 1), (2.0**50, 2)])
def test_each_number_and_each_tie_is_rounded_as_a_cast_rounds_it(dtype, static_scale, degree):
    precision = StatePrecision(dtype, static_scale=static_scale, min_numel=0)
    values = numbers_and_midpoints(dtype)
    values = torch.cat([values, values / static_scale**degree])
    assert_same(rounded(values, precision, degree), as_stored(values, precision, degree))


@pytest.mark.parametrize("dtype", FP8_DTYPES)
@pytest.mark.parametrize("exponent", [-149, -135, -126, -118, -60, -1, 0, 1, 60, 100, 111])
def test_so_it_is_under_a_scale_of_any_size(dtype, exponent):
    precision = StatePrecision(dtype, "tensor", min_numel=0)
    values = numbers_and_midpoints(dtype)
    values = values[values.abs() <= torch.finfo(dtype).max] * 2.0**exponent
    assert_same(rounded(values, precision), as_stored(values, precision))


@pytest.mark.parametrize("beside", [0.0, INF, NAN, 3e38, 1e-45])
def test_so_it_is_beside_a_value_of_any_kind(beside):
    precision = StatePrecision.parse("fp8:min_numel=0")
    values = torch.tensor([0.0, -0.25, 1e-20, 1e-44, beside])
    # Storage keeps what is beyond its range at its largest number; the forecast has no need to.
    compared = slice(None, -1) if beside == INF else slice(None)
    assert_same(rounded(values, precision)[compared], as_stored(values, precision)[compared])


def test_rounding_leaves_the_values_as_they_are():
    values = torch.tensor([0.3, 1000.0])
    for name in ("fp8-raw:min_numel=0", "fp8:min_numel=0", "fp8-block:min_numel=0", "bfloat16:min_numel=0"):
        rounded(values, StatePrecision.parse(name))
    assert torch.equal(values, torch.tensor([0.3, 1000.0]))
