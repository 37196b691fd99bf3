"""The torchmetrics, in one process, against float64 numpy; test_sharded_statistics.py has them over two."""

import copy
import pickle

import numpy as np
import pytest
import torch

from lightning_stosign.health import (
    AbsMax,
    DeadFraction,
    ExplodingFraction,
    LogMagnitudeHistogram,
    LogMagnitudeQuantile,
    RootMeanSquare,
    StalledFraction,
    UnderflowFraction,
    ZeroFraction,
    log10_histogram,
    stalled_fraction,
    underflow_fraction,
)

FP8 = "fp8:min_numel=0"


def planted(shape, seed):
    """float32 values over ten decades with zeros, subnormal numbers and outliers."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * 10.0 ** rng.uniform(-9, 0, shape)
    flat = values.reshape(-1)
    flat[::13], flat[3::97], flat[5::389] = 0, 3e-41, 250.0
    return values.astype(np.float32)


STATES = [planted((30, 40), 0), planted((500,), 1), planted((3, 4, 5), 2)]


def flat(states=STATES):
    return np.concatenate([state.reshape(-1) for state in states]).astype(float)


def quantiles_by_hand(values):
    bits = np.abs(values[values != 0]).astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    magnitudes = np.maximum(bits.view(np.float32).astype(float), 2.0**-149)
    return np.log10(np.quantile(magnitudes, [0.1, 0.5], method="inverted_cdf"))


METRICS = {
    "zeros": (ZeroFraction, lambda x: np.mean(x == 0)),
    "rms": (RootMeanSquare, lambda x: np.sqrt(np.mean(x**2))),
    "largest": (AbsMax, lambda x: np.abs(x).max()),
    "quantiles": (lambda **options: LogMagnitudeQuantile([0.1, 0.5], **options), quantiles_by_hand),
    "histogram": (LogMagnitudeHistogram, lambda x: log10_histogram(torch.from_numpy(x)).numpy()),
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics_accumulate_to_the_float64_statistic_of_all_values(name):
    make, reference = METRICS[name]
    metric = make()
    for state in STATES:
        metric.update(torch.from_numpy(state))
    np.testing.assert_allclose(metric.compute().numpy(), reference(flat()), rtol=1e-6)


def test_underflow_is_of_each_tensor_with_its_own_scale():
    metric = UnderflowFraction(FP8)
    for state in STATES:
        metric.update(torch.from_numpy(state))
    shares = [underflow_fraction(torch.from_numpy(state), FP8) for state in STATES]
    assert metric.compute() == sum(s.part for s in shares) / sum(s.whole for s in shares)


def test_underflow_takes_the_degree_of_a_second_moment():
    metric = UnderflowFraction("fp8-raw:static_scale=1024,min_numel=0")
    metric.update(torch.tensor([2.0**-26]), degree=2)
    assert metric.compute() == 0


def test_stalls_are_of_all_that_should_change():
    metric = StalledFraction(FP8)
    changes = [torch.from_numpy(state).roll(1) * 0.1 for state in STATES]
    for state, change in zip(STATES, changes, strict=True):
        metric.update(torch.from_numpy(state), change)
    shares = [stalled_fraction(torch.from_numpy(s), c, FP8) for s, c in zip(STATES, changes, strict=True)]
    assert metric.compute() == sum(s.part for s in shares) / sum(s.whole for s in shares)


@pytest.mark.parametrize(
    ("cls", "reference"),
    [
        (DeadFraction, lambda m, v: np.mean((m == 0) & (v == 0))),
        (ExplodingFraction, lambda m, v: np.mean((m != 0) & (v == 0))),
    ],
)
def test_coordinates_are_judged_by_numerator_and_denominator(cls, reference):
    metric = cls()
    denominators = [np.where(np.arange(s.size).reshape(s.shape) % 3 == 0, 0, s) for s in STATES]
    for m, v in zip(STATES, denominators, strict=True):
        metric.update(torch.from_numpy(m), torch.from_numpy(v))
    assert metric.compute().item() == pytest.approx(reference(flat(), flat(denominators)), rel=1e-6)


ALL = [
    *(make for make, _ in METRICS.values()),
    lambda **options: UnderflowFraction(FP8, **options),
    lambda **options: StalledFraction(FP8, **options),
    DeadFraction,
    ExplodingFraction,
]


def updated(metric, values):
    takes_two = isinstance(metric, (StalledFraction, DeadFraction, ExplodingFraction))
    metric.update(values, *([(values.float() * 0.1).to(values.dtype)] if takes_two else []))
    return metric


@pytest.mark.parametrize("make", ALL)
def test_metrics_reset_copy_and_pickle(make):
    values = torch.from_numpy(STATES[0])
    metric = updated(make(), values)
    expected = metric.compute()
    for twin in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        torch.testing.assert_close(twin.compute(), expected)
    metric.reset()
    torch.testing.assert_close(updated(metric, values).compute(), expected)


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn])
def test_metrics_take_any_floating_point_dtype(make, dtype):
    values = torch.tensor([0.0, 10.0, -20.0, 320.0])  # all of these dtypes have them, and a tenth of them
    torch.testing.assert_close(updated(make(), values.to(dtype)).compute(), updated(make(), values).compute())


@pytest.mark.parametrize("make", ALL)
def test_metrics_of_an_empty_tensor_are_those_of_nothing(make):
    torch.testing.assert_close(updated(make(), torch.zeros(0)).compute(), make().compute(), equal_nan=True)


def test_a_nan_is_not_hidden():
    metric = AbsMax()
    metric.update(torch.tensor([float("nan")]))
    metric.update(torch.tensor([1.0]))
    assert metric.compute().isnan()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ZeroFraction(replicated="yes"), TypeError, "replicated='yes' must be a bool"),
        (lambda: UnderflowFraction("fp9"), ValueError, "'fp9' is unknown; accepted"),
        (lambda: StalledFraction("fp9"), ValueError, "'fp9' is unknown; accepted"),
        (lambda: LogMagnitudeQuantile([1.5]), ValueError, r"quantiles=\[1\.5\]: each must be in \[0, 1\]"),
    ],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
