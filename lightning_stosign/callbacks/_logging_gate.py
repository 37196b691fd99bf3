"""When a step's record is due, and under which number."""

from lightning.pytorch import Trainer

from lightning_stosign._lightning_private import batches_that_stepped


def record_step(trainer: Trainer) -> int:
    """Return the step that Lightning's own metrics of this optimizer step are logged under."""
    return batches_that_stepped(trainer)


def is_due(trainer: Trainer, every_n_steps: int | None) -> bool:
    """Return whether to record this optimizer step: every n-th, by default of ``Trainer(log_every_n_steps)``."""
    every: int = trainer.log_every_n_steps if every_n_steps is None else every_n_steps  # type: ignore[attr-defined]
    return every > 0 and (record_step(trainer) + 1) % every == 0


def check_every_n_steps(every_n_steps: int | None) -> None:
    """Raise unless the argument is None or an int of at least 1."""
    if every_n_steps is None:
        return
    if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int):
        raise TypeError(f"every_n_steps={every_n_steps!r} must be an int or None")
    if every_n_steps < 1:
        raise ValueError(f"every_n_steps={every_n_steps} must be at least 1, or None for Trainer(log_every_n_steps)")
