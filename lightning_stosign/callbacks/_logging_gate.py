"""When a step's record is due, and under which number."""

from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_stosign._lightning_private import batches_that_stepped


def record_step(trainer: Trainer) -> int:
    """Return the step that Lightning's own metrics of this optimizer step are logged under."""
    return batches_that_stepped(trainer)


class OwnSteps:
    """Counts the steps of each optimizer: under manual optimization one may step every other batch, or every fifth.

    A resumed optimizer goes on from the steps that its state has counted.
    """

    def __init__(self) -> None:
        self._taken: dict[Optimizer, int] = {}

    def watch(self, optimizer: Optimizer) -> None:
        """Begin to count an optimizer's steps."""
        counts = [state.get("step", 0) for state in optimizer.state.values()]
        self._taken[optimizer] = max((int(count) for count in counts if _is_count(count)), default=0)

    def advance(self, optimizer: Optimizer) -> None:
        """Count a step that has been taken."""
        self._taken[optimizer] += 1

    def number(self, trainer: Trainer, optimizer: Optimizer) -> int:
        """Return the number, from 1, of the step that an optimizer is taking; in its post-hooks before they count it.

        Under automatic optimization that is Lightning's own number, which counts the steps that AMP skips.
        """
        if trainer.lightning_module.automatic_optimization:
            return record_step(trainer) + 1
        return self._taken[optimizer] + 1

    def is_due(self, trainer: Trainer, optimizer: Optimizer, every_n_steps: int | None) -> bool:
        """Return whether to look at this step: every n-th, by default of ``Trainer(log_every_n_steps)``."""
        every: int = trainer.log_every_n_steps if every_n_steps is None else every_n_steps  # type: ignore[attr-defined]
        return every > 0 and self.number(trainer, optimizer) % every == 0

    def clear(self) -> None:
        """Forget all optimizers."""
        self._taken.clear()


def _is_count(value: object) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)


def check_every_n_steps(every_n_steps: int | None) -> None:
    """Raise unless the argument is None or an int of at least 1."""
    if every_n_steps is None:
        return
    if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int):
        raise TypeError(f"every_n_steps={every_n_steps!r} must be an int or None")
    if every_n_steps < 1:
        raise ValueError(f"every_n_steps={every_n_steps} must be at least 1, or None for Trainer(log_every_n_steps)")
