"""RESULTS.md and its figures, from whatever results there are."""

import math
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import lightning
import matplotlib
import torch
import torchao

from evidence.runs import STDLIB, TOKENS_A_STEP, Run
from evidence.store import Store
from evidence.study import FP8, GEMM, LONGER, LONGEST, METHODS, OURS, SMALL_STEPS, Scale
from evidence.tables import Tables

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAME = "RESULTS.md"

SHOWN = ("AdamW", "SignSGD", "Muon", "IE-StoSignSGD", OURS)  # in the figure of curves

DEVIATIONS = """\
* A GPT of 0.8 M parameters on bytes of the source of Python's standard library, and {tokens:,} tokens a run, instead of
  GPT-2 (124 M) on 13.1 billion tokens of OpenWebText. Nothing here says how the ratios grow with size.
* Learning rates are tuned with float32 states and matrix products, seed 0, on a grid of factors of 2, and used as they
  are with FP8; AdamW, whose best rate might move, is shown at each rate of its grid.
* FP8 matrix products are torchao's, on the CPU; the output layer and the embeddings stay in float32, as do the master
  weights, which the paper keeps in bfloat16.
* FP8 states of StoSignSGD and SignSGD are stored, those of the other methods emulated: rounded after each step. States
  of parameters with less than 4,096 values stay in float32, as in torchao's and bitsandbytes' optimizers.
* ALIAS finds its own step size; it is given a warm-up, no decay, and 1.1 gradients a step."""


def write(store: Store, scale: Scale, command: str) -> Path:
    """Write RESULTS.md and the figures beside the raw numbers.

    Args:
        store: the results.
        scale: of the runs to tell about.
        command: what reproduces them.

    Returns:
        The path of RESULTS.md.
    """
    tables = Tables(store, scale)
    hours = sum(result.seconds for result in store.results.values()) / 3600
    figures = [
        ("curves.png", "Validation loss by tokens (the paper's Figures 2 and 6)", draw_curves(tables)),
        ("momentum.png", "Magnitudes of the states after the last step (Figure 3)", draw_momentum(tables)),
        ("noise.png", "How much of a step is noise (Figure 4)", draw_noise(tables)),
    ]
    for name, _, figure in figures:
        figure.savefig(store.folder / name, dpi=110)
        plt.close(figure)
    collapsed = store.results.get(Run("AdamW", tables.best_lr("AdamW"), FP8, GEMM, 0, scale.steps, scale.task, STDLIB))
    machine = f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"
    machine += f", torchao {torchao.__version__}, lightning {lightning.__version__}"
    sections = [
        "# Results",
        f"Written by `{command}`: do not edit. {len(store.results)} runs, {hours:.1f} hours of training in all, one"
        f" thread each, beside other work: {machine}. Raw numbers: `runs.csv`, `curves.csv`, `histograms.csv`.",
        f"Losses are nats a byte of the validation text after {scale.steps} steps of {TOKENS_A_STEP:,} tokens, mean"
        f" over {scale.seeds} seeds (weights, data and noise) ± its standard error, or one seed where there is no ±."
        " Linear warm-up over a tenth of the steps, cosine to a tenth of the rate, gradients clipped at norm 1, weight"
        " decay 0.1. Unless said otherwise matrix products are in FP8 (E4M3 forward, E5M2 gradients). FP8 states are"
        " E4M3 with one scale a tensor.",
        "## What FP8 states do to AdamW and to StoSignSGD",
        tables.collapse(),
        "## Every method at its best learning rate",
        tables.methods(),
        "![Validation loss by tokens](curves.png)",
        "## How many tokens StoSignSGD saves",
        f"Float32 throughout, {scale.steps}, {LONGER * scale.steps} and {LONGEST * scale.steps} steps, learning rates"
        f" tuned for each. The steps at which {OURS} would end with a baseline's final loss are interpolated, by their"
        " logarithm, between runs of different lengths, each with its own schedule. The ratio is that of the tokens"
        " that the baseline needs to those that StoSignSGD needs; below 1 the baseline is ahead. The paper reports 1.44"
        " to 2.14, at 13 billion tokens.",
        tables.ratios(),
        tables.longer(),
        f"What might raise the ratio: {LONGER * scale.steps} steps, float32 throughout, seed 0; with fewer than 3 rates"
        " not tuned.",
        tables.attempts(),
        "## Other formats of the states",
        tables.formats(),
        "## Muon with FP8 states",
        "MuonSign is Muon for the matrices and StoSignSGD in expectation for the rest; the row Muon has AdamW for the"
        " rest. Float32 matrix products. FP8 states of MuonSign are stored, those of the others emulated. The runs of"
        " MuonSign orthogonalised in bfloat16, as it does on accelerators; on the CPU it is float32 now.",
        tables.muon(),
        "## Why AdamW fails (the paper's Table 12)",
        collapsed.report if collapsed is not None and collapsed.report else "(not run yet)",
        "## Learning rates",
        "Float32 states and matrix products, seed 0.",
        tables.rates(),
        "## What StoSignSGD's parts do",
        "Float32 states and matrix products, each variant at its best learning rate.",
        tables.ablations(),
        "![Magnitudes of the states](momentum.png)",
        "![How much of a step is noise](noise.png)",
        "## Images and fine-tuning",
        f"ResNet-18 on scikit-learn's digits and a small Llama on instructions, both from scratch, {SMALL_STEPS} steps,"
        " float32 matrix products; the loss is that of the test images and of the held-out responses.",
        tables.small_tasks(),
        "## Another text",
        "The King James Bible, at the learning rates found on the first text.",
        tables.other_text(),
        "## A larger model",
        "10.8 M parameters, float32 matrix products, one seed, half the learning rates of the small model.",
        tables.larger(),
        "## What differs from the paper",
        DEVIATIONS.format(tokens=scale.steps * TOKENS_A_STEP),
        *recorded(store.folder),
    ]
    path = store.folder / NAME
    path.write_text("\n\n".join(sections) + "\n")
    return path


def recorded(folder: Path) -> list[str]:
    """Return what other benchmarks have written, and what they and the examples have printed, file by file."""
    written = [path.read_text().strip() for path in sorted(folder.glob("*.md")) if path.name != NAME]
    printed = [f"# {p.stem}\n\n```\n{p.read_text().strip()}\n```" for p in sorted(folder.glob("*.txt"))]
    if not written + printed:
        return []
    intro = "What is in a block was recorded by `benchmarks/record.sh`; it begins with the command that prints it."
    return ["## Other measurements", intro, *(re.sub(r"^#", "###", part, flags=re.M) for part in written + printed)]


def curve(tables: Tables, method: str, states: str, tag: str) -> tuple[list[int], list[float]]:
    """Return the steps and the mean over seeds of a curve at the method's best learning rate."""
    runs = tables.store.losses(
        method=method,
        lr=tables.best_lr(method),
        states=states,
        gemm=GEMM,
        steps=tables.scale.steps,
        task=tables.scale.task,
        corpus=STDLIB,
    )
    curves = [tables.store.results[run].curves.get(tag, {}) for run in runs]
    steps = sorted(set.intersection(*(set(points) for points in curves))) if curves else []
    return steps, [sum(points[step] for points in curves) / len(curves) for step in steps]


def draw_curves(tables: Tables) -> plt.Figure:
    """Draw the validation loss of some methods, with float32 and with FP8 states."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for axis, states in zip(axes, ("float32", FP8), strict=True):
        for method in SHOWN:
            steps, values = curve(tables, method, states, "val_loss")
            # The last value is that of more of the validation text than the others.
            steps, values = steps[:-1], values[:-1]
            if steps:
                axis.plot([step * TOKENS_A_STEP / 1e3 for step in steps], values, marker=".", label=method)
        axis.set(
            xlabel="thousand tokens", title=f"{'float32' if states == 'float32' else 'FP8'} states", ylim=(2.1, 4.5)
        )
        if axis.lines:
            axis.legend()
    axes[0].set_ylabel("validation loss, nats a byte")
    return figure


def draw_momentum(tables: Tables) -> plt.Figure:
    """Draw histograms of log10 of the states' magnitudes after training with float32 states."""
    shown: Sequence[tuple[str, str]] = (
        ("AdamW", "exp_avg"),
        ("AdamW", "exp_avg_sq"),
        (OURS, "exp_avg"),
        (OURS, "exp_inf"),
    )
    figure, axes = plt.subplots(1, len(shown), figsize=(13, 3.2), layout="constrained")
    for axis, (method, state) in zip(axes, shown, strict=True):
        run = Run(method, tables.best_lr(method), "float32", GEMM, 0, tables.scale.steps, tables.scale.task, STDLIB)
        result = tables.store.results.get(run)
        if result is not None:
            buckets = result.histograms[state]
            axis.bar(list(buckets), [n / sum(buckets.values()) for n in buckets.values()], width=-0.25, align="edge")
        axis.axvline(math.log10(2.0**-10), color="tab:red", lw=1, ls="--", label="0 in unscaled E4M3 below")
        axis.set(title=f"{method}: {state}", xlabel="log10 of the magnitude", xlim=(-14, 0))
    axes[0].set_ylabel("share of the nonzero values")
    axes[0].legend(fontsize="small")
    return figure


def draw_noise(tables: Tables) -> plt.Figure:
    """Draw the RMS of the noise in a step."""
    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for method in METHODS:
        steps, values = curve(tables, method, "float32", "noise_rms")
        if steps:
            axis.plot(steps, values, marker=".", label=method)
    axis.set(xlabel="step", ylabel="RMS of sqrt(1 - u²)", ylim=(0, 1.05))
    if axis.lines:
        axis.legend()
    return figure
