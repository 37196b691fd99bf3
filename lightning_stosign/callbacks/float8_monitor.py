"""Float8Monitor: what FP8 does, or would do, to the operands of each linear layer."""

import math
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_stosign._lightning_names import is_a, under_both_names
from lightning_stosign._plain import plain
from lightning_stosign.callbacks._logging_gate import check_every_n_steps, record_step
from lightning_stosign.callbacks._records import log_records, put_into_callback_metrics
from lightning_stosign.precision._layers import is_plain_linear, names_of_modules
from lightning_stosign.precision._recipes import RECIPES, parse_recipe
from lightning_stosign.precision.operand_statistics import OperandRecord, OperandStatistics
from lightning_stosign.precision.operands import OPERANDS, OperandRounding, Operands, rounding_in_use

_HISTORY = 16  # records whose largest amax is the scale of a delayed recipe that is forecast

_DESCRIPTIONS = {
    "amax": "Largest magnitude.",
    "rms": "Root mean square.",
    "log2_range": "log2 of the largest over the smallest nonzero magnitude.",
    "stale_scale_fraction": "Share of calls whose amax was beyond what the delayed scale allows for.",
    "underflow_fraction": "Share of nonzero values that the recipe flushes to zero.",
    "overflow_fraction": "Share of values beyond the largest number of the recipe under their scale.",
    "quantization_error": "Relative error of the rounded operand, root mean square over its rows.",
    "product_error": "Relative error of the product against float32, root mean square over its rows.",
    "log10_abs": "Histogram of log10 of the nonzero magnitudes.",
}


@under_both_names
class Float8Monitor(Callback):
    """Logs what FP8 does to the operands of each linear layer, and which layers had better stay out of it.

    Works beside :class:`Float8Precision`, with every backend, and without it on a float32 or bfloat16 model as a
    forecast. Changes nothing: the weights are bit-identical with and without it. For each linear layer and each operand
    (``input``, ``weight``, ``output_gradient``) it logs:

    ====================================== =============================================================================
    ``amax/<operand>``, ``rms/<operand>``  largest magnitude, root mean square
    ``log2_range/<operand>``               log2 of the largest over the smallest nonzero magnitude
    ``underflow_fraction/<o>/<recipe>``    share of nonzero values that the recipe flushes to zero
    ``overflow_fraction/<o>/<recipe>``     share of values beyond the recipe's largest number under their scale
    ``quantization_error/<o>/<recipe>``    ``|q(t) - t| / |t|`` of a row (token; output feature of a weight), RMS over
                                           rows
    ``product_error/<product>/<recipe>``   the same of ``output``, ``input_gradient`` and ``weight_gradient`` against
                                           float32; every ``products_every_n_records``
    ``stale_scale_fraction/<operand>``     delayed scaling: share of calls whose amax was beyond the scale
    ``log10_abs/<operand>``                histogram of log10 of the nonzero magnitudes (TensorBoard, W&B)
    ====================================== =============================================================================

    The layer that is worst off is logged as ``float8/<tag>`` (largest value over layers), each layer as
    ``float8_<tag>/<layer>``: TensorBoard makes a group of what stands before the first slash. At the end of fit come a
    table of the layers (in the terminal, and under Text), and a heat map of layers by steps where matplotlib is there.

    The rounding is the emulation's, computed on the device; a record is one transfer to the host, and steps without a
    record cost nothing. Micro-batches and ranks are added up. Values are those that the layer gets: with float16
    weights the gradients are scaled. A row's error is relative to the row, so that one large token cannot hide what
    happens to the others. A delayed recipe's scales are Transformer Engine's own where it runs, else they are
    those of the 16 records before. Not seen: layers that TE has fused with a norm, layers compiled as part of a
    larger graph before the fit, and layers without a gradient.

    Args:
        forecast: Recipes to look at beside the one in use. Empty without Float8Precision: ``"current"``.
        every_n_steps: Record every n-th step. None: as ``Trainer(log_every_n_steps)``.
        products_every_n_records: Compute the errors of the products at the first record and every n-th after it.
        bound: The largest product error that the table at the end accepts. Normally distributed operands give 0.06
            (``"current"``: E5M2 gradients), 0.04 (``"rowwise"``, ``"mxfp8"``, ``"block"``), 0.18 (``"nvfp4"``) and 0.2
            (``"mxfp4"``).
        per_layer: Also log each layer.
        histograms: Also log histograms.

    Raises:
        ValueError: An argument is out of range; the model has no linear layer.
        TypeError: An argument is of the wrong type.

    Example:
        >>> monitor = Float8Monitor(forecast=["current", "mxfp8"], every_n_steps=10)
        >>> monitor.forecast
        ('current', 'mxfp8')
    """

    def __init__(
        self,
        forecast: Sequence[str] = (),
        every_n_steps: int | None = None,
        products_every_n_records: int = 5,
        bound: float = 0.1,
        per_layer: bool = True,
        histograms: bool = True,
    ) -> None:
        every_n_steps, products_every_n_records, bound = plain((every_n_steps, products_every_n_records, bound))
        per_layer, histograms = plain((per_layer, histograms))
        check_every_n_steps(every_n_steps)
        if isinstance(forecast, str) or not isinstance(forecast, Sequence):
            raise TypeError(f"forecast={forecast!r} must be a list of recipes")
        for recipe in forecast:
            if recipe not in RECIPES:
                raise ValueError(f"forecast={list(forecast)}: {recipe!r} is none of {list(RECIPES)}")
        if isinstance(products_every_n_records, bool) or not isinstance(products_every_n_records, int):
            raise TypeError(f"products_every_n_records={products_every_n_records!r} must be an int")
        if products_every_n_records < 1:
            raise ValueError(f"products_every_n_records={products_every_n_records} must be at least 1")
        self.forecast = tuple(forecast)
        self.every_n_steps = every_n_steps
        self.products_every_n_records = products_every_n_records
        self.bound = _checked_bound(bound)
        self.per_layer = per_layer
        self.histograms = histograms
        self._handles: list[RemovableHandle] = []
        self._statistics: OperandStatistics | None = None
        self._names: list[str] = []
        self._recipes: tuple[str, ...] = ()
        self._stepped = False
        self._forget()

    def _forget(self) -> None:
        self._records = 0
        self._in_use: str | None = None
        self._worst_products: dict[str, dict[str, float]] = {}  # by recipe and layer
        self._worst_operands: dict[str, dict[str, tuple[float, str]]] = {}  # with the operand's name
        self._heat: list[tuple[int, dict[str, float]]] = []
        self._amax_history: list[Tensor] = []

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Find the linear layers and the recipe in use."""
        # That module imports Lightning, whose import loads this one.
        from lightning_stosign.precision.float8 import Float8Precision

        plugin: Any = trainer.precision_plugin
        uses_float8 = is_a(plugin, Float8Precision)
        self._layers = {
            module: names[0]
            for module, names in names_of_modules(pl_module).items()
            if is_plain_linear(module) or (uses_float8 and _is_converted_linear(plugin, module))
        }
        if not self._layers:
            raise ValueError(f"Float8Monitor: {type(pl_module).__name__} has no nn.Linear to look at")
        self._names = list(self._layers.values())
        roundings = [OperandRounding(recipe) for recipe in self.forecast]
        self._in_use = None
        if uses_float8:
            used = rounding_in_use(parse_recipe(plugin.recipe))
            self._in_use = used.name
            roundings = [used, *(rounding for rounding in roundings if rounding.name != used.name)]
        elif not roundings:
            roundings = [OperandRounding("current")]
        self._roundings = list({rounding.name: rounding for rounding in roundings}.values())
        self._recipes = tuple(rounding.name for rounding in self._roundings)

    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Attach hooks, if this batch belongs to a step that is to be recorded."""
        self._step = record_step(trainer)
        every: int = trainer.log_every_n_steps if self.every_n_steps is None else self.every_n_steps  # type: ignore[attr-defined]
        if every < 1 or (self._step + 1) % every:
            return
        if self._statistics is None:
            self._statistics = OperandStatistics(
                len(self._layers),
                self._roundings,
                pl_module.device,
                products=self._records % self.products_every_n_records == 0,
                histograms=self.histograms,
            )
            self._amax = torch.zeros(len(self._layers), 3, device=pl_module.device)
            self._stepped = False
            past = [amax.to(pl_module.device) for amax in self._amax_history]
            self._past_amax = torch.stack(past).amax(0) if past else torch.zeros_like(self._amax)
        for number, layer in enumerate(self._layers):
            self._handles.append(layer.register_forward_hook(partial(self._after_forward, number)))

    def _after_forward(self, number: int, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Computed again under activation checkpointing, either this call has no graph or its output gets no gradient:
        # each token counts once.
        if not (isinstance(output, Tensor) and output.requires_grad and args and isinstance(args[0], Tensor)):
            return
        x, scales = args[0].detach(), _delayed_amax(layer, forward=True)

        def look(gradient: Tensor) -> None:
            self._look(number, layer, x, gradient.detach(), scales)

        output.register_hook(look)

    def _look(self, number: int, layer: nn.Module, x: Tensor, gradient: Tensor, scales: Tensor | None) -> None:
        if self._statistics is None or x.numel() == 0:
            return
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            amax = self._past_amax[number]
            if scales is not None:
                backward = _delayed_amax(layer, forward=False)
                amax = torch.cat([scales, amax[2:] if backward is None else backward])
            operands = Operands(_matrix(x), _weight(layer), _matrix(gradient))
            seen = self._statistics.add(number, operands, amax)
            self._amax[number] = torch.maximum(self._amax[number], seen)

    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Optimizer
    ) -> None:
        """Take note that all micro-batches of a step are through."""
        self._stepped = True

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remove the hooks; after the last micro-batch of a step, log its record."""
        self._detach()
        if self._statistics is None or not self._stepped:
            return
        statistics, self._statistics = self._statistics, None
        if trainer.world_size > 1:
            statistics.add_ranks()
            torch.distributed.all_reduce(self._amax, op=torch.distributed.ReduceOp.MAX)
        self._amax_history = [*self._amax_history, self._amax][-_HISTORY:]
        self._records += 1
        record = statistics.to_host()
        self._remember(record)
        scalars, counts, descriptions = self._tags(record)
        if trainer.is_global_zero:
            log_records(trainer.loggers, scalars, counts, self._step, descriptions)
        put_into_callback_metrics(trainer, scalars)

    def _tags(self, record: OperandRecord) -> tuple[dict[str, float], dict[str, list[float]], dict[str, str]]:
        scalars: dict[str, float] = {}
        per_layer: dict[str, float] = {}
        descriptions: dict[str, str] = {}
        for statistic, rest, values in record.tagged():
            scalars[f"float8/{statistic}/{rest}"] = float(np.nanmax(values))
            descriptions[f"float8/{statistic}/{rest}"] = f"{_DESCRIPTIONS[statistic]} Largest over the layers."
            for name, value in zip(self._names, values, strict=True):
                if self.per_layer and not np.isnan(value):
                    tag = f"float8_{statistic}/{rest}/{name}"
                    per_layer[tag], descriptions[tag] = float(value), _DESCRIPTIONS[statistic]
        histograms: dict[str, list[float]] = {}
        if self.histograms:
            for number, operand in enumerate(OPERANDS):
                histograms[f"float8/log10_abs/{operand}"] = record.magnitudes[:, number].sum(0).tolist()
                for place in np.flatnonzero(record.seen) if self.per_layer else ():
                    tag = f"float8_log10_abs/{operand}/{self._names[place]}"
                    histograms[tag] = record.magnitudes[place, number].tolist()
        return {**scalars, **per_layer}, histograms, descriptions

    def _remember(self, record: OperandRecord) -> None:
        """Keep the worst of each layer for the table, and the errors of the products for the heat map."""
        heat: dict[str, float] = {}
        for place, recipe in enumerate(self._recipes):
            products = self._worst_products.setdefault(recipe, {})
            operands = self._worst_operands.setdefault(recipe, {})
            for number in np.flatnonzero(record.seen):
                name = self._names[number]
                error = _largest(record.by_recipe["product_error"][number, :, place])
                if not math.isnan(error):
                    products[name] = max(error, products.get(name, 0.0))
                    heat.update({name: error} if place == 0 else {})
                errors = np.nan_to_num(record.by_recipe["quantization_error"][number, :, place], nan=0.0)
                worst = (float(errors.max()), OPERANDS[int(errors.argmax())])
                operands[name] = max(worst, operands.get(name, worst))
        if heat:
            self._heat.append((self._step, heat))

    def recommend(self, bound: float | None = None, recipe: str | None = None) -> dict[str, Any]:
        """Return arguments of Float8Precision with which every product error stayed under a bound in the records.

        Args:
            bound: The largest relative error of a product; None: the monitor's.
            recipe: The recipe to use. None: the one in use, or, without Float8Precision, the one among those forecast
                that excludes the fewest layers.

        Returns:
            ``{"recipe": ..., "exclude": [...]}``, the layers to exclude by name.

        Raises:
            RuntimeError: Nothing was recorded yet.
            ValueError: The recipe was not looked at.
        """
        bound = self.bound if bound is None else _checked_bound(bound)
        if not any(self._worst_products.values()):
            raise RuntimeError(
                "Float8Monitor has no record yet: recommend() needs a fit of at least every_n_steps steps"
            )
        excluded = {
            name: [layer for layer, error in errors.items() if not error <= bound]
            for name, errors in self._worst_products.items()
        }
        if recipe is None:
            recipe = self._in_use or min(excluded, key=lambda name: len(excluded[name]))
        if recipe not in excluded:
            raise ValueError(f"recipe={recipe!r} was not looked at, only {list(excluded)}")
        return {"recipe": recipe, "exclude": [_glob(layer) for layer in excluded[recipe]]}

    def table(self, bound: float | None = None) -> list[dict[str, Any]]:
        """Return the layers whose products are beyond a bound in the first recipe, the worst first.

        Args:
            bound: As for :meth:`recommend`.

        Returns:
            Per layer ``layer``, ``operand`` (that with the largest error), ``product_error`` and ``needs``: the first
            recipe looked at that keeps to the bound, or ``"bfloat16"``.
        """
        bound = self.bound if bound is None else _checked_bound(bound)
        if not self._worst_products:
            return []
        first = next(iter(self._worst_products))
        rows = [
            {
                "layer": layer,
                "operand": self._worst_operands[first][layer][1],
                "product_error": error,
                "needs": next(
                    (recipe for recipe, errors in self._worst_products.items() if errors.get(layer, math.inf) <= bound),
                    "bfloat16",
                ),
            }
            for layer, error in self._worst_products[first].items()
            if not error <= bound
        ]
        return sorted(rows, key=lambda row: -row["product_error"])

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Print the table, and log it with the heat map."""
        if not self._heat:
            return
        first = next(iter(self._worst_products))
        rows = self.table()
        lines = [f"| layer | worst operand | product error in {first} | needs |", "| --- | --- | --- | --- |"]
        lines += [f"| {r['layer']} | {r['operand']} | {r['product_error']:.3g} | {r['needs']} |" for r in rows]
        if not rows:
            lines = [
                f"Float8Monitor: the products of all {len(self._names)} layers stay within {self.bound} in {first}."
            ]
        rank_zero_info("\n".join(lines))
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if is_a(logger, TensorBoardLogger):
                logger.experiment.add_text("float8/layers", "\n".join(lines), self._step)
                if find_spec("matplotlib"):
                    pixels = self._heat_map(first)
                    logger.experiment.add_image("float8/product_error_by_layer", pixels, self._step, dataformats="HWC")

    def _heat_map(self, recipe: str) -> Any:
        from lightning_stosign.inspection.figures import as_pixels, heat_map

        names = list(self._worst_products[recipe])
        table = np.array([[errors.get(name, np.nan) for _, errors in self._heat] for name in names])
        steps = [str(step) for step, _ in self._heat]
        return as_pixels(heat_map(np.minimum(table, 1), names, steps, f"largest product error in {recipe}", "step"))

    def state_dict(self) -> dict[str, Any]:
        """Return the worst errors so far, which a resumed run goes on from."""
        return {
            "records": self._records,
            "products": self._worst_products,
            "operands": self._worst_operands,
            "heat": self._heat,
            "amax": self._amax_history,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._records = state_dict["records"]
        self._worst_products, self._worst_operands = state_dict["products"], state_dict["operands"]
        self._heat, self._amax_history = state_dict["heat"], state_dict["amax"]

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Let go of the layers."""
        self._detach()
        self._statistics = None
        self._layers = {}

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Let go of the layers: Lightning calls no teardown after an exception."""
        self.teardown(trainer, pl_module, "fit")


def _is_converted_linear(plugin: Any, module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and plugin._backend.holds_converted(module)


def _delayed_amax(layer: nn.Module, forward: bool) -> Tensor | None:
    """Return the largest magnitudes that Transformer Engine's delayed scales allow for; None without such scales.

    Args:
        layer: The layer.
        forward: Of the input and the weight, else of the gradient of the output.
    """
    layer = getattr(layer, "inner", layer)
    state: Any = getattr(layer, "fp8_meta", {}).get("scaling_fwd" if forward else "scaling_bwd")
    if state is None or not hasattr(state, "amax_history"):
        return None
    largest = torch.finfo(torch.float8_e4m3fn if forward else torch.float8_e5m2).max
    return largest / state.scale[: 2 if forward else 1].float()


def _weight(layer: nn.Module) -> Tensor:
    weight: Any = layer.weight.detach()  # type: ignore[operator]
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
    if hasattr(weight, "dequantize") and type(weight) not in (Tensor, nn.Parameter):
        weight = weight.dequantize()
    return weight.float()


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1]).float()


def _largest(values: NDArray[np.float64]) -> float:
    return float("nan") if np.isnan(values).all() else float(np.nanmax(values))


def _glob(name: str) -> str:
    """Return a glob that matches the name and nothing else: names of modules may hold brackets."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _checked_bound(bound: float) -> float:
    if isinstance(bound, bool) or not isinstance(bound, (int, float)):
        raise TypeError(f"bound={bound!r} must be a number")
    if not bound > 0:
        raise ValueError(f"bound={bound} must be above 0")
    return float(bound)
