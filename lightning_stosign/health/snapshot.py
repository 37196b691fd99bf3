"""One look at an optimizer's health: every statistic of every layer, computed on the device, transferred once."""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce
from torch.optim import Optimizer

from lightning_stosign.health.alike import (
    batches,
    is_small,
    kind_of,
    rows_forecast,
    rows_health,
    rows_noise,
    rows_statistics,
    rows_update,
    stack,
)
from lightning_stosign.health.forecast import Forecast, Rounds, forecasts_rounds, run_rounds
from lightning_stosign.health.magnitudes import (
    MAGNITUDE_BINS,
    add_magnitude_counts,
    histogram_of_cumulative,
    magnitude_counts,
    quantiles_of_cumulative,
)
from lightning_stosign.health.readers import Moments, changes_of_rows
from lightning_stosign.health.sharding import Layout, localize
from lightning_stosign.health.statistics import (
    abs_max,
    add_up,
    coordinate_health,
    in_parts,
    noise_intensity,
    ones_where,
    square_sum,
    state_statistics,
    sum_dtype,
)
from lightning_stosign.health.steps import COSINE, COSINE_PARTS, StepSum, step_sums
from lightning_stosign.optim.emulation import state_degree


class Tally(NamedTuple):
    """A statistic of one layer in a form that adds up over layers and over ranks.

    Attributes:
        kind: ``"mean"`` is value / weight, ``"rms"`` its square root, ``"max"`` the value, ``"max_square"`` its square.
        value: a sum, or a maximum; 0-dimensional.
        weight: what to divide the sum by: a number known on the host, or a 0-dimensional tensor.
        group: the ranks over which it is still to be combined.
    """

    kind: Literal["mean", "rms", "max", "max_square"]
    value: Tensor
    weight: Tensor | float = 1.0
    group: ProcessGroup | None = None


class _Rows(NamedTuple):
    """A statistic of several layers, ``[layers]`` each, known on this rank."""

    kind: Literal["mean", "rms", "max", "max_square"]
    layers: Sequence[str]
    values: Tensor
    weights: Tensor | float = 1.0


class _Update(NamedTuple):
    """A parameter before and after a step."""

    layer: str
    before: Tensor
    after: Tensor
    lr: float | Tensor
    weight_decay: float | Tensor


class _Step(NamedTuple):
    """A parameter before and after a step, its gradient, and what is nonzero where it should move."""

    layer: str
    before: Tensor
    after: Tensor
    grad: Tensor | None
    direction: Tensor | None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return everything but the layer's name."""
        return self.before, self.after, self.grad, self.direction


class _Counts(NamedTuple):
    """The magnitude counts of one layer's state of so many values, and the ranks over which they are to be added."""

    counts: Tensor
    size: int
    group: ProcessGroup | None


class _MagnitudeRecord(NamedTuple):
    """Histograms or quantiles of one state, ``[ends, numbers]``: for each end of a tag, ``""`` or ``"/<layer>"``."""

    what: Literal["histogram", "quantiles"]
    state: str
    ends: Sequence[str]
    numbers: Tensor


class Snapshot:
    """Collects statistics by (tag, layer) and turns them into records with one host transfer.

    Of sharded parameters every rank has to add its part, in the same order; :meth:`records` then combines the ranks
    with at most four collectives, however many layers there are. Small tensors are looked at in :meth:`records`, all of
    one size together, so that states and parameters must not change between.

    Args:
        forecast: formats for which to count what they would store as 0, and what would stall in them.
        histograms: whether to count the log10 magnitudes.
        quantiles: quantiles of log10 magnitude, each in [0, 1].
        updates: which of :data:`~lightning_stosign.health.steps.UPDATE_STATISTICS` to record.
    """

    def __init__(
        self,
        forecast: Iterable[str] = (),
        histograms: bool = False,
        quantiles: Sequence[float] = (),
        updates: Iterable[str] = (),
    ) -> None:
        self._updates = frozenset(updates)
        self._forecast = tuple(forecast)
        self._with_histograms = histograms
        self._quantiles = tuple(quantiles)
        self._tallies: dict[str, dict[str, Tally]] = defaultdict(dict)
        self._counts: dict[str, dict[str, _Counts]] = defaultdict(dict)
        # Forecasts of sharded states wait for records(): (state, layer, layout, their rounds).
        self._waiting: list[tuple[str, str, Layout, Rounds[list[Forecast]]]] = []
        # Small tensors wait for records(), too: what may be stacked, the values of each, and the item.
        self._small_moments: list[tuple[Hashable, int, tuple[str, Moments]]] = []
        self._small_updates: list[tuple[Hashable, int, _Update]] = []
        self._small_steps: list[tuple[Hashable, int, _Step]] = []
        self._rows: dict[str, list[_Rows]] = defaultdict(list)
        self._row_counts: dict[str, list[tuple[Sequence[str], Tensor, Tensor]]] = defaultdict(list)

    def add_gradient(self, layer: str, grad: Tensor, scale: Tensor | None = None) -> None:
        """Add a gradient as it is before clipping: ``grad_abs_max``, ``grad_square_max``, ``grad_rms``.

        Args:
            layer: its parameter's name.
            grad: the gradient.
            scale: a loss scale that it still has, 0-dimensional.
        """
        numel = float(grad.numel())
        if grad.is_sparse:
            grad = grad.coalesce().values()
        if grad.numel() == 0:
            return
        local, layout = localize(grad)
        largest = abs_max(local)
        if scale is not None:
            largest = largest / scale.to(largest.device)
        self._tallies["grad_abs_max"][layer] = Tally("max", largest, group=layout.group)
        self._tallies["grad_square_max"][layer] = Tally("max_square", largest, group=layout.group)
        if "grad_rms" in self._updates:
            squares = square_sum(local)
            if scale is not None:
                squares = squares / scale.to(squares) ** 2
            self._add("grad_rms", layer, Tally("rms", squares, numel, layout.group))

    def add_states(self, layer: str, moments: Moments) -> None:
        """Add the statistics of one parameter's states, and ``step_size`` where the optimizer finds it itself."""
        if moments.step_size is not None:
            self._add("step_size", layer, Tally("mean", moments.step_size.detach().reshape(())))
        kind = kind_of(moments, self._forecast)
        if kind is not None and moments.states:
            numel = max(value.numel() for value in moments.states.values())
            self._small_moments.append((kind, numel, (layer, moments)))
            return
        self._add_large_states(layer, moments)

    def _add_large_states(self, layer: str, moments: Moments) -> None:
        for name, value in moments.states.items():
            layout = moments.layout(name)
            if layout.numel == 0:
                continue
            statistics = state_statistics(value)
            size = float(layout.numel)
            self._add(f"zero_fraction/{name}", layer, Tally("mean", statistics.zeros, size, layout.group))
            self._add(f"abs_max/{name}", layer, Tally("max", statistics.abs_max, group=layout.group))
            self._add(f"rms/{name}", layer, Tally("rms", statistics.square_sum, size, layout.group))
            if self._forecast:
                change = moments.changes.get(name)
                rounds = forecasts_rounds(
                    value.reshape(-1), layout, self._forecast, state_degree(name), change, statistics
                )
                if layout.group is None:
                    self._add_forecasts(name, layer, layout, run_rounds([rounds])[0])
                else:
                    self._waiting.append((name, layer, layout, rounds))
            if self._with_histograms or self._quantiles:
                self._counts[name][layer] = _Counts(
                    magnitude_counts(value, statistics.zeros), layout.numel, layout.group
                )
        self._add_coordinates(layer, moments)

    def _add_coordinates(self, layer: str, moments: Moments) -> None:
        """Add what the numerator and the denominator say together."""
        numerator, denominator = moments.numerator, moments.denominator
        if numerator is None or denominator is None or numerator.shape != denominator.shape:
            return
        layout = next(moments.layout(name) for name, value in moments.states.items() if value is denominator)
        if layout.numel == 0:
            return
        size = float(layout.numel)
        health = coordinate_health(numerator, denominator)
        self._add("dead_fraction", layer, Tally("mean", health.dead, size, layout.group))
        self._add("exploding_fraction", layer, Tally("mean", health.exploding, size, layout.group))
        if moments.stochastic_sign:
            noise = noise_intensity(numerator, denominator)
            self._add("noise_rms", layer, Tally("rms", noise.variance, noise.moving, layout.group))
            self._add("sign_agreement", layer, Tally("mean", noise.agreement, noise.moving, layout.group))

    def add_update(
        self, layer: str, before: Tensor, after: Tensor, lr: float | Tensor, weight_decay: float | Tensor
    ) -> None:
        """Add ``update_rms``: of (after - before + lr * weight_decay * before) / lr, the step without its decay.

        Where nothing of the parameter has moved the step was skipped, decay and all: then it is 0.
        """
        if not isinstance(lr, Tensor) and lr == 0:
            return
        same = tuple(id(number) if isinstance(number, Tensor) else number for number in (lr, weight_decay))
        if isinstance(lr, Tensor):
            lr = lr.reshape(())  # of shape [1] it could not divide a 0-dimensional parameter's step
        if is_small(before) and is_small(after):
            kind = before.dtype, after.dtype, after.device, same
            self._small_updates.append((kind, after.numel(), _Update(layer, before, after, lr, weight_decay)))
            return
        (before, layout), (after, _) = localize(before), localize(after)
        dtype = torch.promote_types(after.dtype, torch.float32)
        squares, moved = [after.new_zeros((), dtype=sum_dtype(after))], [after.new_zeros((), dtype=dtype)]
        for old, new in in_parts(before, after):
            old = old.to(dtype)
            step = new.to(dtype) - old
            moved.append(add_up(ones_where(torch.ne, step, 0)))
            if isinstance(weight_decay, Tensor) or weight_decay != 0:
                step += old * (lr * weight_decay)
            squares.append(torch.linalg.vector_norm(step, dtype=sum_dtype(step)).square())
        total = torch.stack(squares).sum() / lr**2 * (torch.stack(moved).sum() > 0)
        self._add("update_rms", layer, Tally("rms", total, float(layout.numel), layout.group))

    def add_step(
        self, layer: str, before: Tensor, after: Tensor, grad: Tensor | None, direction: Tensor | None
    ) -> None:
        """Add the ``updates`` that compare a parameter before and after a step.

        Args:
            layer: the parameter's name.
            before: the parameter before the step.
            after: the parameter after it.
            grad: its gradient. None: no ``update_grad_cosine``.
            direction: nonzero where the step should move the parameter, of the values on this rank, such as
                :attr:`Moments.numerator`. None: the gradient is.
        """
        if not self._updates - {"grad_rms"}:
            return
        if grad is not None and grad.is_sparse:
            grad = grad.to_dense()
        local, layout = localize(after)
        if direction is not None and direction.numel() != local.numel():
            direction = None
        step = _Step(layer, before, after, grad, direction)
        if all(tensor is None or is_small(tensor) for tensor in step.tensors()):
            alike = tuple(None if tensor is None else (tensor.dtype, tensor.device) for tensor in step.tensors())
            self._small_steps.append((alike, after.numel(), step))
            return
        old, slope = localize(before)[0], None if grad is None else localize(grad)[0]
        present = [tensor for tensor in (old, local, slope, direction) if tensor is not None]

        def look(parts: Iterable[Tensor]) -> dict[str, StepSum]:
            rows = (part.unsqueeze(0) for part in parts)
            first, second = next(rows), next(rows)
            third = None if slope is None else next(rows)
            return step_sums(self._updates, first, second, third, None if direction is None else next(rows))

        sums = look(tensor.detach().reshape(-1)[:0] for tensor in present)  # a rank may have no values of a parameter
        for parts in in_parts(*present):
            sums = {name: sums[name] + more for name, more in look(parts).items()}
        for name, (kind, value, weight) in sums.items():
            self._add(name, layer, Tally(kind, value[0], weight[0], layout.group))

    def _add_small(self) -> None:
        """Look at the small tensors that wait."""
        for alike in batches(self._small_moments):
            self._add_rows([layer for layer, _ in alike], [moments for _, moments in alike])
        for updates in batches(self._small_updates):
            first = updates[0]
            before, after = stack(u.before for u in updates), stack(u.after for u in updates)
            squares = rows_update(before, after, first.lr, first.weight_decay)
            rows = _Rows("rms", [u.layer for u in updates], squares, float(after.shape[1]))
            self._rows["update_rms"].append(rows)
        for steps in batches(self._small_steps):
            before, after = stack(step.before for step in steps), stack(step.after for step in steps)
            grads = [step.grad for step in steps if step.grad is not None]  # all have one, or none
            directions = [step.direction for step in steps if step.direction is not None]
            grad, direction = stack(grads) if grads else None, stack(directions) if directions else None
            for name, (kind, value, weight) in step_sums(self._updates, before, after, grad, direction).items():
                self._rows[name].append(_Rows(kind, [step.layer for step in steps], value, weight))
        self._small_steps.clear()
        self._small_moments.clear()
        self._small_updates.clear()

    def _add_rows(self, layers: Sequence[str], alike: Sequence[Moments]) -> None:
        """Add the statistics of the states of parameters of which :func:`kind_of` is equal."""
        first = alike[0]
        for name, value in first.states.items():
            rows, size = stack(moments.states[name] for moments in alike), float(value.numel())
            statistics = rows_statistics(rows)
            self._rows[f"zero_fraction/{name}"].append(_Rows("mean", layers, statistics.zeros, size))
            self._rows[f"abs_max/{name}"].append(_Rows("max", layers, statistics.abs_max))
            self._rows[f"rms/{name}"].append(_Rows("rms", layers, statistics.square_sum, size))
            if self._forecast:
                change = None
                if name in first.changes:
                    change = changes_of_rows([moments.changes[name] for moments in alike], rows)
                for format in self._forecast:
                    forecast = rows_forecast(rows, statistics, format, state_degree(name), change)
                    for kind, share in (("underflow", forecast.underflow), ("stalled", forecast.stalled)):
                        if share is not None:
                            tag = f"{kind}_fraction/{name}/{format}"
                            self._rows[tag].append(_Rows("mean", layers, share.part, share.whole))
            if self._with_histograms or self._quantiles:
                self._row_counts[name].append((layers, rows, statistics.zeros))
        numerator, denominator = first.numerator, first.denominator
        if numerator is None or denominator is None or numerator.shape != denominator.shape:
            return
        size = float(denominator.numel())
        top = stack(m.numerator for m in alike if m.numerator is not None)
        bottom = stack(m.denominator for m in alike if m.denominator is not None)
        health = rows_health(top, bottom)
        self._rows["dead_fraction"].append(_Rows("mean", layers, health.dead, size))
        self._rows["exploding_fraction"].append(_Rows("mean", layers, health.exploding, size))
        if first.stochastic_sign:
            noise = rows_noise(top, bottom)
            self._rows["noise_rms"].append(_Rows("rms", layers, noise.variance, noise.moving))
            self._rows["sign_agreement"].append(_Rows("mean", layers, noise.agreement, noise.moving))

    def _add(self, tag: str, layer: str, tally: Tally) -> None:
        self._tallies[tag][layer] = tally

    def _add_forecasts(self, state: str, layer: str, layout: Layout, forecasts: Sequence[Forecast]) -> None:
        for format, forecast in zip(self._forecast, forecasts, strict=True):
            for kind, share in (("underflow", forecast.underflow), ("stalled", forecast.stalled)):
                if share is not None:
                    tally = Tally("mean", share.part, share.whole, layout.group)
                    self._add(f"{kind}_fraction/{state}/{format}", layer, tally)

    def records(self, per_layer: bool, depth: int | None = None) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Combine the ranks, transfer everything and return scalars and histograms by tag.

        Args:
            per_layer: whether to add ``<tag>/<layer>`` for each layer to the global ``<tag>``.
            depth: take layers together by the first so many parts of their names.

        Returns:
            Scalars by tag, and counts of the log10 bins by tag.
        """
        self._add_small()
        self._combine_ranks()

        def label(layer: str) -> str:
            return layer if depth is None else ".".join(layer.split(".")[:depth])

        singles = [
            tensor
            for layers in self._tallies.values()
            for tally in layers.values()
            for tensor in (tally.value, tally.weight)
            if isinstance(tensor, Tensor)
        ]
        stacked = [
            tensor
            for rows in self._rows.values()
            for entry in rows
            for tensor in (entry.values, entry.weights)
            if isinstance(tensor, Tensor)
        ]
        magnitudes = list(self._magnitude_records(per_layer, label))
        host = _transfer([*singles, *stacked, *(record.numbers for record in magnitudes)])

        kinds: dict[str, str] = {}
        numbers: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
        for tag, layers in self._tallies.items():
            for layer, tally in layers.items():
                value = next(host)[0]
                numbers[tag][layer] = value, next(host)[0] if isinstance(tally.weight, Tensor) else tally.weight
                kinds[tag] = tally.kind
        for tag, rows in self._rows.items():
            for entry in rows:
                values = next(host)
                weight = entry.weights
                weights = next(host) if isinstance(weight, Tensor) else [weight] * len(values)
                numbers[tag].update(zip(entry.layers, zip(values, weights, strict=True), strict=True))
                kinds[tag] = entry.kind

        scalars: dict[str, float] = {}
        for tag, pairs_by_layer in numbers.items():
            scalars[tag] = _combine(kinds[tag], pairs_by_layer.values())
            if per_layer:
                together: dict[str, list[tuple[float, float]]] = defaultdict(list)
                for layer, pair in pairs_by_layer.items():
                    together[label(layer)].append(pair)
                scalars.update({f"{tag}/{name}": _combine(kinds[tag], pairs) for name, pairs in together.items()})
        _multiply_cosines(scalars)
        histograms: dict[str, list[float]] = {}
        for record in magnitudes:
            flat = next(host)
            width = len(flat) // len(record.ends)
            for number, end in enumerate(record.ends):
                of_label = flat[number * width : (number + 1) * width]
                if record.what == "histogram":
                    histograms[f"log10_abs/{record.state}{end}"] = of_label
                else:
                    for quantile, value in zip(self._quantiles, of_label, strict=True):
                        scalars[f"log10_quantile/{record.state}/{quantile:g}{end}"] = value
        return scalars, histograms

    def _magnitude_records(self, per_layer: bool, label: Callable[[str], str]) -> Iterator["_MagnitudeRecord"]:
        """Yield histograms and quantiles of each state, still on the device."""
        for name in dict.fromkeys([*self._counts, *self._row_counts]):
            layers = [*self._counts[name], *(layer for group, *_ in self._row_counts[name] for layer in group)]
            labels = list(dict.fromkeys(map(label, layers))) if per_layer else []
            row_of = {layer: labels.index(label(layer)) if per_layer else 0 for layer in layers}
            values = sum(counted.size for counted in self._counts[name].values())
            values += sum(rows.numel() for _, rows, _ in self._row_counts[name])
            # Half the memory to fill and to add up, wherever no count can be beyond it.
            dtype = torch.int32 if values < 1 << 31 else torch.int64
            counts = self._counts_by_row(name, row_of, max(len(labels), 1), dtype)
            total = counts.sum(0, keepdim=True, dtype=dtype)
            for ends, part in (([""], total), ([f"/{end}" for end in labels], counts)):
                if not ends:
                    continue
                cumulative = part.cumsum(1, dtype=dtype)
                if self._with_histograms:
                    yield _MagnitudeRecord("histogram", name, ends, histogram_of_cumulative(cumulative))
                if self._quantiles:
                    yield _MagnitudeRecord(
                        "quantiles", name, ends, quantiles_of_cumulative(cumulative, self._quantiles)
                    )

    def _counts_by_row(self, name: str, row_of: Mapping[str, int], rows: int, dtype: torch.dtype) -> Tensor:
        """Return the magnitude counts of a state ``[rows, bins]``, of the layers of each row together."""
        first = next(iter(self._counts[name].values())).counts if self._counts[name] else self._row_counts[name][0][1]
        counts = torch.zeros(rows, MAGNITUDE_BINS, dtype=dtype, device=first.device)
        for layer, (counted, *_) in self._counts[name].items():
            counts[row_of[layer]] += counted.to(counts.device)
        for layers, values, zeros in self._row_counts[name]:
            places = torch.tensor([row_of[layer] for layer in layers], device="cpu")
            add_magnitude_counts(counts, values.to(counts.device), places.to(counts.device), zeros.to(counts.device))
        return counts

    def _combine_ranks(self) -> None:
        """Combine what the ranks of a sharded model have each found in their own parts."""
        groups = {id(t.group): t.group for layers in self._tallies.values() for t in layers.values() if t.group}
        for group in groups.values():
            waiting = [entry for entry in self._waiting if entry[2].group is group]
            forecasts = run_rounds([rounds for *_, rounds in waiting], group)
            for (state, layer, layout, _), found in zip(waiting, forecasts, strict=True):
                self._add_forecasts(state, layer, layout, found)
            self._add_over(group)
        self._waiting.clear()

    def _add_over(self, group: ProcessGroup) -> None:
        """Add sums and counts over the ranks of a group, and take maxima; NaN anywhere is NaN."""
        tallies = [
            (tag, layer, tally)
            for tag, layers in self._tallies.items()
            for layer, tally in layers.items()
            if tally.group is group
        ]
        counts = [
            (name, layer, entry.counts)
            for name, layers in self._counts.items()
            for layer, entry in layers.items()
            if entry.group is group
        ]
        device = tallies[0][2].value.device
        dtype = sum_dtype(tallies[0][2].value)

        def on_device(number: Tensor | float) -> Tensor:
            return torch.as_tensor(number, dtype=dtype, device=device)

        values = torch.stack([on_device(tally.value) for *_, tally in tallies])
        weights = torch.stack([on_device(tally.weight) for *_, tally in tallies])
        is_max = torch.tensor([tally.kind.startswith("max") for *_, tally in tallies], device=device)
        sums = torch.cat(
            [
                torch.where(is_max, values.isnan().to(dtype), values),
                weights,
                *(c.to(device, dtype) for *_, c in counts),
            ]
        )
        maxima = torch.where(is_max, values, 0.0).nan_to_num_(nan=0.0, posinf=torch.inf)
        all_reduce(sums, ReduceOp.SUM, group)
        all_reduce(maxima, ReduceOp.MAX, group)
        summed, total_weights, *total_counts = sums.split(
            [len(tallies), len(tallies), *(counted.numel() for *_, counted in counts)]
        )
        combined = torch.where(is_max, torch.where(summed > 0, torch.nan, maxima), summed)
        for i, (tag, layer, tally) in enumerate(tallies):
            weight = total_weights[i] if isinstance(tally.weight, Tensor) else tally.weight
            self._tallies[tag][layer] = Tally(tally.kind, combined[i], weight)
        for (name, layer, counted), total in zip(counts, total_counts, strict=True):
            self._counts[name][layer] = _Counts(total.to(counted.dtype), self._counts[name][layer].size, None)


def parameters_of(optimizer: Optimizer) -> Iterable[tuple[Tensor, Mapping[str, Any]]]:
    """Yield every parameter of an optimizer with its param group."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            yield param, group


def _multiply_cosines(scalars: dict[str, float]) -> None:
    """Replace the two parts of each cosine by their product."""
    dot, ratio = COSINE_PARTS
    for tag in [tag for tag in scalars if tag.partition("/")[0] == dot]:
        end = tag.removeprefix(dot)
        scalars[COSINE + end] = scalars.pop(tag) * scalars.pop(ratio + end)


def _combine(kind: str, numbers: Iterable[tuple[float, float]]) -> float:
    if kind in ("max", "max_square"):
        # max() would hide a NaN that does not come first.
        largest = max((value for value, _ in numbers), key=lambda value: math.inf if math.isnan(value) else value)
        return largest * largest if kind == "max_square" else largest
    value, weight = (math.fsum(column) for column in zip(*numbers, strict=True))
    mean = 0.0 if weight <= 0 else value / weight  # NaN of a weight that is NaN
    return math.sqrt(max(mean, 0.0)) if kind == "rms" and not math.isnan(mean) else mean


def _transfer(tensors: list[Tensor]) -> Iterator[list[float]]:
    """Bring tensors to the host in one transfer; yields their values as lists."""
    if not tensors:
        return iter(())
    device = tensors[0].device
    dtype = sum_dtype(tensors[0])
    flat = torch.cat([tensor.to(device, dtype).reshape(-1) for tensor in tensors])
    numbers = iter(flat.cpu().tolist())
    return (list(islice(numbers, tensor.numel())) for tensor in tensors)
