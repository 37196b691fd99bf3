"""Progress where the output is a log: a line every few seconds instead of a bar that is drawn over itself."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class ProgressLines(Callback):
    """Print the step and the loss.

    Args:
        seconds: between two lines, at least.
    """

    def __init__(self, seconds: float = 5.0) -> None:
        self.seconds = seconds
        self._last = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *batch: Any) -> None:
        now = time.monotonic()
        if now - self._last < self.seconds:
            return
        self._last = now
        loss = trainer.callback_metrics.get("train_loss")
        seen = "" if loss is None else f", loss {loss:.3f}"
        print(f"  step {trainer.global_step} of {trainer.max_steps}{seen}", flush=True)
