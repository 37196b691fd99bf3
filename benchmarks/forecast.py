"""Does the forecast of a float32 run tell which storage formats would fail? AdamW on the example's GPT.

python benchmarks/forecast.py                        # about four minutes on 2 cores

Trains once with float32 states and the monitor's forecast, and once more for each format with the states emulated in
it. Prints one table: what the forecast said at the given step, and how much worse the run in the format ended.
"""

import logging
import sys
import tempfile
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyLogger

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from gpt import GPTModule
from text_data import TextDataModule

from lightning_stosign import OptimizerStateMonitor, StoSignConfig

FAILED = 0.1  # nats a byte


class Kept(DummyLogger):
    """Keeps the records of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.records: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.records.setdefault(step or 0, {}).update(metrics)


def train(precision: str | None, options: Namespace, callbacks: list[Callback], logger: Kept | None) -> float:
    """Train and return the validation loss, in nats a byte."""
    seed_everything(options.seed, verbose=False)
    config = StoSignConfig(
        "adamw",
        lr=options.lr,
        betas=(0.9, options.beta2),
        warmup_steps=options.steps // 8,
        state_precision=precision,
    )
    model, data = GPTModule("1m", stosign=config), TextDataModule(seed=options.seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_steps=options.steps,
            accelerator="cpu",
            devices=1,
            gradient_clip_val=1.0,
            limit_val_batches=40,
            val_check_interval=options.steps,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            logger=logger or False,
            callbacks=callbacks,
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, datamodule=data)
    return trainer.callback_metrics["val_loss"].item()


def benchmark(
    formats: tuple[str, ...] = ("fp8-raw", "fp8", "fp8-block"),
    steps: int = 200,
    forecast_at: int = 50,
    lr: float = 1e-3,
    beta2: float = 0.95,
    seed: int = 0,
) -> None:
    """Train with float32 states and with each format's, and print the table.

    Args:
        formats: names of state precisions.
        steps: optimizer steps of a run: linear warm-up over an eighth, then cosine to a tenth.
        forecast_at: the step of the forecast.
        lr: peak learning rate.
        beta2: decay of the second moment.
        seed: of the model and the data.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    options = Namespace(steps=steps, lr=lr, beta2=beta2, seed=seed)
    kept = Kept()
    monitor = OptimizerStateMonitor(forecast_at, per_layer=False, histograms=False, forecast=formats)
    whole = train(None, options, [monitor], kept)
    said = kept.records[forecast_at - 1]
    print(f"AdamW, lr {lr:g}, betas (0.9, {beta2:g}), {steps} steps, seed {seed}; float32 states: {whole:.3f}")
    print("| states | exp_avg_sq: underflow | stalled | exp_avg: underflow | stalled | at the end | against float32 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in formats:
        loss = train(name, options, [], None)
        shares = [
            said[f"optimizer_state/{kind}_fraction/{state}/{name}"]
            for state in ("exp_avg_sq", "exp_avg")
            for kind in ("underflow", "stalled")
        ]
        verdict = "fails" if not loss - whole < FAILED else "trains"  # NaN fails too
        cells = [name, *(f"{share:.2%}" for share in shares), f"{loss:.3f}", f"{loss - whole:+.3f} ({verdict})"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    auto_cli(benchmark)
