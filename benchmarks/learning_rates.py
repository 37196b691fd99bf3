"""Which learning rate does each optimizer want? The example's GPT, the same data and steps, a grid of rates.

python benchmarks/learning_rates.py             # about ten minutes on 2 cores
python benchmarks/learning_rates.py --steps 1200 --seeds 3

Prints one table: validation loss (nats a byte, mean over seeds) by optimizer and peak learning rate, float32 states and
matrix products. Where an optimizer's best rate is at the edge of its grid, the line says so.
"""

import logging
import statistics
import sys
import tempfile
import warnings
from pathlib import Path

from jsonargparse import auto_cli

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from pretrain_gpt import main as pretrain  # noqa: E402

GRIDS = {
    "stosign": (5e-4, 1e-3, 2e-3, 4e-3),
    "adamw": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    "signsgd": (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3),
}


def validation_loss(optimizer: str, lr: float, steps: int, seed: int, folder: str) -> float:
    cli = pretrain(
        [
            "fit",
            f"--seed_everything={seed}",
            f"--model.stosign.optimizer={optimizer}",
            f"--model.stosign.lr={lr}",
            f"--model.stosign.seed={seed}",
            "--model.stosign.warmup_steps=40",
            f"--data.seed={seed}",
            f"--trainer.max_steps={steps}",
            "--trainer.limit_val_batches=0",
            "--trainer.gradient_clip_val=1.0",
            "--trainer.logger=false",
            "--trainer.enable_checkpointing=false",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            f"--trainer.default_root_dir={folder}/{optimizer}-{lr}-{seed}",
        ]
    )
    cli.trainer.limit_val_batches = 40
    cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    return cli.trainer.callback_metrics["val_loss"].item()


def benchmark(steps: int = 300, seeds: int = 1) -> None:
    """Train each optimizer at each learning rate of its grid.

    Args:
        steps: optimizer steps of a run: linear warm-up over 40, then cosine to a tenth.
        seeds: runs at each learning rate.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    print(f"validation loss after {steps} steps, {seeds} seed(s)")
    with tempfile.TemporaryDirectory() as folder:
        for optimizer, grid in GRIDS.items():
            losses = {
                lr: statistics.mean(validation_loss(optimizer, lr, steps, seed, folder) for seed in range(seeds))
                for lr in grid
            }
            best = min(losses, key=lambda lr: losses[lr])
            edge = "  (at the grid's edge)" if best in (grid[0], grid[-1]) else ""
            row = "  ".join(f"{lr:g}: {loss:.3f}" for lr, loss in losses.items())
            print(f"{optimizer:8} {row}   best {best:g}{edge}", flush=True)


if __name__ == "__main__":
    auto_cli(benchmark)
