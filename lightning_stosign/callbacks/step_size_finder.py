"""SignStepSizeFinder: the learning rate of a sign-based optimizer from a handful of short trial runs."""

import logging
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.parsing import lightning_hasattr, lightning_setattr
from torch import Tensor
from torch.optim import Optimizer

from lightning_stosign._lightning_names import has_other_name, under_both_names
from lightning_stosign._lightning_private import (
    checkpoint_path,
    end_of_tuning,
    forget_metrics,
    loaded_data,
    restore_checkpoint,
    rng_states,
    set_checkpoint_path,
    set_loaded_data,
    set_rng_states,
)
from lightning_stosign._plain import plain
from lightning_stosign.callbacks._trial_run import TrialRun
from lightning_stosign.optim.alias.alias import ALIAS
from lightning_stosign.optim.alias.step_size_search import (
    Trial,
    asked_step_size,
    crossing,
    descend,
    lowest,
    search_step_size,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


class StepSizeSearch:
    """What a search found.

    Args:
        trials: step size, phi and fall of the loss of each trial run, in the order they were run.
        refined: whether trials around the best one are among them.
    """

    def __init__(self, trials: list[Trial], refined: bool) -> None:
        self.trials, self.refined = trials, refined

    def crossing(self) -> float:
        """Return the step size that asks for itself: what SOS finds."""
        return crossing(self.trials)

    def suggestion(self) -> float:
        """Return the learning rate: with which the loss falls furthest; without refinement the crossing."""
        return lowest(self.trials) if self.refined else self.crossing()

    def plot(self, suggest: bool = False, show: bool = False, ax: "Axes | None" = None) -> "Figure | SubFigure | None":
        """Plot phi, and on a second axis how far the loss fell, against the step size.

        Args:
            suggest: mark the suggested step size with a red point.
            show: show the figure.
            ax: where to draw; None: in a new figure.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        try:
            import matplotlib.pyplot as plt
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("plot() needs matplotlib: pip install matplotlib") from error
        if ax is None:
            _, ax = plt.subplots()
        trials = sorted(trial for trial in self.trials if trial.phi > 0)
        falls = sorted(trial for trial in self.trials if math.isfinite(trial.fall))
        step_sizes = [trial.step_size for trial in trials]
        ax.loglog(step_sizes, [trial.phi for trial in trials], marker=".", label="asked for by the trial run")
        ax.loglog(step_sizes, step_sizes, color="gray", linestyle=":", label="tried")
        if suggest:
            ax.plot(self.suggestion(), self.suggestion(), markersize=10, marker="o", color="red")
        ax.set_xlabel("Learning rate")
        ax.set_ylabel("Learning rate asked for")
        other = ax.twinx()
        other.plot(
            [trial.step_size for trial in falls], [trial.fall for trial in falls], color="C1", marker=".", label="fall"
        )
        other.set_ylabel("Fall of the loss")
        ax.legend(handles=[*ax.get_lines()[:2], *other.get_lines()])
        if show:
            plt.show()
        return ax.figure


@under_both_names
class SignStepSizeFinder(Callback):
    r"""Finds the learning rate before training starts: SOS, a replacement of ``LearningRateFinder`` for sign methods.

    Sign descent with T steps of one size :math:`\gamma` converges fastest where

    .. math::
        \gamma = \phi(\gamma) = \sqrt{\frac{f(x_0) - \min_t f(x_t)}
        {\sum_t \|g_{t+1} - g_t\|_1 / \|x_{t+1} - x_t\|_\infty}}

    Trial runs of ``steps`` steps, all from the present state and on the same mini-batches, compute :math:`\phi` for one
    :math:`\gamma` each, and bisection of its logarithm finds the crossing: about 8 trials. After each of them weights,
    buffers, optimizer, loops, data and random states are restored bit for bit, also when it ends by an exception or by
    Ctrl-C. The optimizer is the module's own, at a constant learning rate; it may be any whose steps are about ``lr`` a
    coordinate (:class:`SignSGD`, :class:`StoSignSGD`, Adam). Then every param group gets its share of the new learning
    rate, and so do the learning-rate schedulers' base rates and the module's ``stosign`` config, ``lr`` or
    ``learning_rate``, where there is one.

    As the bound's step size shrinks with the square root of the number of steps, so does what is found: with ``steps``
    much below the training's, start from the suggestion and let a schedule lower it.

    It is the step size of a bound, and a bound can be far from the truth. On the examples' GPT (200 steps) it is a
    third of the best rate tried with momentum, but a twentieth of it without: there the steps swing to and fro across
    the steepest directions, and each swing counts as if its loss were never won back. So from the crossing on, the
    search goes on by factors of 2 to where the loss of the trials themselves is lowest at their end, 2 to 6 trials
    more (``refine=False`` leaves that out): there 0.73 and 0.79 times the best rate of the grid, and 0.74 to 1.56 times
    on logistic regression (``examples/parameter_free.py``).

    On mini-batches, the decrease of the loss is the difference on the *same* mini-batch between the parameters at the
    start and those of the trial's step, averaged over a tenth of the trial; both gradients of a difference come from
    the same mini-batch too. The cost is ``steps`` gradients, and 1.1 to 2 times as many for each trial.

    Args:
        steps: optimizer steps of a trial run, >= 10.
        start: the first learning rate that is tried, > 0; has little influence on the result.
        measure_every: the curvature is measured in the first ``measure_every`` steps and then in every so many, >= 1.
        update_lr: False only reports.
        refine: whether to go on from the crossing, where the bound is best, to where the trials are.

    Attributes:
        search: the :class:`StepSizeSearch`: trials, ``suggestion()``, ``crossing()`` and ``plot()``; None before.

    Raises:
        ValueError: an argument is out of range; the module has several optimizers, manual optimization, or an optimizer
            without a learning rate (ALIAS).
        TypeError: an argument is of the wrong type.

    Example::

        trainer = Trainer(callbacks=[SignStepSizeFinder()])  # trains with what it finds
        find_step_size(Trainer(), model).plot(suggest=True)  # or only look

    Source:
        arXiv 2506.03725, Algorithm 1 (SOS Sign-SGD).
    """

    def __init__(
        self,
        steps: int = 100,
        start: float = 1e-4,
        measure_every: int = 10,
        update_lr: bool = True,
        refine: bool = True,
    ) -> None:
        steps, start, measure_every, update_lr, refine = plain((steps, start, measure_every, update_lr, refine))
        for name, value, least in (("steps", steps, 10), ("measure_every", measure_every, 1)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}={value!r} must be an int")
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if isinstance(start, bool) or not isinstance(start, (int, float)):
            raise TypeError(f"start={start!r} must be a number")
        if not 0 < start < float("inf"):
            raise ValueError(f"start={start} must be finite and greater than 0")
        self.steps, self.start, self.measure_every = steps, start, measure_every
        self.update_lr, self.refine = update_lr, refine
        self.search: StepSizeSearch | None = None
        self._only_search = False

    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Search, and use what is found."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn("SignStepSizeFinder does not search under fast_dev_run.")
        elif trainer.ckpt_path is not None:
            rank_zero_info("SignStepSizeFinder does not search in a resumed run: its checkpoint has the learning rate.")
        else:
            self.find(trainer, pl_module)
        if self._only_search:
            raise end_of_tuning(trainer)

    def find(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> StepSizeSearch:
        """Search now. To be called from hooks at the start of a fit or of an epoch."""
        if not pl_module.automatic_optimization or len(trainer.optimizers) != 1:
            raise ValueError(
                f"SignStepSizeFinder needs automatic optimization with one optimizer; {type(pl_module).__name__} has "
                f"automatic_optimization={pl_module.automatic_optimization} and {len(trainer.optimizers)} optimizer(s)"
            )
        (optimizer,) = trainer.optimizers
        if isinstance(optimizer, ALIAS):
            raise ValueError("SignStepSizeFinder: ALIAS has no learning rate to be found; remove one of the two")
        with _restored_afterwards(trainer, pl_module) as rewind:

            def run(step_size: float) -> TrialRun:
                rewind()
                _set_lr(optimizer, step_size)
                return TrialRun(optimizer, step_size, self.measure_every).run(trainer, self.steps)

            at_start = run(0.0).losses

            def trial(step_size: float) -> Trial:
                ended = run(step_size)
                if ended.diverged:
                    return Trial(step_size, 0.0, -math.inf)
                falls = _falls(at_start, ended.losses)
                return Trial(step_size, asked_step_size(max(falls), ended.curvatures), falls[-1])

            trials = search_step_size(trial, self.start)
            if self.refine:
                trials += descend(trial, trials)
            self.search = StepSizeSearch(trials, self.refine)
        suggestion = self.search.suggestion()
        count = len(self.search.trials)
        rank_zero_info(f"SignStepSizeFinder: learning rate {suggestion:.3g}, from {count} trials of {self.steps} steps")
        if self.update_lr:
            _use_lr(trainer, pl_module, suggestion)
        return self.search


def find_step_size(
    trainer: "pl.Trainer",
    model: "pl.LightningModule",
    train_dataloaders: Any = None,
    datamodule: "pl.LightningDataModule | None" = None,
    **options: Any,
) -> StepSizeSearch:
    """Search for the learning rate of a sign-based optimizer without training, as ``Tuner.lr_find`` does.

    Args:
        trainer: what would train the model.
        model: the model; its ``stosign`` config, ``lr`` or ``learning_rate`` is set to what is found.
        train_dataloaders: as in ``Trainer.fit``.
        datamodule: as in ``Trainer.fit``.
        options: of :class:`SignStepSizeFinder`.

    Returns:
        The trials, with ``suggestion()`` and ``plot()``.

    Raises:
        ValueError: the trainer has a SignStepSizeFinder already, or as in SignStepSizeFinder.
        RuntimeError: the trainer does not search: under ``fast_dev_run``.
    """
    if any(isinstance(callback, SignStepSizeFinder) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise ValueError("find_step_size: the Trainer has a SignStepSizeFinder already; remove it or call fit")
    finder = SignStepSizeFinder(**options)
    finder._only_search = True
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    trainer.callbacks = [finder, *callbacks]  # type: ignore[attr-defined]
    try:
        trainer.fit(model, train_dataloaders, datamodule=datamodule)
    finally:
        trainer.callbacks = callbacks  # type: ignore[attr-defined]
    if finder.search is None:
        raise RuntimeError("find_step_size does not search under fast_dev_run")
    return finder.search


def _falls(at_start: list[float], losses: list[float]) -> list[float]:
    """Return f(x_0) - f(x_t) along a trial, each a mean over a tenth of it."""
    before, after = (torch.tensor(values, dtype=torch.float64, device="cpu") for values in (at_start, losses))
    falls = before - after
    windows: list[float] = falls.unfold(0, max(1, len(falls) // 10), 1).mean(1).tolist()
    return windows


@contextmanager
def _restored_afterwards(trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> Iterator[Callable[[], None]]:
    """Yield a function that puts everything back to the present state; at the end, however it comes, everything is.

    Within, the trainer runs without callbacks, loggers, schedulers and validation, and without an end.
    """
    path = trainer.strategy.broadcast(os.path.join(trainer.default_root_dir, f".step_size_{uuid.uuid4()}.ckpt"))
    trainer.save_checkpoint(path)
    buffers = [(buffer, buffer.clone()) for buffer in pl_module.buffers()]  # some are not in checkpoints
    loop = trainer.fit_loop
    logger = logging.getLogger("pytorch_lightning" if has_other_name(trainer) else "lightning.pytorch")
    level = logger.level
    saved: dict[str, Any] = {
        "callbacks": trainer.callbacks,  # type: ignore[attr-defined]
        "loggers": trainer.loggers,
        "lr_scheduler_configs": trainer.strategy.lr_scheduler_configs,
        "limit_val_batches": trainer.limit_val_batches,
        "max_epochs": loop.max_epochs,
        "max_steps": loop.max_steps,
        "data": loaded_data(trainer),
        "ckpt_path": checkpoint_path(trainer),
    }
    progress = deepcopy(loop.state_dict())
    random_states = rng_states()

    def rewind() -> None:
        restore_checkpoint(trainer, path)
        for buffer, value in buffers:
            buffer.copy_(value)
        for optimizer in trainer.optimizers:
            optimizer.zero_grad()
        loop.load_state_dict(deepcopy(progress))
        # Otherwise the next run would believe that it goes on where a checkpoint was made.
        loop.restarting = loop.epoch_loop.restarting = False
        set_loaded_data(trainer, (None, None, None))
        trainer.should_stop = False
        forget_metrics(trainer)
        # Every trial shuffles and drops alike.
        set_rng_states(random_states)

    logger.setLevel(logging.WARNING)  # Lightning tells of every restored checkpoint and finished run
    trainer.callbacks, trainer.loggers = [], []  # type: ignore[attr-defined]
    trainer.strategy.lr_scheduler_configs = []
    trainer.limit_val_batches, loop.max_epochs = 0, -1
    try:
        yield rewind
    finally:
        trainer.callbacks, trainer.loggers = saved["callbacks"], saved["loggers"]  # type: ignore[attr-defined]
        trainer.strategy.lr_scheduler_configs = saved["lr_scheduler_configs"]
        trainer.limit_val_batches = saved["limit_val_batches"]
        loop.max_epochs, loop.epoch_loop.max_steps = saved["max_epochs"], saved["max_steps"]
        rewind()
        trainer.strategy.remove_checkpoint(path)
        set_loaded_data(trainer, saved["data"])
        set_checkpoint_path(trainer, saved["ckpt_path"])
        logger.setLevel(level)


def _set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate, param groups keeping their shares of it, and what schedulers start from."""
    initial = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    largest = max(initial)
    for group, was in zip(optimizer.param_groups, initial, strict=True):
        new = lr * (was / largest) if largest > 0 else lr
        for key in ("lr", "initial_lr"):
            if isinstance(group.get(key), Tensor):
                group[key].fill_(new)
            elif key in group:
                group[key] = new


def _use_lr(trainer: "pl.Trainer", pl_module: "pl.LightningModule", lr: float) -> None:
    """Let the training that follows use a learning rate, and the module know it."""
    (optimizer,) = trainer.optimizers
    before = [(float(group["lr"]), float(group.get("initial_lr", group["lr"]))) for group in optimizer.param_groups]
    _set_lr(optimizer, lr)
    for group, (scheduled, initial) in zip(optimizer.param_groups, before, strict=True):
        # What a warm-up had made of it.
        factor = scheduled / initial if initial > 0 else 1.0
        if isinstance(group["lr"], Tensor):
            group["lr"].mul_(factor)
        else:
            group["lr"] *= factor
    for config in trainer.lr_scheduler_configs:
        if hasattr(config.scheduler, "base_lrs"):
            config.scheduler.base_lrs = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    stosign: Any = getattr(pl_module, "stosign", None)  # a StoSignMixin's config
    if hasattr(stosign, "lr"):
        pl_module.stosign = replace(stosign, lr=lr)
        hparams = pl_module.hparams if isinstance(pl_module.hparams, MutableMapping) else {}
        saved = hparams.get("stosign")
        if isinstance(saved, Mapping):  # LightningCLI's: what it instantiates a config from
            hparams["stosign"] = {**saved, "lr": lr}
        elif saved is not None:
            hparams["stosign"] = pl_module.stosign
    for name in ("lr", "learning_rate"):
        if lightning_hasattr(pl_module, name):
            lightning_setattr(pl_module, name, lr)
