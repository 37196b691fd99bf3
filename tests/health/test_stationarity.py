import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lightning_stosign.health import GeneralizedStationarity, L1Stationarity, generalized_stationarity

shapes = st.tuples(st.integers(1, 12), st.integers(1, 8))
values = st.floats(-100, 100, width=32)


@given(shapes.flatmap(lambda s: hnp.arrays(np.float64, (2, *s), elements=values)), st.floats(0, 10))
def test_generalised_stationarity_is_its_definition(arrays, delta):
    points, gradients = arrays
    mean = [sum(column) / len(points) for column in points.T]
    spread = sum(max(abs(y - m) for y, m in zip(point, mean, strict=True)) ** 2 for point in points) / len(points)
    expected = sum(abs(sum(column) / len(points)) for column in gradients.T) + delta * spread
    metric = GeneralizedStationarity(delta).set_dtype(torch.float64)
    for y, g in zip(points, gradients, strict=True):
        metric.update(torch.from_numpy(y), torch.from_numpy(g))
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_one_point_has_the_norm_of_its_gradient():
    gradient = torch.tensor([[1.0, -2.0]])
    assert generalized_stationarity(torch.ones(1, 2), gradient, 5.0) == 3.0


def test_gradients_of_a_kink_cancel():
    points = torch.linspace(-1e-3, 1e-3, 100).unsqueeze(1)
    assert generalized_stationarity(points, points.sign(), 1.0) < 1e-5


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_parameters_of_many_shapes_are_one_vector_and_reset_forgets_them():
    params = [torch.randn(3, 2, dtype=torch.bfloat16), torch.randn(()), torch.randn(4)]
    metric, flat = GeneralizedStationarity(0.5), GeneralizedStationarity(0.5)
    for scale in (1.0, 2.0, 5.0):
        point, gradient = [p * scale for p in params], [p / scale for p in params]
        metric.update(iter(point), iter(gradient))
        flat.update(*(torch.cat([part.float().flatten() for part in vector]) for vector in (point, gradient)))
    assert metric.compute() == flat.compute()
    metric.reset()
    assert metric.compute().isnan()


def test_points_are_copied():
    x = torch.nn.Parameter(torch.zeros(2))
    metric = GeneralizedStationarity(1.0)
    metric.update(x, torch.zeros(2))
    x.data.fill_(2.0)
    metric.update(x, torch.zeros(2))
    assert metric.compute() == 1.0


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_l1_stationarity_is_the_mean_norm():
    gradients = [[torch.randn(3, 2), torch.randn(4)] for _ in range(5)]
    metric = L1Stationarity()
    for gradient in gradients:
        metric.update(gradient)
    expected = np.mean([sum(float(part.abs().sum()) for part in gradient) for gradient in gradients])
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-6)
    metric.reset()
    assert metric.compute().isnan()


@pytest.mark.parametrize("metric", [lambda: GeneralizedStationarity(2.0), L1Stationarity])
def test_synchronised_metric_is_that_of_all_points(metric):
    """As torchmetrics combines processes: concatenated lists, summed sums."""
    first, second, whole = metric(), metric(), metric()
    generator = torch.Generator().manual_seed(0)
    for i in range(6):
        vectors = torch.randn(2, 5, generator=generator)
        arguments = vectors if isinstance(first, GeneralizedStationarity) else vectors[:1]
        (first if i % 2 else second).update(*arguments)
        whole.update(*arguments)
    merged = metric()
    for name, reduce in merged._reductions.items():
        parts = [getattr(m, name) for m in (first, second)]
        parts = [torch.cat(part) if isinstance(part, list) else part for part in parts]
        setattr(merged, name, reduce(parts if parts[0].dim() else torch.stack(parts)))
    merged._update_count = 1
    torch.testing.assert_close(merged.compute(), whole.compute())


def test_metric_survives_pickling():
    metric = GeneralizedStationarity(1.0)
    metric.update(torch.ones(2), torch.ones(2))
    assert pickle.loads(pickle.dumps(metric)).compute() == 2.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GeneralizedStationarity(-1.0), "delta=-1.0 must be finite and at least 0"),
        (lambda: GeneralizedStationarity(float("nan")), "delta=nan must be finite"),
        (lambda: generalized_stationarity(torch.ones(2, 3), torch.ones(2, 2), 1.0), r"points of shape \[2, 3\] and"),
        (lambda: generalized_stationarity(torch.ones(0, 3), torch.ones(0, 3), 1.0), "n at least 1"),
        (
            lambda: GeneralizedStationarity(1.0).update(torch.ones(2), torch.ones(3)),
            "point of 2 values and gradient of",
        ),
    ],
)
def test_bad_argument_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
