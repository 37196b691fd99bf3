"""OptimizerDashboard: figures of the optimizer states, layer by layer and over time."""

from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor
from torch.distributed import all_reduce
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_stosign._lightning_names import is_a, under_both_names
from lightning_stosign._plain import plain
from lightning_stosign._tags import PREFIX
from lightning_stosign.callbacks._logging_gate import OwnSteps, check_every_n_steps, record_step
from lightning_stosign.callbacks._saved_state import state_of_only_one
from lightning_stosign.callbacks._scalars_layout import scalars_layout
from lightning_stosign.callbacks._zero_history import ZeroHistory, optimizer_label
from lightning_stosign.health.magnitudes import histogram_of, magnitude_counts
from lightning_stosign.health.readers import Moments, read_moments
from lightning_stosign.health.snapshot import parameters_of
from lightning_stosign.health.statistics import count
from lightning_stosign.inspection.figures import as_pixels, heat_map, magnitudes, require_matplotlib


class _Distribution(NamedTuple):
    """Of one state over all layers: the histogram of its magnitudes, and its share of zeros."""

    histogram: list[float]
    zeros: float


@under_both_names
class OptimizerDashboard(Callback):
    """Draws what becomes of the optimizer states: which layers lose their values, and how large the others are.

    At the end of ``fit``, and every ``draw_every_n_steps``, writes under ``optimizer_state/`` (with several optimizers
    ``optimizer_state/<number>-<class>/``) the images

    * ``zeros_by_layer/<state>``: a heat map of the share of zeros, a row for each layer, a column for each record;
    * ``magnitudes``: how log10 of the magnitudes is distributed in each state, as in the paper's Figure 3;

    and once, for TensorBoard's custom scalars page (``http://localhost:6006/#custom_scalars``), panels of what
    :class:`OptimizerStateMonitor` logs, in which runs with AdamW and with StoSignSGD lie over each other. A run that an
    exception ends is drawn too.

    Changes nothing in the training. A step that is recorded costs a pass over the states on the device, a figure its
    transfer and about a second of the host's time, any other step nothing. The record is part of checkpoints, so that
    a resumed run's heat map begins where the first began.

    Args:
        every_n_steps: record the shares of zeros every n-th optimizer step. None: as ``Trainer(log_every_n_steps)``.
        draw_every_n_steps: also draw every n-th optimizer step. None: only at the end.

    Raises:
        ValueError: an argument is out of range; the Trainer has no logger that takes images; its strategy hides the
            states.
        TypeError: an argument is of the wrong type.
        ModuleNotFoundError: matplotlib is not installed.

    Example::

        trainer = Trainer(callbacks=[OptimizerStateMonitor(), OptimizerDashboard()], logger=TensorBoardLogger("runs"))

    Source:
        arXiv 2604.15416, Figure 3 and Table 12.
    """

    def __init__(self, every_n_steps: int | None = None, draw_every_n_steps: int | None = None) -> None:
        every_n_steps, draw_every_n_steps = plain((every_n_steps, draw_every_n_steps))
        check_every_n_steps(every_n_steps)
        if draw_every_n_steps is not None:
            if isinstance(draw_every_n_steps, bool) or not isinstance(draw_every_n_steps, int):
                raise TypeError(f"draw_every_n_steps={draw_every_n_steps!r} must be an int or None")
            if draw_every_n_steps < 1:
                raise ValueError(
                    f"draw_every_n_steps={draw_every_n_steps} must be at least 1, or None for the end only"
                )
        require_matplotlib()
        self.every_n_steps = every_n_steps
        self.draw_every_n_steps = draw_every_n_steps
        self._histories: dict[str, ZeroHistory] = {}
        self._names: dict[Tensor, str] = {}
        self._handles: list[RemovableHandle] = []
        self._steps = OwnSteps()

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Check that there is a logger that takes images, and a strategy whose states can be read; start anew."""
        if stage != "fit":
            return
        if not any(map(_takes_images, trainer.loggers)):
            present = [type(logger).__name__ for logger in trainer.loggers] or "logger=False"
            raise ValueError(
                f"OptimizerDashboard needs a logger that takes images, but the Trainer has {present}; accepted: "
                "TensorBoardLogger, WandbLogger or another logger with log_image()"
            )
        if is_a(trainer.strategy, FSDPStrategy) or is_a(trainer.strategy, DeepSpeedStrategy):
            raise ValueError(
                f"OptimizerDashboard cannot read the shards of {type(trainer.strategy).__name__}; "
                "accepted: ModelParallelStrategy (FSDP2), DDPStrategy, a single device"
            )
        self._histories.clear()

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Watch the trainer's optimizers, and lay out the custom scalars page."""
        self._names = {param: name for name, param in pl_module.named_parameters()}
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                if is_a(logger, TensorBoardLogger):
                    logger.experiment.add_custom_scalars(scalars_layout())
        if not (trainer.is_global_zero or self._is_sharded()):
            return  # replicas have the same states
        for optimizer in trainer.optimizers:
            self._steps.watch(optimizer)

            def look(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
                if self._steps.is_due(trainer, optimizer, self.every_n_steps):
                    self._record(trainer, optimizer, record_step(trainer))
                drawing = self.draw_every_n_steps
                if drawing is not None and self._steps.is_due(trainer, optimizer, drawing):
                    self._draw(trainer, optimizer, record_step(trainer))
                self._steps.advance(optimizer)

            self._handles.append(optimizer.register_step_post_hook(look))

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Draw the end."""
        self._draw_the_end(trainer)

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Draw the end of a run that has failed, unless that takes ranks that may have failed too."""
        if not self._is_sharded():
            self._draw_the_end(trainer)
        self.teardown(trainer, pl_module, "fit")

    def _draw_the_end(self, trainer: "pl.Trainer") -> None:
        step = record_step(trainer) - 1  # it has moved on after the last step
        if not self._handles or step < 0:
            return
        for optimizer in trainer.optimizers:
            if self._history(trainer, optimizer).last_step != step:
                self._record(trainer, optimizer, step, keep=True)
            self._draw(trainer, optimizer, step)

    def _record(self, trainer: "pl.Trainer", optimizer: Optimizer, step: int, keep: bool = False) -> None:
        values = {
            (state, layer): (value, moments.layout(state))
            for layer, moments in self._moments(optimizer)
            for state, value in moments.states.items()
        }
        self._history(trainer, optimizer).add(step, values, keep)

    def _draw(self, trainer: "pl.Trainer", optimizer: Optimizer, step: int) -> None:
        distributions = self._distributions(optimizer)
        if not (trainer.is_global_zero and distributions):
            return
        prefix = f"{PREFIX}/{optimizer_label(trainer.optimizers, optimizer)}"
        title = f"{type(optimizer).__name__}, step {step}"
        images = {
            f"{prefix}magnitudes": magnitudes(
                {state: distribution.histogram for state, distribution in distributions.items()},
                {state: distribution.zeros for state, distribution in distributions.items()},
                f"{title}: magnitudes of the states, all layers",
            )
        }
        history = self._history(trainer, optimizer)
        for state in distributions:
            shares, layers, steps = history.table(state)
            if not steps:
                continue
            images[f"{prefix}zeros_by_layer/{state}"] = heat_map(
                shares, layers, list(map(str, steps)), f"{title}: share of zeros in {state}", "step"
            )
        for logger in filter(_takes_images, trainer.loggers):
            for tag, figure in images.items():
                _log_image(logger, tag, as_pixels(figure), step)

    def _distributions(self, optimizer: Optimizer) -> dict[str, _Distribution]:
        """Count the magnitudes of each state over all layers and ranks."""
        counts: dict[str, Tensor] = {}
        for _, moments in self._moments(optimizer):
            for state, value in moments.states.items():
                layout = moments.layout(state)
                # the number of zeros behind the counts of the magnitudes, to be added with them
                zeros = (value.numel() - count(value)).long().reshape(1)
                counted = torch.cat([magnitude_counts(value), zeros])
                if layout.group is not None:
                    all_reduce(counted, group=layout.group)
                counts[state] = counts[state] + counted.to(counts[state].device) if state in counts else counted
        return {
            state: _Distribution(histogram_of(counted[:-1]).tolist(), (counted[-1] / counted.sum().clamp(min=1)).item())
            for state, counted in counts.items()
        }

    def _moments(self, optimizer: Optimizer) -> list[tuple[str, Moments]]:
        return [
            (self._names[param], read_moments(optimizer, param, group))
            for param, group in parameters_of(optimizer)
            if param in self._names
        ]

    def _history(self, trainer: "pl.Trainer", optimizer: Optimizer) -> ZeroHistory:
        return self._histories.setdefault(optimizer_label(trainer.optimizers, optimizer), ZeroHistory())

    def _is_sharded(self) -> bool:
        return any(isinstance(param, DTensor) for param in self._names)

    @property
    def state_key(self) -> str:
        """The name of this dashboard's state in checkpoints: several may stand side by side."""
        return self._generate_state_key(every_n_steps=self.every_n_steps, draw_every_n_steps=self.draw_every_n_steps)

    def on_load_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        """Take over the state of the one dashboard in a checkpoint whose options were other ones."""
        saved = state_of_only_one(self, checkpoint)
        if saved is not None:
            self.load_state_dict(saved)

    def state_dict(self) -> dict[str, Any]:
        """Return the record, which a resumed run goes on with."""
        return {label: history.state_dict() for label, history in self._histories.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self._histories = {label: ZeroHistory.from_state_dict(saved) for label, saved in state_dict.items()}

    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Let go of the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._steps.clear()
        self._names.clear()


def _takes_images(logger: Logger) -> bool:
    return is_a(logger, TensorBoardLogger) or hasattr(logger, "log_image")


def _log_image(logger: Any, tag: str, pixels: Any, step: int) -> None:
    if is_a(logger, TensorBoardLogger):
        logger.experiment.add_image(tag, pixels, step, dataformats="HWC")
    else:
        logger.log_image(key=tag, images=[pixels], step=step)
