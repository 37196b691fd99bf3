"""Does StateCollapseGuard act in time? The example's GPT trained by AdamW with FP8 states, with and without the guard.

python benchmarks/guard.py    # about four minutes on 2 cores

Prints two tables. The first: raw-cast E4M3 states, with examples/demo.py's loss scale and without; the step at which a
guard with action="stop" ends the run, and how many steps later the unguarded run's training loss is worse than that of
float32 states, and NaN. The second: E4M3 states in one scale a tensor, left alone and with a guard that promotes.
"""

import logging
import math
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from lightning import seed_everything
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_stosign import Float8Precision, StateCollapseGuard, StoSignConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from gpt import GPTModule
from text_data import TextDataModule

WORSE = 0.1  # nats above the run with float32 states


class Losses(Callback):
    """Keeps the training loss of every step."""

    def __init__(self) -> None:
        self.train: list[float] = []
        self.validation = math.nan

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.train.append(outputs["loss"].item())


def train(precision: str, steps: int, lr: float, folder: str, guard: StateCollapseGuard | None = None) -> Losses:
    """Train by examples/demo.py's settings."""
    seed_everything(0, verbose=False)
    module = GPTModule(
        stosign=StoSignConfig(
            optimizer="adamw", betas=(0.9, 0.999), lr=lr, warmup_steps=40, schedule="cosine", state_precision=precision
        )
    )
    data, losses = TextDataModule(context=128, batch_size=16), Losses()
    trainer = Trainer(
        max_steps=steps,
        gradient_clip_val=1.0,
        plugins=[Float8Precision(exclude=["model.head"])],
        callbacks=[losses] if guard is None else [losses, guard],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=data)
    trainer.limit_val_batches = 20
    trainer.validate(module, datamodule=data, verbose=False)
    losses.validation = trainer.callback_metrics["val_loss"].item()
    return losses


def first(condition: list[bool]) -> int | None:
    """Return the number of the first step that it is true of."""
    return condition.index(True) + 1 if True in condition else None


def later(step: int | None, stopped: int) -> str:
    return "never" if step is None else f"step {step}, {step - stopped} later"


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in (rows[0], tuple("-" * width for width in widths), *rows[1:]):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)


def benchmark(steps: int = 150, lr: float = 1e-3, every_n_steps: int = 1, per_layer: bool = True) -> None:
    """Run both experiments.

    Args:
        steps: optimizer steps of a run.
        lr: peak learning rate: linear warm-up over 40 steps, then cosine to a tenth.
        every_n_steps: how often the guards look.
        per_layer: whether the promoting guard judges each layer by itself.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        full = train("float32", steps, lr, folder)

        stops = [("states", "guard stops at", f"loss worse by {WORSE} at", "loss NaN at")]
        for precision in ("fp8-raw:static_scale=1024", "fp8-raw"):
            guard = StateCollapseGuard(action="stop", every_n_steps=every_n_steps)
            stopped = len(train(precision, steps, lr, folder, guard).train)
            alone = train(precision, steps, lr, folder).train
            worse = first([not loss <= best + WORSE for loss, best in zip(alone, full.train, strict=True)])
            nan = first([math.isnan(loss) for loss in alone])
            stops.append((precision, f"step {stopped}", later(worse, stopped), later(nan, stopped)))
        print_table(stops)
        print()

        rows = [("states", "guard", "validation loss", "above float32", "promotions")]
        rows.append(("float32", "-", f"{full.validation:.3f}", "-", "-"))
        guard = StateCollapseGuard(action="promote", every_n_steps=every_n_steps, per_layer=per_layer)
        for guarded in (False, True):
            loss = train("fp8", steps, lr, folder, guard if guarded else None).validation
            kinds = Counter((p["from"], p["to"]) for p in guard.promotions)
            moved = ", ".join(f"{n} layers {old} -> {new}" for (old, new), n in kinds.items()) or "-"
            name = "promote" if guarded else "-"
            rows.append(("fp8", name, f"{loss:.3f}", f"{loss - full.validation:+.3f}", moved))
        print_table(rows)
        print(f"\npromoted at steps {sorted({p['step'] for p in guard.promotions})}\n\n{guard.report}")


if __name__ == "__main__":
    auto_cli(benchmark)
