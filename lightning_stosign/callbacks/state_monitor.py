"""OptimizerStateMonitor: logs the health of every optimizer's state."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_stosign._lightning_names import is_a, under_both_names
from lightning_stosign._plain import plain
from lightning_stosign._tags import description, full_tags, warn_of_old_tags
from lightning_stosign.callbacks._logging_gate import OwnSteps, check_every_n_steps, record_step
from lightning_stosign.callbacks._records import log_records, put_into_callback_metrics
from lightning_stosign.callbacks._zero_history import optimizer_label
from lightning_stosign.health.forecast import check_format
from lightning_stosign.health.readers import read_moments
from lightning_stosign.health.snapshot import Snapshot, parameters_of
from lightning_stosign.health.steps import UPDATE_STATISTICS

_MOST_LAYERS = 64  # that depth=None shows one by one: each is about 27 tags


class _Begun(NamedTuple):
    """What on_before_optimizer_step saw of a step that is to be recorded, and the parameters as they were."""

    number: int
    snapshot: Snapshot
    before: dict[Tensor, Tensor]


@under_both_names
class OptimizerStateMonitor(Callback):
    """Logs what is in an optimizer's state: zeros, magnitudes, what FP8 would lose, and the step really taken.

    Works with this package's optimizers, every ``torch.optim`` optimizer, torchao's, Transformer Engine's, bitsandbytes'
    and pytorch_optimizer's, and any other for its floating-point states
    (:func:`lightning_stosign.health.register_update_rule` teaches it what such a one divides by what). Changes nothing:
    trained weights are bit-identical with and without it. Logs, under ``optimizer_state/``:

    ============================================ =======================================================================
    ``zero_fraction/<state>``                    share of entries equal to 0
    ``abs_max/<state>``, ``rms/<state>``         largest magnitude, root mean square
    ``underflow_fraction/<state>/<format>``      share of nonzero entries that the format would store as 0
    ``stalled_fraction/<state>/<format>``        share of entries whose next change the format would lose
    ``dead_fraction``                            share with numerator 0 and denominator 0: they cannot move
    ``exploding_fraction``                       share with denominator 0 and numerator not: Adam's quotient explodes
    ``update_rms``                               RMS of the step taken, without weight decay, divided by lr
    ``noise_rms``, ``sign_agreement``            stochastic sign: sqrt(mean(1 - u^2)), mean of (1 + abs(u)) / 2
    ``grad_abs_max``, ``grad_square_max``        largest magnitude of the gradient before clipping, and its square
    ``grad_rms``                                 RMS of the gradient before clipping
    ``parameter_rms``                            RMS of the parameters after the step
    ``update_to_weight``                         RMS of the step taken, decay included, over RMS of the parameters before it
    ``lost_update_fraction``                     share of the coordinates that should move and are as before: the step is
                                                 below half the spacing of the parameter's dtype (or was skipped)
    ``update_grad_cosine``                       cosine between the step taken and the descent direction, minus gradient
    ``step_size``                                the step size that a self-tuning optimizer found
    ``log10_quantile/<state>/<quantile>``        quantile of log10 of the nonzero magnitudes, to within 0.003
    ``log10_abs/<state>``                        histogram of log10 of the nonzero magnitudes (TensorBoard, W&B)
    ============================================ =======================================================================

    each over all layers and, with ``per_layer``, for each as ``per_layer_<tag>/<parameter name>``: TensorBoard makes a
    group of what stands before the first slash, ``optimizer_state`` for all layers and one per statistic for the single
    ones. With several optimizers ``<number>-<class>/`` follows the first slash. States are read after the update. A change is what the optimizer's formula adds for a gradient like the last one. Parameters that FSDP2 has
    sharded are read where they lie, and the numbers are those of the whole model; the ranks of replicas have the same
    states, so that one of them is read. Recording a step costs a copy of the parameters, a few passes over the states,
    and one transfer to the host; a step that is not recorded costs nothing. ``update_rms`` of bfloat16 and float16
    parameters includes their rounding; it is 0 for a step that the optimizer skipped.

    Every scalar is in ``trainer.callback_metrics`` too, on all ranks: ``EarlyStopping`` and ``ModelCheckpoint`` can
    watch it from the first record on.

    Args:
        every_n_steps: record every n-th step of each optimizer. None: as ``Trainer(log_every_n_steps)``.
        per_layer: also record each parameter.
        histograms: also record histograms.
        forecast: formats for ``underflow_fraction`` and ``stalled_fraction``, by :class:`StatePrecision` name, e.g.
            ``"fp8-raw:static_scale=1024"``, ``"fp8-block:dtype=float8_e5m2"``, ``"bfloat16"``, or ``"fp4-block"``: four
            bits in blocks of 16, NVFP4's way.
        layers: globs on parameter names: look only at those that match one. None: at all.
        depth: take the records of layers together by the first so many parts of their names: for
            ``model.blocks.0.attention.q.weight``, 3 gives ``<tag>/model.blocks.0``. None: each parameter by itself if
            there are at most 64 of them, else the largest depth that gives at most 64 groups (or no layers if none
            does), which is said once. With the depth of the longest name each parameter is by itself.
        quantiles: for ``log10_quantile``, each in [0, 1]; none if empty.
        updates: which of ``update_to_weight``, ``parameter_rms``, ``lost_update_fraction``, ``update_grad_cosine`` and
            ``grad_rms`` to record; none if empty.
        old_tags: deprecated, for dashboards made for version 0.1: log layers as ``optimizer_state/<tag>/<name>``.

    Raises:
        ValueError: an argument is out of range; the Trainer has no logger; ``layers`` matches no parameter; the
            Trainer's strategy is FSDP (the first) or DeepSpeed, which hide the shards.
        TypeError: an argument is of the wrong type.

    Example::

        trainer = Trainer(callbacks=[OptimizerStateMonitor()], logger=TensorBoardLogger("runs"))

    Source:
        arXiv 2604.15416, Table 12 and Figures 3 and 4; for stalls arXiv 2603.16731.
    """  # noqa: E501

    def __init__(
        self,
        every_n_steps: int | None = None,
        per_layer: bool = True,
        histograms: bool = True,
        forecast: Sequence[str] = ("fp8", "fp8-raw"),
        layers: Sequence[str] | None = None,
        depth: int | None = None,
        quantiles: Sequence[float] = (0.05, 0.5, 0.95),
        old_tags: bool = False,
        updates: Sequence[str] = UPDATE_STATISTICS,
    ) -> None:
        every_n_steps, depth, per_layer, histograms = plain((every_n_steps, depth, per_layer, histograms))
        quantiles = plain(quantiles)
        check_every_n_steps(every_n_steps)
        for name, value in (("forecast", forecast), ("layers", layers), ("updates", updates)):
            optional = name == "layers" and value is None
            if isinstance(value, str) or not (isinstance(value, Sequence) or optional):
                raise TypeError(f"{name}={value!r} must be a list of strings")
        for format_name in forecast:
            check_format(format_name)
        accepted = ", ".join(map(repr, UPDATE_STATISTICS))
        for update in updates:
            if update not in UPDATE_STATISTICS:
                raise ValueError(f"updates={list(updates)}: {update!r} is unknown; accepted: {accepted}")
        _check_depth(depth)
        _check_quantiles(quantiles)
        self.every_n_steps = every_n_steps
        self.per_layer = per_layer
        self.histograms = histograms
        self.forecast = tuple(forecast)
        self.layers = None if layers is None else tuple(layers)
        self.depth = depth
        self.quantiles = tuple(quantiles)
        self.updates = tuple(updates)
        self.old_tags = old_tags
        if old_tags:
            warn_of_old_tags("OptimizerStateMonitor")
        self._names: dict[Tensor, str] = {}
        self._handles: list[RemovableHandle] = []
        self._begun: dict[Optimizer, _Begun] = {}
        self._kept: dict[Optimizer, dict[Tensor, Tensor]] = {}
        self._steps = OwnSteps()
        self._described: set[str] = set()

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Check that there is a logger to write to, and a strategy whose states can be read."""
        if stage != "fit":
            return
        self._described.clear()
        if not trainer.loggers:
            raise ValueError(
                "OptimizerStateMonitor needs a logger to write to, but the Trainer has logger=False; "
                "accepted: Trainer(logger=TensorBoardLogger(...)) or any other Lightning logger"
            )
        if is_a(trainer.strategy, FSDPStrategy) or is_a(trainer.strategy, DeepSpeedStrategy):
            raise ValueError(
                f"OptimizerStateMonitor cannot read the shards of {type(trainer.strategy).__name__}; "
                "accepted: ModelParallelStrategy (FSDP2), DDPStrategy, a single device"
            )

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Watch the trainer's optimizers."""
        self._names = {
            param: name
            for name, param in pl_module.named_parameters()
            if self.layers is None or any(fnmatchcase(name, pattern) for pattern in self.layers)
        }
        if not self._names:
            raise ValueError(f"layers={list(self.layers or [])} matches no parameter of {type(pl_module).__name__}")
        self._shows_layers, self._depth = self._shown_layers()
        is_sharded = any(isinstance(param, DTensor) for param in self._names)
        self._reads = trainer.is_global_zero or is_sharded  # replicas have the same states
        self._tells = trainer.world_size > 1 and not is_sharded
        for optimizer in trainer.optimizers:
            self._steps.watch(optimizer)

            def begin(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
                self._keep_parameters(trainer, optimizer)

            def finish(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
                self._finish(trainer, optimizer)

            self._handles.append(optimizer.register_step_pre_hook(begin))
            self._handles.append(optimizer.register_step_post_hook(finish))

    def _keep_parameters(self, trainer: "pl.Trainer", optimizer: Optimizer) -> None:
        """Copy the parameters before a step that is due, and before its closure, which may move them (ALIAS)."""
        if self._reads and optimizer not in self._begun and self._steps.is_due(trainer, optimizer, self.every_n_steps):
            self._kept[optimizer] = {param: param.detach().clone() for _, param, _ in self._watched(optimizer)}

    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Optimizer
    ) -> None:
        """Of a step that is to be recorded, look at the gradients and keep the parameters as they are before it."""
        if not self._handles or not self._reads:
            return
        number = self._steps.number(trainer, optimizer)
        if optimizer in self._begun:
            if self._begun[optimizer].number == number:
                return  # a closure may be evaluated several times a step: the first time sees the parameters before it
            del self._begun[optimizer]  # of a step that AMP skipped
        if not self._steps.is_due(trainer, optimizer, self.every_n_steps):
            return
        snapshot = Snapshot(self.forecast, self.histograms, self.quantiles, self.updates)
        scale = _remaining_loss_scale(trainer, optimizer)
        kept = self._kept.pop(optimizer, {})  # nothing where a GradScaler calls this before the step
        before = {}
        for name, param, _ in self._watched(optimizer):
            if param.grad is not None and param.numel() > 0:
                snapshot.add_gradient(name, param.grad, scale)
                before[param] = kept[param] if param in kept else param.detach().clone()
        self._begun[optimizer] = _Begun(number, snapshot, before)

    def _finish(self, trainer: "pl.Trainer", optimizer: Optimizer) -> None:
        """After the update, add the states and the step taken, and log. Not called for a step that AMP skips."""
        is_due = self._steps.is_due(trainer, optimizer, self.every_n_steps)
        self._steps.advance(optimizer)
        scalars: dict[str, float] = {}
        if optimizer in self._begun:
            scalars, histograms = self._records(optimizer)
            label = optimizer_label(trainer.optimizers, optimizer)
            names = full_tags([*scalars, *histograms], optimizer=label, old=self.old_tags)
            scalars = {names[tag]: value for tag, value in scalars.items()}
            if trainer.is_global_zero:
                counts = {names[tag]: numbers for tag, numbers in histograms.items()}
                new = {name: description(tag) for tag, name in names.items() if name not in self._described}
                self._described.update(new)
                log_records(trainer.loggers, scalars, counts, record_step(trainer), new)
        if is_due and self._tells:
            scalars = trainer.strategy.broadcast(scalars)
        if scalars:
            put_into_callback_metrics(trainer, scalars)

    def _records(self, optimizer: Optimizer) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Return scalars and histograms of a step that was begun."""
        _, snapshot, before = self._begun.pop(optimizer)
        for name, param, group in self._watched(optimizer):
            moments = read_moments(optimizer, param, group)
            snapshot.add_states(name, moments)
            if param in before and "lr" in group:  # a parameter-free optimizer has none
                old, new = before.pop(param), param.detach()
                snapshot.add_update(name, old, new, group["lr"], moments.decoupled_weight_decay)
                if isinstance(group["lr"], Tensor) or group["lr"] != 0:  # at a rate of 0 no step is lost
                    snapshot.add_step(name, old, new, param.grad, moments.numerator)
        return snapshot.records(self._shows_layers, self._depth)

    def _shown_layers(self) -> tuple[bool, int | None]:
        """Return whether layers are logged and by which depth: as the user says, or so that the tags stay few."""
        parts = [name.split(".") for name in self._names.values()]
        if self.depth is not None or not self.per_layer or len(parts) <= _MOST_LAYERS:
            return self.per_layer, self.depth
        deepest = max(map(len, parts))
        groups = {depth: len({tuple(part[:depth]) for part in parts}) for depth in range(1, deepest + 1)}
        depth = max((depth for depth, number in groups.items() if number <= _MOST_LAYERS), default=None)
        how = "not logged by layer" if depth is None else f"logged in {groups[depth]} groups, as with depth={depth}"
        rank_zero_info(
            f"OptimizerStateMonitor: {len(parts)} parameters are {how}, to keep the tags few. "
            f"OptimizerStateMonitor(depth={deepest}) logs each by itself."
        )
        return depth is not None, depth

    def _watched(self, optimizer: Optimizer) -> Iterable[tuple[str, Tensor, Mapping[str, Any]]]:
        for param, group in parameters_of(optimizer):
            if param in self._names:
                yield self._names[param], param, group

    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Let go of the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._begun.clear()
        self._kept.clear()
        self._steps.clear()
        self._names.clear()

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Let go of the optimizers: Lightning calls no teardown after an exception."""
        self.teardown(trainer, pl_module, "fit")


def _remaining_loss_scale(trainer: "pl.Trainer", optimizer: Optimizer) -> Tensor | None:
    """Return the scale that gradients still have where a fused optimizer unscales them itself, on their device."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return None
    # The public get_scale() waits for the device.
    return scaler._scale


def _check_depth(depth: Any) -> None:
    if depth is None:
        return
    if isinstance(depth, bool) or not isinstance(depth, int):
        raise TypeError(f"depth={depth!r} must be an int or None")
    if depth < 1:
        raise ValueError(f"depth={depth} must be at least 1, or None for each parameter by itself")


def _check_quantiles(quantiles: Any) -> None:
    if isinstance(quantiles, str) or not isinstance(quantiles, Sequence):
        raise TypeError(f"quantiles={quantiles!r} must be a list of numbers")
    for quantile in quantiles:
        if isinstance(quantile, bool) or not isinstance(quantile, (int, float)):
            raise TypeError(f"quantiles={quantiles!r} must be a list of numbers")
        if not 0 <= quantile <= 1:
            raise ValueError(f"quantiles={quantiles!r}: each must be in [0, 1]")
