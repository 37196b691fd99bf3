import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lightning_stosign.health import log10_bin_edges, log10_histogram, log10_quantiles, magnitude_counts

NAN, INF = float("nan"), float("inf")
SMALLEST = float(np.finfo(np.float32).smallest_subnormal)

special = st.sampled_from([np.float32(x) for x in (0.0, -0.0, NAN, INF, -INF, SMALLEST, 3e-40, -1e-42)])
numbers = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)
states = hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_side=6), elements=st.one_of(numbers, special))


def tensor(array):
    return torch.from_numpy(np.array(array))


def nonzero_magnitudes(values):
    magnitudes = np.abs(values.astype(float)).reshape(-1)
    return magnitudes[np.isfinite(magnitudes) & (magnitudes > 0)]


def truncated(magnitudes):
    """What bfloat16 truncates to; the smallest subnormal number where that is 0."""
    bits = magnitudes.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return np.maximum(bits.view(np.float32).astype(float), 2.0**-149)


def edges():
    return 10.0 ** log10_bin_edges().numpy()


def test_bin_edges_are_quarter_decades_rounded_down_by_less_than_2_to_the_minus_7():
    wanted, got = 10.0 ** np.arange(-37.75, 38.75, 0.25), edges()[-307:-1]
    assert (got <= wanted * (1 + 1e-6)).all() and (got > wanted * (1 - 2.0**-7)).all()


def test_the_first_bin_reaches_down_to_the_smallest_number_and_the_last_up_to_the_largest():
    assert edges()[0] == pytest.approx(SMALLEST)
    assert edges()[-1] == pytest.approx(float(np.finfo(np.float32).max))


@given(states)
def test_histogram_agrees_with_numpy_and_leaves_out_zero_nan_and_inf(values):
    magnitudes, counts = nonzero_magnitudes(values), log10_histogram(tensor(values)).numpy()
    bounds = edges()
    bounds[0], bounds[-1] = 0, np.inf
    # The edges are numbers that bfloat16 has; log10 and back may miss them by a rounding.
    exact = truncated(bounds[1:-1] * (1 + 1e-9))
    np.testing.assert_array_equal(counts, np.histogram(magnitudes, [0, *exact, np.inf])[0])


@pytest.mark.parametrize("value", [SMALLEST, float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)])
def test_histogram_reaches_from_the_smallest_to_the_largest_float32(value):
    assert log10_histogram(torch.tensor([value])).sum() == 1


def test_histogram_bins_are_closed_below():
    (index,) = log10_histogram(torch.tensor([1.0])).nonzero().flatten().tolist()
    assert log10_bin_edges()[index] == 0.0


def test_histogram_of_parts_adds_up_to_that_of_the_whole():
    values = torch.randn(300_001)  # several parts
    counts = log10_histogram(values[:100_000]) + log10_histogram(values[100_000:])
    assert torch.equal(log10_histogram(values), counts)
    assert counts.sum() == 300_001


@given(states, st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_quantiles_are_numpy_s_of_the_truncated_magnitudes(values, quantiles):
    found = log10_quantiles(magnitude_counts(tensor(values)), quantiles).numpy()
    magnitudes = truncated(nonzero_magnitudes(values))
    if magnitudes.size == 0:
        assert np.isnan(found).all()
        return
    expected = np.log10(np.quantile(magnitudes, quantiles, method="inverted_cdf"))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)


def test_quantiles_are_within_0_0034_decades_of_the_values():
    values = torch.logspace(-12, 3, 10_001).flip(0)
    found = log10_quantiles(magnitude_counts(values), [0.05, 0.5, 0.95]).numpy()
    expected = np.log10(np.quantile(values.double().numpy(), [0.05, 0.5, 0.95], method="inverted_cdf"))
    assert (found <= expected).all() and (found > expected - 0.0034).all()


@pytest.mark.slow
def test_magnitudes_are_counted_beyond_what_float32_counts():
    assert log10_histogram(torch.full(((1 << 24) + 5,), 0.02)).max().item() == (1 << 24) + 5
