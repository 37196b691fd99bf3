"""The learning rate over a training: from warm-up to the trainer's last step."""

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, Timer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_stosign._lightning_names import is_a

if TYPE_CHECKING:
    from lightning_stosign.module import StoSignConfig


def lr_factor(config: "StoSignConfig", total_steps: float) -> Callable[[int], float]:
    """Return the schedule: from the number of finished steps to the factor on the peak learning rate.

    Args:
        config: warm-up, schedule, min_lr_ratio, wsd_decay_ratio.
        total_steps: the number of optimizer steps, inf where it is not known. A training of 0 steps has a constant
            schedule.

    Raises:
        ValueError: the schedule needs an end and there is none, or warm-up does not fit before it.

    Example:
        >>> from lightning_stosign import StoSignConfig
        >>> factor = lr_factor(StoSignConfig(schedule="linear", warmup_steps=2, min_lr_ratio=0.0), 6)
        >>> [factor(step) for step in range(7)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    warmup, floor, schedule = config.warmup_steps, config.min_lr_ratio, config.schedule
    if total_steps == 0:
        return lambda step: 1.0
    if schedule != "constant" and math.isinf(total_steps):
        raise ValueError(
            f"schedule={schedule!r} needs an end: set the Trainer's max_steps or max_epochs (max_time is not known in "
            "steps), or 'constant'"
        )
    if warmup >= total_steps:
        raise ValueError(f"warmup_steps={warmup} must be less than the {int(total_steps)} steps of this training")
    decay_start = max(warmup, total_steps * (1 - config.wsd_decay_ratio)) if schedule == "wsd" else warmup

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if schedule == "constant" or step <= decay_start:
            return 1.0
        progress = min(1.0, (step - decay_start) / (total_steps - decay_start))
        remaining = (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1 - progress
        return floor + (1 - floor) * remaining

    return factor


class ScheduleToTheEnd(LRScheduler):
    """Multiplies learning rates by :func:`lr_factor`, whose end is where the trainer's training ends.

    How many steps there will be is asked twice: at the start, so that a schedule without an end is refused there, and
    at the first step of training, when a checkpoint has been restored and callbacks have changed what they change.

    A group's learning rate is its ``initial_lr`` times the factor. A group that has joined since, by a finetuning
    callback for instance, has none: its learning rate, which the callback may go on setting, is multiplied from step to
    step by how much the factor has changed.

    Args:
        optimizer: the optimizer.
        config: the schedule.
        trainer: whose training it is.
    """

    def __init__(self, optimizer: Optimizer, config: "StoSignConfig", trainer: Trainer) -> None:
        self._config, self._trainer = config, trainer
        # What a checkpoint brings is not there yet: for now, count from its run's beginning.
        total = self._shortest(steps_left(trainer, trainer.current_epoch if trainer.ckpt_path is None else 0))
        self._factor = lr_factor(config, total)
        self._is_final = False
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Return each group's next learning rate."""
        if self.last_epoch > 0 and not self._is_final:
            progress = self._trainer.fit_loop.epoch_loop.batch_progress
            left = steps_left(self._trainer, self._trainer.current_epoch, progress.current.ready)
            total = self.last_epoch + left
            self._factor, self._is_final = lr_factor(self._config, self._shortest(total)), True
        now, before = self._factor(self.last_epoch), self._factor(max(self.last_epoch - 1, 0))
        return [
            group["initial_lr"] * now if "initial_lr" in group else group["lr"] * (now / before if before > 0 else 1.0)
            for group in self.optimizer.param_groups
        ]

    def _shortest(self, total: float) -> float:
        if self._trainer.fast_dev_run:  # type: ignore[attr-defined]
            return max(total, self._config.warmup_steps + 1)  # too short for any warm-up, and meant to run all the same
        return math.inf if self._config.schedule == "constant" and total > 0 else total

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs: not the end, which a longer resumed run moves."""
        left_out = ("_config", "_trainer", "_factor", "_is_final")
        return {key: value for key, value in super().state_dict().items() if key not in left_out}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where a checkpoint left off; peak learning rates are those in the optimizer's groups."""
        peaks = self.base_lrs
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "lr_lambdas"})
        self.base_lrs, self._is_final = peaks, False


def steps_left(trainer: Trainer, epoch: int, batches_done: int = 0) -> float:
    """Return how many optimizer steps are left of a training; inf where that is not known.

    An epoch ends with a step, also where its last window of accumulated batches is incomplete.

    Args:
        trainer: the trainer.
        epoch: the present or next epoch. At 0 and no batch, the training has not begun.
        batches_done: how many of its batches are done, a step after the last of them included.
    """
    by_steps = math.inf
    if trainer.max_steps != -1:
        done = trainer.global_step if epoch or batches_done else 0
        by_steps = max(trainer.max_steps - done, 0)
    if trainer.max_epochs == -1 or by_steps == 0:
        return by_steps
    if trainer.limit_train_batches == 0:
        return 0
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    batches = trainer.num_training_batches
    if math.isinf(batches):
        return by_steps
    assert trainer.max_epochs is not None
    steps = sum(math.ceil(batches / _window(trainer, later)) for later in range(epoch, trainer.max_epochs))
    if epoch < trainer.max_epochs:
        steps -= math.ceil(batches_done / _window(trainer, epoch))
    return min(steps, by_steps)


def _window(trainer: Trainer, epoch: int) -> int:
    """Return how many batches an epoch accumulates for a step."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if is_a(callback, GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return trainer.accumulate_grad_batches


def batches_of_this_step(trainer: Trainer) -> int:
    """Return how many batches the gradient of the step that is being taken is made of."""
    full = trainer.accumulate_grad_batches
    return (trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1) % full + 1


def warn_if_time_may_cut_it(config: "StoSignConfig", trainer: Trainer) -> None:
    """Warn where a Timer may stop training before the schedule's end, which counts steps."""
    timers = [callback for callback in trainer.callbacks if is_a(callback, Timer)]  # type: ignore[attr-defined]
    if config.schedule != "constant" and any(timer.time_remaining() is not None for timer in timers):
        warnings.warn(
            f"schedule={config.schedule!r} ends at the last step of max_steps or max_epochs; a training that max_time "
            "stops before ends at a higher learning rate.",
            UserWarning,
            stacklevel=2,
        )
