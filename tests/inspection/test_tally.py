import math

import numpy as np
import pytest
import torch

from lightning_stosign.health import log10_histogram, underflow_fraction
from lightning_stosign.inspection.tally import Forecasts, HealthTally, Magnitudes, StateTally

FORMATS = (
    "fp8-raw",
    "fp8-raw:static_scale=1024",
    "fp8-raw:dtype=float8_e5m2",
    "fp8",
    "fp8:dtype=float8_e5m2",
    "fp8-block",
    "fp8-block:block_size=96",
    "bfloat16",
    "float16",
    "fp4-block",
)


def _state(seed, size=140_001):
    """Magnitudes over twelve decades, with zeros and a subnormal number."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(size, generator=generator) * 10 ** (12 * torch.rand(size, generator=generator) - 10)
    value[::7] = 0
    value[1] = 1e-41
    return value.reshape(-1, 1)


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("format", FORMATS)
def test_a_tally_counts_what_the_forecast_says(format, degree):
    value = _state(0)
    whole = underflow_fraction(value, format, degree)
    tally = StateTally.of(value, [format], degree)
    assert tally.lost == {format: int(whole.part)}
    assert tally.underflow_fraction[format] == pytest.approx(float(whole.fraction))
    assert 0 < whole.part < whole.whole or format in ("bfloat16",)


def test_the_statistics_are_those_of_numpy():
    value = _state(1)
    exact = value.double().numpy()
    tally = StateTally.of(value, [], 1)
    assert tally.size == exact.size
    assert tally.zeros == (exact == 0).sum()
    assert tally.largest == np.abs(exact).max()
    assert tally.rms == pytest.approx(math.sqrt((exact**2).mean()), rel=1e-6)
    magnitudes = Magnitudes()
    magnitudes.add(value.reshape(-1))
    assert magnitudes.histogram() == log10_histogram(value).tolist()


def test_tallies_add_up():
    first, second = _state(2), _state(3, size=9000)
    added = StateTally.of(first, ["fp8-raw"], 1)
    added.add(StateTally.of(second, ["fp8-raw"], 1))
    together = StateTally.of(torch.cat([first, second]), ["fp8-raw"], 1)
    assert added.square_sum == pytest.approx(together.square_sum)
    assert (added.size, added.zeros, added.largest, added.lost) == (
        together.size,
        together.zeros,
        together.largest,
        together.lost,
    )


def test_sick_coordinates_are_counted():
    numerator, denominator = torch.ones(1000), torch.ones(1000)
    numerator[:300], denominator[200:700] = 0, 0
    health = HealthTally.of(numerator, denominator)
    assert (health.dead_fraction, health.exploding_fraction) == (0.1, 0.4)


def test_nan_is_the_largest():
    value = _state(4)
    value[5] = math.nan
    tally = StateTally.of(value, ["fp8-raw"], 1)
    tally.add(StateTally.of(_state(5), ["fp8-raw"], 1))
    assert math.isnan(tally.largest)
    assert math.isnan(tally.rms)


@pytest.mark.parametrize("value", [torch.empty(0), torch.zeros(5), torch.tensor(0.0)])
def test_nothing_is_lost_of_nothing(value):
    tally = StateTally.of(value, ["fp8", "fp4-block"], 1)
    assert tally.underflow_fraction == {"fp8": 0, "fp4-block": 0}
    assert tally.rms == 0


@pytest.mark.parametrize("format", FORMATS)
def test_a_state_that_is_read_in_runs_counts_as_in_one_piece(format):
    value = _state(6).reshape(-1)
    forecasts = Forecasts([format])
    whole, tally = StateTally.of(value, [format], 2), StateTally(lost={format: 0})
    length = 40_000 // forecasts.block * forecasts.block
    runs = range(0, value.numel(), length)
    for start in runs:
        tally.count(value[start : start + length])
    for start in runs:
        roundings = forecasts.of(value.numel(), 2)
        tally.count_lost(value[start : start + length], start, roundings, forecasts.block)
    assert (tally.size, tally.zeros, tally.largest, tally.lost) == (whole.size, whole.zeros, whole.largest, whole.lost)


def test_histograms_of_several_threads_add_up():
    values = [_state(seed, size=70_000).reshape(-1) for seed in range(3)]
    together = Magnitudes()
    for value in values:
        one = Magnitudes()
        one.add(value[:100])
        one.add(value[100:])
        together.merge(one)
    assert together.histogram() == log10_histogram(torch.cat(values)).tolist()
