"""OptimizerStateCallback: the monitor's records, and a guard, in Hugging Face's Trainer."""

from collections.abc import Sequence
from typing import Any, Literal

from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lightning_stosign._tags import full_tags, warn_of_old_tags
from lightning_stosign.health.forecast import check_format
from lightning_stosign.state_logger import state_records

_DENOMINATORS = "exp_avg_sq", "exp_inf"


class OptimizerStateCallback(TrainerCallback):
    """Logs the health of the optimizer's states in ``transformers.Trainer``, and may stop a run whose states collapse.

    The tags are those of :class:`OptimizerStateMonitor` that are seen after an update. Given in ``callbacks=``, the
    records join what the Trainer prints and keeps in ``state.log_history``. After :meth:`attach` they also reach
    TensorBoard, W&B and the like, whose callbacks the Trainer calls before a user's.

    Args:
        every_n_steps: record every n-th optimizer step. None: as ``TrainingArguments(logging_steps)``.
        per_layer: also record each parameter.
        forecast: formats for ``underflow_fraction`` and ``stalled_fraction``, by :class:`StatePrecision` name.
        action: ``"log"``, or ``"stop"``: end training in order as soon as a limit is broken ``patience`` records in a
            row.
        max_zero_fraction: the largest healthy share of zeros in a state that updates are divided by.
        max_exploding_fraction: the largest healthy share of coordinates whose quotient explodes.
        patience: how many records in a row, at least 1.
        old_tags: deprecated: log layers as ``optimizer_state/<tag>/<name>``, as version 0.1 did.

    Raises:
        ValueError: an argument is out of range; a format is unknown.

    Example::

        trainer = transformers.Trainer(model, args, train_dataset=data)
        OptimizerStateCallback(action="stop").attach(trainer)
        trainer.train()
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        per_layer: bool = False,
        forecast: Sequence[str] = ("fp8", "fp8-raw"),
        action: Literal["log", "stop"] = "log",
        max_zero_fraction: float = 0.5,
        max_exploding_fraction: float = 0.01,
        patience: int = 3,
        old_tags: bool = False,
    ) -> None:
        if every_n_steps is not None and (isinstance(every_n_steps, bool) or every_n_steps < 1):
            raise ValueError(f"every_n_steps={every_n_steps!r} must be at least 1, or None for logging_steps")
        for format_name in forecast:
            check_format(format_name)
        if action not in ("log", "stop"):
            raise ValueError(f"action={action!r} is unknown; accepted: 'log', 'stop'")
        for name, value in (
            ("max_zero_fraction", max_zero_fraction),
            ("max_exploding_fraction", max_exploding_fraction),
        ):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must be in [0, 1]")
        if patience < 1:
            raise ValueError(f"patience={patience} must be at least 1")
        self.every_n_steps = every_n_steps
        self.per_layer = per_layer
        self.forecast = tuple(forecast)
        self.action = action
        self.max_zero_fraction = max_zero_fraction
        self.max_exploding_fraction = max_exploding_fraction
        self.patience = patience
        self.old_tags = old_tags
        if old_tags:
            warn_of_old_tags("OptimizerStateCallback")
        self._trainer: Trainer | None = None
        self._sick = 0
        self._records: dict[str, float] = {}

    def attach(self, trainer: Trainer) -> None:
        """Add this callback to a Trainer, and log by the Trainer's own ``log``."""
        self._trainer = trainer
        trainer.add_callback(self)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """After an update that is due, read the states; act on a collapse."""
        every = self.every_n_steps or max(int(args.logging_steps), 1)
        if optimizer is None or (state.global_step + 1) % every:
            return
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        names = {} if model is None else {param: name for name, param in model.named_parameters()}
        records = state_records(inner, names, per_layer=self.per_layer, forecast=self.forecast)
        names = full_tags(records, old=self.old_tags)
        tagged = {names[tag]: value for tag, value in records.items()}
        if self._trainer is not None:
            self._trainer.log(tagged)
        else:
            self._records, control.should_log = tagged, True
        self._sick = self._sick + 1 if self._is_sick(records) else 0
        if self.action == "stop" and self._sick >= self.patience:
            control.should_training_stop = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Add the latest records to what the Trainer logs."""
        if logs is not None and self._records:
            logs.update(self._records)
            if state.log_history:
                state.log_history[-1].update(self._records)
            self._records = {}

    def _is_sick(self, records: dict[str, float]) -> bool:
        if records.get("exploding_fraction", 0.0) > self.max_exploding_fraction:
            return True
        decisive = [
            value for tag, value in records.items() if tag in ("zero_fraction/exp_avg_sq", "zero_fraction/exp_inf")
        ]
        return any(value > self.max_zero_fraction for value in decisive)
