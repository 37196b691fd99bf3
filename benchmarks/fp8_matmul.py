"""What do matrix products in few bits cost the loss, and the plugin itself the step? The example's GPT with StoSignSGD.

python benchmarks/fp8_matmul.py                                   # float32 against FP8 with one scale a tensor
python benchmarks/fp8_matmul.py --recipes "[rowwise, nvfp4]" --exclude "[model.head]"
python benchmarks/fp8_matmul.py --recipes "[nvfp4]" --state_precision fp4-block:stochastic_rounding=true --seeds 1

Prints one table: validation loss (nats a byte) for each recipe, seed by seed, its mean, and its difference from
float32, which is to be at most 0.03; then the time that Float8Precision's own Python takes of a step, without the
products.
"""

import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from lightning.pytorch.plugins.precision.precision import Precision

from lightning_stosign import Float8Precision

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from gpt import GPTModule
from pretrain_gpt import main as pretrain


def validation_loss(
    recipe: str | None, state_precision: str | None, exclude: list[str], lr: float, steps: int, seed: int, folder: str
) -> float:
    arguments = [
        "fit",
        f"--seed_everything={seed}",
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
        f"--trainer.default_root_dir={folder}/{recipe}-{seed}",
    ]
    if recipe is not None:
        if state_precision is not None:
            arguments.append(f"--model.stosign.state_precision={state_precision}")
        arguments += [
            "--trainer.plugins+=Float8Precision",
            f"--trainer.plugins.init_args.recipe={recipe}",
            f"--trainer.plugins.init_args.exclude={exclude}",
        ]
    cli = pretrain(arguments)
    cli.trainer.limit_val_batches = 40
    cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    return cli.trainer.callback_metrics["val_loss"].item()


def microseconds(call: Callable[[], object], repeats: int = 2000) -> float:
    """Return the time of a call: the median of eleven batches."""
    times = []
    for _ in range(11):
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        times.append((time.perf_counter() - started) / repeats * 1e6)
    return statistics.median(times)


def plugin_time(plugin: Precision, batch: Any) -> float:
    """Return how many microseconds a precision plugin takes of a training step, its products aside."""

    def step() -> None:
        with plugin.forward_context():
            plugin.convert_input(batch)
        plugin.convert_output(batch)

    return microseconds(step)


def benchmark(
    recipes: tuple[str, ...] = ("current",),
    state_precision: str | None = None,
    exclude: tuple[str, ...] = (),
    steps: int = 300,
    seeds: int = 3,
    lr: float = 2e-3,
) -> None:
    """Train with each recipe and in float32, and time the plugin.

    Args:
        recipes: of Float8Precision.
        state_precision: of the optimizer's states beside the recipes; those beside float32 stay in float32.
        exclude: layers that stay in float32, as in Float8Precision.
        steps: optimizer steps of a run: linear warm-up over 40, then cosine to a tenth.
        seeds: runs with each recipe; 0 only times the plugin.
        lr: peak learning rate.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if seeds > 0:
        states = state_precision or "float32"
        print(
            f"validation loss after {steps} steps of StoSignSGD at {lr:g}, states in {states}, exclude={list(exclude)}"
        )
        mean_in_float32 = 0.0
        with tempfile.TemporaryDirectory() as folder:
            for recipe in (None, *recipes):
                losses = [
                    validation_loss(recipe, state_precision, list(exclude), lr, steps, seed, folder)
                    for seed in range(seeds)
                ]
                mean = statistics.mean(losses)
                mean_in_float32 = mean if recipe is None else mean_in_float32
                spread = f"{min(losses):.4f} to {max(losses):.4f}"
                print(
                    f"{recipe or 'float32':10} mean {mean:.4f} ({spread})  difference {mean - mean_in_float32:+.4f}  "
                    f"by seed {' '.join(f'{loss:.4f}' for loss in losses)}",
                    flush=True,
                )

    batch = (torch.zeros(16, 128, dtype=torch.int64), torch.zeros(16, 128, dtype=torch.int64))
    print("microseconds of a step in the plugin's own Python, and in Lightning's plugin without any precision")
    for weights_dtype in ("float32", "bfloat16"):
        plugin = Float8Precision(backend="torchao", weights_dtype=weights_dtype)
        plugin.convert_module(GPTModule())
        ratio = plugin_time(plugin, batch), plugin_time(Precision(), batch)
        print(f"{weights_dtype:10} {ratio[0]:.0f} against {ratio[1]:.0f}")


if __name__ == "__main__":
    auto_cli(benchmark)
