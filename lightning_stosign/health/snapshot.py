"""One look at an optimizer's health: every statistic of every layer, computed on the device, transferred once."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_stosign.health.forecast import underflow_fraction
from lightning_stosign.health.readers import Moments, read_moments
from lightning_stosign.health.statistics import (
    abs_max,
    coordinate_health,
    log10_histogram,
    noise_intensity,
    square_sum,
    state_statistics,
)
from lightning_stosign.optim.emulation import state_degree


class Tally(NamedTuple):
    """A statistic of one layer in a form that adds up over layers.

    Attributes:
        kind: ``"mean"`` is value / weight, ``"rms"`` its square root, ``"max"`` the value, ``"max_square"`` its square.
        value: a sum, or a maximum; 0-dimensional.
        weight: what to divide the sum by: a number known on the host, or a 0-dimensional tensor.
    """

    kind: Literal["mean", "rms", "max", "max_square"]
    value: Tensor
    weight: Tensor | float = 1.0


class Snapshot:
    """Collects statistics by (tag, layer) and turns them into records with one host transfer.

    Args:
        forecast: formats for which to count what they would store as 0.
        histograms: whether to count the log10 magnitudes.
    """

    def __init__(self, forecast: Iterable[str] = (), histograms: bool = False) -> None:
        self._forecast = tuple(forecast)
        self._with_histograms = histograms
        self._tallies: dict[str, dict[str, Tally]] = defaultdict(dict)
        self._histograms: dict[str, dict[str, Tensor]] = defaultdict(dict)

    def add_gradient(self, layer: str, grad: Tensor) -> None:
        """Add a gradient as it is before clipping: ``grad_abs_max``, ``grad_square_max``."""
        if grad.is_sparse:
            grad = grad.coalesce().values()
        if grad.numel() == 0:
            return
        largest = abs_max(grad.float() if grad.dtype.itemsize < 4 else grad)
        self._tallies["grad_abs_max"][layer] = Tally("max", largest)
        self._tallies["grad_square_max"][layer] = Tally("max_square", largest)

    def add_states(self, layer: str, moments: Moments) -> None:
        """Add the statistics of one parameter's states."""
        for name, value in moments.states.items():
            if value.numel() == 0:
                continue
            statistics = state_statistics(value)
            size = float(value.numel())
            self._tallies[f"zero_fraction/{name}"][layer] = Tally("mean", statistics.zeros, size)
            self._tallies[f"abs_max/{name}"][layer] = Tally("max", statistics.abs_max)
            self._tallies[f"rms/{name}"][layer] = Tally("rms", statistics.square_sum, size)
            for label in self._forecast:
                lost, nonzero = underflow_fraction(value, label, state_degree(name))
                self._tallies[f"underflow_fraction/{name}/{label}"][layer] = Tally("mean", lost, nonzero)
            if self._with_histograms:
                self._histograms[f"log10_abs/{name}"][layer] = log10_histogram(value)
        if moments.numerator is None or moments.denominator is None or moments.numerator.numel() == 0:
            return
        size = float(moments.numerator.numel())
        health = coordinate_health(moments.numerator, moments.denominator)
        self._tallies["dead_fraction"][layer] = Tally("mean", health.dead, size)
        self._tallies["exploding_fraction"][layer] = Tally("mean", health.exploding, size)
        if moments.stochastic_sign:
            noise = noise_intensity(moments.numerator, moments.denominator)
            self._tallies["noise_rms"][layer] = Tally("rms", noise.variance, noise.moving)
            self._tallies["sign_agreement"][layer] = Tally("mean", noise.agreement, noise.moving)

    def add_update(self, layer: str, before: Tensor, after: Tensor, lr: float | Tensor, weight_decay: float) -> None:
        """Add ``update_rms``: of (after - before + lr * weight_decay * before) / lr, the step without its decay."""
        if not isinstance(lr, Tensor) and lr == 0:
            return
        dtype = torch.promote_types(after.dtype, torch.float32)
        step = after.to(dtype) - before.to(dtype)
        if weight_decay != 0:
            step += before.to(dtype) * (lr * weight_decay)
        if isinstance(lr, Tensor):
            lr = lr.reshape(())  # of shape [1] it could not divide a 0-dimensional parameter's step in place
        self._tallies["update_rms"][layer] = Tally("rms", square_sum(step.div_(lr)), float(step.numel()))

    def records(self, per_layer: bool) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Transfer everything and return scalars and histograms by tag.

        Args:
            per_layer: whether to add ``<tag>/<layer>`` for each layer to the global ``<tag>``.

        Returns:
            Scalars by tag, and counts of the log10 bins by tag.
        """
        host = _transfer(
            [
                number
                for layers in self._tallies.values()
                for tally in layers.values()
                for number in (tally.value, tally.weight)
                if isinstance(number, Tensor)
            ]
            + [counts for layers in self._histograms.values() for counts in layers.values()]
        )

        def on_host(tally: Tally) -> tuple[float, float]:
            value = next(host)[0]
            return value, next(host)[0] if isinstance(tally.weight, Tensor) else tally.weight

        scalars: dict[str, float] = {}
        for tag, layers in self._tallies.items():
            numbers = {layer: on_host(tally) for layer, tally in layers.items()}
            kind = next(iter(layers.values())).kind
            scalars[tag] = _combine(kind, numbers.values())
            if per_layer:
                scalars.update({f"{tag}/{layer}": _combine(kind, [pair]) for layer, pair in numbers.items()})
        histograms: dict[str, list[float]] = {}
        for tag, by_layer in self._histograms.items():
            counts = {layer: next(host) for layer in by_layer}
            histograms[tag] = [sum(column) for column in zip(*counts.values(), strict=True)]
            if per_layer:
                histograms.update({f"{tag}/{layer}": c for layer, c in counts.items()})
        return scalars, histograms


def parameters_of(optimizer: Optimizer) -> Iterable[tuple[Tensor, Mapping[str, Any]]]:
    """Yield every parameter of an optimizer with its param group."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            yield param, group


def zero_fractions(optimizer: Optimizer, states: Iterable[str] | None = None) -> dict[str, tuple[float, bool]]:
    """Return the share of zeros over all layers, and whether all values are finite, by state; one host transfer.

    Args:
        optimizer: any torch optimizer.
        states: names of states. None: what each parameter's update is divided by or, where there is no such state,
            the state that gives the update its direction.
    """
    wanted = None if states is None else set(states)
    zeros: dict[str, list[Tensor]] = defaultdict(list)
    largest: dict[str, list[Tensor]] = defaultdict(list)
    sizes: dict[str, int] = defaultdict(int)
    for param, group in parameters_of(optimizer):
        moments = read_moments(optimizer, param, group)
        names = wanted if wanted is not None else moments.decisive_names
        for name in moments.states.keys() & names:
            value = moments.states[name]
            if value.numel() == 0:
                continue
            statistics = state_statistics(value)
            zeros[name].append(statistics.zeros)
            largest[name].append(statistics.abs_max)
            sizes[name] += value.numel()
    host = _transfer([number for name in sizes for number in (*zeros[name], *largest[name])])
    fractions = {}
    for name, size in sizes.items():
        count = sum(next(host)[0] for _ in zeros[name])
        finite = all([math.isfinite(next(host)[0]) for _ in largest[name]])
        fractions[name] = (count / size, finite)
    return fractions


def _combine(kind: str, numbers: Iterable[tuple[float, float]]) -> float:
    if kind in ("max", "max_square"):
        # max() would hide a NaN that does not come first.
        largest = max((value for value, _ in numbers), key=lambda value: math.inf if math.isnan(value) else value)
        return largest * largest if kind == "max_square" else largest
    value, weight = (math.fsum(column) for column in zip(*numbers, strict=True))
    mean = value / weight if weight > 0 else 0.0
    return math.sqrt(max(mean, 0.0)) if kind == "rms" and not math.isnan(mean) else mean


def _transfer(tensors: list[Tensor]) -> Iterator[list[float]]:
    """Bring tensors to the host in one transfer; yields their values as lists."""
    if not tensors:
        return iter(())
    device = tensors[0].device
    flat = torch.cat([tensor.to(device=device, dtype=tensors[0].dtype).reshape(-1) for tensor in tensors])
    return iter([part.tolist() for part in flat.cpu().split([tensor.numel() for tensor in tensors])])
