"""Two optimizers train the same GPT with FP8 matrix products and FP8 optimizer states: one of them collapses.

    python examples/demo.py                # or: make demo
    python examples/demo.py --steps 300 --static_scale 4096

Each optimizer also trains with float32 states, at the same learning rate, seed and data, as what it is compared with.
Prints one table, and writes a figure, the numbers as JSON and TensorBoard logs to `runs/demo`.
"""

import json
import logging
import os
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from matplotlib.figure import Figure
from pretrain_gpt import main as pretrain
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_stosign import StateCollapseGuard

CONFIG = Path(__file__).with_name("pretrain_gpt.yaml")
OPTIMIZERS = {"AdamW": "adamw", "StoSignSGD": "stosign"}
BETAS = {"adamw": "[0.9, 0.999]", "stosign": "[0.9, 1.0]"}  # each one's own defaults in its package
PROGRESS = "--trainer.callbacks+=progress_lines.ProgressLines"
DENOMINATOR = {"adamw": "exp_avg_sq", "stosign": "exp_inf"}


def train(optimizer: str, precision: str, lr: float, steps: int, out: Path) -> dict[str, Any]:
    """Train by the command line that a user would type, and read the results from the files it leaves behind."""
    name = f"{optimizer}-{precision.partition(':')[0]}"
    started = time.perf_counter()
    cli = pretrain(
        [
            "fit",
            f"--config={CONFIG}",
            f"--model.stosign.optimizer={optimizer}",
            f"--model.stosign.betas={BETAS[optimizer]}",
            f"--model.stosign.lr={lr}",
            f"--model.stosign.warmup_steps={min(40, steps // 4)}",
            f"--model.stosign.state_precision={precision}",
            f"--trainer.max_steps={steps}",
            "--trainer.val_check_interval=50",
            "--trainer.limit_val_batches=10",
            "--data.batch_size=8",
            "--trainer.enable_model_summary=false",
            *(() if sys.stdout.isatty() else ("--trainer.enable_progress_bar=false", PROGRESS)),
            f"--trainer.logger.init_args.save_dir={out}",
            f"--trainer.logger.init_args.name={name}",
            "--trainer.logger.init_args.version=",
        ]
    )
    guard = next(c for c in cli.trainer.callbacks if isinstance(c, StateCollapseGuard))  # type: ignore[attr-defined]
    cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    events = EventAccumulator(cli.trainer.log_dir, size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    denominator = DENOMINATOR[optimizer]
    zeros = events.Scalars(f"optimizer_state/zero_fraction/{denominator}")
    momentum = events.Histograms("optimizer_state/log10_abs/exp_avg")[-1].histogram_value
    return {
        "optimizer": optimizer,
        "state_precision": precision,
        "val_loss": cli.trainer.callback_metrics["val_loss"].item(),
        "train_loss": [(e.step, e.value) for e in events.Scalars("train_loss")],
        "zero_fraction": max(e.value for e in zeros),
        "denominator": denominator,
        "collapsed_at": guard.collapsed_at.get(denominator),
        "report": guard.report,
        "log10_momentum": (list(momentum.bucket_limit), list(momentum.bucket)),
        "seconds": time.perf_counter() - started,
    }


def title_of(result: dict[str, Any]) -> str:
    return next(title for title, name in OPTIMIZERS.items() if name == result["optimizer"])


def print_table(results: list[dict[str, Any]]) -> None:
    titles = ("optimizer", "states", "validation loss", "zeros in the denominator", "collapsed at step")
    rows = [
        (
            title_of(r),
            r["state_precision"],
            f"{r['val_loss']:.3f}",
            f"{r['zero_fraction']:.0%} of {r['denominator']}",
            str(r["collapsed_at"] or "-"),
        )
        for r in results
    ]
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    print()
    for row in (titles, tuple("-" * width for width in widths), *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def draw(results: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    colors = {"adamw": "tab:red", "stosign": "tab:blue"}
    for r in results:
        in_fp8, color = r["state_precision"] != "float32", colors[r["optimizer"]]
        label = f"{title_of(r)}, {'FP8' if in_fp8 else 'float32'} states"
        axes[0].plot(*zip(*r["train_loss"], strict=True), color=color, ls="-" if in_fp8 else ":", label=label)
        if not in_fp8:
            continue
        if r["collapsed_at"]:
            axes[0].axvline(r["collapsed_at"], color=color, lw=0.8, ls="--", label="StateCollapseGuard: collapsed")
        limits, counts = r["log10_momentum"]
        axis = axes[1 + list(colors).index(r["optimizer"])]
        axis.bar(limits, [count / sum(counts) for count in counts], width=-0.25, align="edge", color=color)
        axis.set_title(f"{title_of(r)}: up to {r['zero_fraction']:.0%} of {r['denominator']} is 0", fontsize="medium")
        axis.set(
            xlabel="log10 |m|, FP8 states, last step",
            ylabel="share of the nonzero entries",
            xlim=(-7, -1),
        )
    axes[0].set(
        yscale="log", xlabel="step", ylabel="training loss", title="GPT in FP8 on the standard library's source"
    )
    axes[0].legend(loc="center right", fontsize="small")
    figure.savefig(path, dpi=120)


def demo(steps: int = 150, lr: float = 1e-3, static_scale: float = 1024.0, out: str = "runs/demo") -> None:
    """Train AdamW and StoSignSGD with float32 and with raw FP8 optimizer states, and compare.

    Args:
        steps: optimizer steps of each run.
        lr: learning rate of each run.
        static_scale: the power of two that FP8 states are multiplied with, for both optimizers (a loss scale).
        out: folder for the results; what an earlier demo left there is removed.
    """
    # Notices about optional hardware and upstream deprecations would bury the table.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning|torch")
    folder = Path(out)
    shutil.rmtree(folder, ignore_errors=True)
    results = []
    for title, optimizer in OPTIMIZERS.items():
        for precision in ("float32", f"fp8-raw:static_scale={static_scale:g}"):
            print(f"\n{title}, {precision} states, {steps} steps at lr {lr:g}", flush=True)
            results.append(result := train(optimizer, precision, lr, steps, folder))
            print(f"  validation loss {result['val_loss']:.3f} after {result['seconds']:.0f} s", flush=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    draw(results, folder / "demo.png")
    print_table(results)
    for r in results:
        if r["report"]:
            print(f"\nWhy, as StateCollapseGuard says: {r['report']}")
    print(f"\nFigure: {folder / 'demo.png'}")
    tensorboard = os.path.relpath(Path(sys.executable).with_name("tensorboard"))
    print(f"Watch it step by step: {tensorboard} --logdir {folder}    then http://localhost:6006/#custom_scalars")


if __name__ == "__main__":
    auto_cli(demo)
