"""Statistics of the operands of linear layers, added up on the device over layers, micro-batches and ranks."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_stosign.health.magnitudes import histogram_of, log10_bin_edges, magnitude_counts
from lightning_stosign.precision.operands import OPERANDS, PRODUCTS, OperandRounding, Operands

_BINS = len(log10_bin_edges()) - 1


class OperandStatistics:
    """One record of some layers.

    Args:
        layers: How many layers.
        roundings: The recipes.
        device: Where the layers compute.
        products: Also compute the errors of the products.
        histograms: Also count magnitudes.
    """

    def __init__(
        self, layers: int, roundings: Sequence[OperandRounding], device: torch.device, products: bool, histograms: bool
    ) -> None:
        self.roundings, self.products, self.histograms = roundings, products, histograms
        recipes = len(roundings)
        self._shapes = {
            "moments": (layers, 3, 3),  # values, nonzero ones, sum of squares
            "roundings": (layers, 3, recipes, 4),  # flushed, saturated, squared errors of rows, rows
            "products": (layers, 3, recipes, 2),  # squared errors of rows, rows
            "stale": (layers, 3, 2),  # times that amax was beyond the delayed scale, times looked
            "magnitudes": (layers, 3, _BINS if histograms else 0),
        }
        dtype = torch.float32 if device.type == "mps" else torch.float64
        sizes = [int(np.prod(shape)) for shape in self._shapes.values()]
        self._sums = torch.zeros(sum(sizes), dtype=dtype, device=device)
        parts = zip(self._shapes.items(), self._sums.split(sizes), strict=True)
        self._views = {name: part.view(shape) for (name, shape), part in parts}
        self._peaks = torch.full((layers, 3, 2), -torch.inf, dtype=dtype, device=device)  # amax, -smallest nonzero

    @torch.no_grad()
    def add(self, layer: int, operands: Operands, delayed_amax: Tensor) -> Tensor:
        """Add one call of a layer.

        Args:
            layer: Its number.
            operands: Its operands.
            delayed_amax: The largest magnitudes that its delayed scales allow for, float32, ``[3]``; 0 where there
                is no scale yet.

        Returns:
            The largest magnitudes, float32, ``[3]``.
        """
        dtype = self._sums.dtype
        amax = torch.stack([values.abs().amax() for values in operands])
        smallest = [torch.where(values == 0, torch.inf, values.abs()).amin() for values in operands]
        peaks = torch.stack([amax, -torch.stack(smallest)], dim=1).to(dtype)
        self._peaks[layer] = torch.maximum(self._peaks[layer], peaks)
        for number, values in enumerate(operands):
            nonzero = values.count_nonzero()
            self._views["moments"][layer, number] += torch.stack(
                [torch.full_like(nonzero, values.numel()).to(dtype), nonzero.to(dtype), _square_sum(values, dtype)]
            )
            if self.histograms:
                self._views["magnitudes"][layer, number] += histogram_of(magnitude_counts(values)).to(dtype)
        has_scale = delayed_amax > 0
        stale = torch.stack([(amax > delayed_amax) & has_scale, has_scale], dim=1)
        self._views["stale"][layer] += stale.to(dtype)
        delayed_amax = torch.where(has_scale, delayed_amax, amax)
        exact = [left @ right for left, right in operands.factors()] if self.products else []
        for place, rounding in enumerate(self.roundings):
            rounded, saturated = rounding.operands(operands, delayed_amax)
            for number, (values, result) in enumerate(zip(operands, rounded, strict=True)):
                flushed = ((values != 0) & (result == 0)).sum()
                counts = torch.stack([flushed, saturated[number]]).to(dtype)
                self._views["roundings"][layer, number, place] += torch.cat(
                    [counts, _row_errors(values, result, dtype)]
                )
            for number, product in enumerate(exact):
                left, right = rounding.factors(operands, rounded)[number]
                self._views["products"][layer, number, place] += _row_errors(product, left @ right, dtype)
        return amax

    def add_ranks(self) -> None:
        """Add up the records of all ranks, which have looked at the same layers; two collectives."""
        torch.distributed.all_reduce(self._sums)
        torch.distributed.all_reduce(self._peaks, op=torch.distributed.ReduceOp.MAX)

    def to_host(self) -> "OperandRecord":
        """Bring the record to the host in one transfer."""
        every = torch.cat([self._sums, self._peaks.flatten()]).cpu().double().numpy()
        sizes = [int(np.prod(shape)) for shape in self._shapes.values()]
        *parts, peaks = np.split(every, np.cumsum(sizes))
        arrays = {name: part.reshape(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}
        return OperandRecord([rounding.name for rounding in self.roundings], arrays, peaks.reshape(-1, 3, 2))


class OperandRecord:
    """One record on the host; NaN where a layer did not compute.

    Attributes:
        plain: ``{statistic: [layers, 3 operands]}``.
        by_recipe: ``{statistic: [layers, 3 operands or products, recipes]}``.
        magnitudes: Counts for :func:`log10_bin_edges`, ``[layers, 3, bins or 0]``.
        seen: Which layers computed, ``[layers]``.
    """

    def __init__(
        self, recipes: Sequence[str], sums: dict[str, NDArray[np.float64]], peaks: NDArray[np.float64]
    ) -> None:
        values, nonzero, squares = np.moveaxis(sums["moments"], -1, 0)
        self.recipes, self.magnitudes = tuple(recipes), sums["magnitudes"]
        self.seen = values[:, 0] > 0
        with np.errstate(divide="ignore", invalid="ignore"):
            amax, smallest = peaks[..., 0], -peaks[..., 1]
            self.plain = {
                "amax": np.where(values > 0, amax, np.nan),
                "rms": np.sqrt(squares / values),
                "log2_range": np.where(nonzero > 0, np.log2(amax / smallest), np.nan),
                "stale_scale_fraction": sums["stale"][..., 0] / sums["stale"][..., 1],
            }
            flushed, saturated, errors, rows = np.moveaxis(sums["roundings"], -1, 0)
            product_errors, product_rows = np.moveaxis(sums["products"], -1, 0)
            self.by_recipe = {
                "underflow_fraction": flushed / nonzero[..., None],
                "overflow_fraction": saturated / values[..., None],
                "quantization_error": np.sqrt(errors / rows),
                "product_error": np.sqrt(product_errors / product_rows),
            }

    def tagged(self) -> "list[tuple[str, str, NDArray[np.float64]]]":
        """Return ``(statistic, "<operand>[/<recipe>]", [layers])`` of all that was looked at."""
        found = []
        for statistic, table in self.plain.items():
            found += [(statistic, operand, table[:, number]) for number, operand in enumerate(OPERANDS)]
        for statistic, cube in self.by_recipe.items():
            whats = PRODUCTS if statistic == "product_error" else OPERANDS
            for number, what in enumerate(whats):
                found += [
                    (statistic, f"{what}/{recipe}", cube[:, number, place]) for place, recipe in enumerate(self.recipes)
                ]
        return [entry for entry in found if not np.isnan(entry[2]).all()]


def _square_sum(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype).square().sum()


def _row_errors(exact: Tensor, result: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum over rows of ``|result - exact|^2 / |exact|^2``, and the number of rows that are not 0."""
    exact = exact.to(dtype)
    size = exact.square().sum(1)
    error = (result.to(dtype) - exact).square().sum(1)
    return torch.stack([torch.where(size > 0, error / size, 0).sum(), (size > 0).sum().to(dtype)])
