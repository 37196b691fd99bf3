"""communication.md and its figure, from whatever has been measured."""

import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch

from links.store import Key, Store

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PLOTTED_RATES = (10.0, 100.0)
MARKS = (0.1, 0.25, 0.5, 1.0)  # of the time that the table of losses covers
SIZES = {"1m": "0.8 M", "10m": "10.8 M"}


class Report:
    """What the store says, in words.

    Args:
        store: the measurements.
        methods: in the order in which they are shown.
        baseline: the method that the others are compared with; what is sent uncompressed takes as long as its steps.
        uncompressed: how many of PowerSGD's first steps are uncompressed.
    """

    def __init__(self, store: Store, methods: Sequence[str], baseline: str, uncompressed: int) -> None:
        self.store, self.methods, self.baseline, self.uncompressed = store, methods, baseline, uncompressed

    def keys(self, measure: str) -> list[Key]:
        return [key for key in self.store.found if key.measure == measure]

    def traffic(self) -> str:
        """Bytes a step by number of workers, and how many times less than the baseline's."""
        columns = sorted({(key.size, key.workers) for key in self.keys("traffic")})
        rows = []
        for method in self.methods:
            cells = []
            for size, workers in columns:
                key = Key("traffic", size, workers, None, method)
                ours = self.store.value(key, "bytes_a_step")
                baseline = self.store.value(key._replace(method=self.baseline), "bytes_a_step")
                ratio = f" ({baseline / ours:.1f}x)" if ours and baseline else ""
                cells.append(f"{ours / 1e3:,.0f} kB{ratio}" if ours else "-")
            if any(cell != "-" for cell in cells):
                rows.append([method, *cells])
        return table(["method", *(f"{SIZES[size]} values, {workers} workers" for size, workers in columns)], rows)

    def seconds_without(self, size: str) -> float:
        """Return the seconds of a step without communication: the same for all methods, but for what else runs."""
        found = [self.store.found[key] for key in self.keys("steps") if key.size == size]
        return min(last(of["seconds_a_step"]) - last(of["seconds_exposed"]) for of in found)

    def seconds_a_step(self, size: str, mbit: float, method: str) -> float | None:
        """Return the seconds of a step: those without communication, and what the method adds to them."""
        exposed = self.store.value(Key("steps", size, 2, mbit, method), "seconds_exposed")
        return None if exposed is None else self.seconds_without(size) + max(exposed, 0.0)

    def steps(self) -> str:
        """Seconds that communication adds to a step, by the link's rate."""
        columns = sorted({(key.size, key.mbit or 0.0) for key in self.keys("steps")})
        rows = []
        for method in self.methods:
            cells = []
            for size, mbit in columns:
                key = Key("steps", size, 2, mbit, method)
                ours = self.store.value(key, "seconds_exposed")
                baseline = self.store.value(key._replace(method=self.baseline), "seconds_exposed")
                ratio = f" (1/{baseline / ours:.1f})" if ours and baseline and 0 < ours < baseline else ""
                cells.append("-" if ours is None else f"{ours:.2f} s{ratio}")
            if any(cell != "-" for cell in cells):
                rows.append([method, *cells])
        sizes = sorted({size for size, _ in columns})
        without = ", ".join(f"{self.seconds_without(size):.2f} s with {SIZES[size]} values" for size in sizes)
        head = ["communication adds", *(f"{SIZES[size]} values, {mbit:g} Mbit/s" for size, mbit in columns)]
        return table(head, rows) + (
            f"\n\nA step without communication takes {without}: the least of all, as other work only adds to it."
        )

    def by_time(self, size: str, mbit: float, method: str) -> list[tuple[float, float]]:
        """Return (seconds, validation loss): the losses by step, and the steps placed on the clock."""
        of_step = self.seconds_a_step(size, mbit, method)
        of_first = self.seconds_a_step(size, mbit, self.baseline)
        if of_step is None or of_first is None:
            return []
        first = self.uncompressed if method.startswith("PowerSGD") else 0
        losses = self.store.series(Key("loss", size, 2, None, method), "validation_loss")
        return [(min(step, first) * of_first + max(step - first, 0) * of_step, loss) for step, loss in losses.items()]

    def by_bytes(self, size: str, method: str) -> list[tuple[float, float]]:
        """Return (megabytes sent by a worker, validation loss)."""
        key = Key("loss", size, 2, None, method)
        sent = self.store.series(key, "bytes_sent")
        return [(sent[step] / 1e6, loss) for step, loss in self.store.series(key, "validation_loss").items()]

    def losses(self, size: str, mbit: float) -> str:
        """Validation loss as time passes at a rate."""
        curves = {method: self.by_time(size, mbit, method) for method in self.methods}
        curves = {method: curve for method, curve in curves.items() if curve}
        if not curves:
            return ""
        end = min(curve[-1][0] for curve in curves.values())
        rows = []
        for method, curve in curves.items():
            by_then = [[loss for seconds, loss in curve if seconds <= end * mark] for mark in MARKS]
            rows.append([method, *(f"{losses[-1]:.3f}" if losses else "-" for losses in by_then)])
        return table([f"at {mbit:g} Mbit/s", *(f"{end * mark:.0f} s" for mark in MARKS)], rows)

    def quality(self) -> str:
        """Validation loss after equally many steps, each method at its best rate, over the seeds run at it."""
        runs: dict[Key, dict[float, list[float]]] = {}
        for key in self.store.found:
            if key.measure.startswith("quality") and key.lr is not None:
                value = self.store.value(key, "validation_loss")
                if value is not None:
                    runs.setdefault(key._replace(lr=None, seed=0), {}).setdefault(key.lr, []).append(value)
        rows = []
        for key, of_lr in sorted(runs.items(), key=lambda run: (run[0][:3], min(min(v) for v in run[1].values()))):
            best = min(of_lr, key=lambda lr: of_lr[lr][0])
            values = of_lr[best]
            spread = f" ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
            tried = ", ".join(f"{lr:g}: {of_lr[lr][0]:.3f}" for lr in sorted(of_lr) if lr != best)
            after = key.measure.removeprefix("quality after ")
            loss = f"{statistics.mean(values):.3f}{spread}"
            rows.append([key.method, SIZES[key.size], key.workers, after, loss, len(values), f"{best:g}", tried])
        head = ["method", "values", "workers", "steps", "validation loss", "seeds", "at lr", "other rates, seed 0"]
        return table(head, rows)

    def draw(self, size: str) -> plt.Figure:
        """Loss by time at each rate, and by bytes."""
        figure, axes = plt.subplots(1, len(PLOTTED_RATES) + 1, figsize=(15, 4.5), sharey=True)
        for axis, mbit in zip(axes, PLOTTED_RATES, strict=False):
            curves = {method: self.by_time(size, mbit, method) for method in self.methods}
            _plot(axis, curves, f"seconds at {mbit:g} Mbit/s")
        _plot(axes[-1], {method: self.by_bytes(size, method) for method in self.methods}, "MB sent by a worker")
        by_bytes = [self.by_bytes(size, method) for method in self.methods]
        losses = [loss for curve in by_bytes for _, loss in curve]
        # No higher than where they begin: PowerSGD may leave the figure for some steps.
        axes[0].set_ylim(min(losses) - 0.05, max(curve[0][1] for curve in by_bytes if curve) + 0.05)
        axes[0].set_ylabel("validation loss, nats a byte")
        axes[-1].legend(fontsize=8)
        figure.tight_layout()
        return figure


def _plot(axis: plt.Axes, curves: dict[str, list[tuple[float, float]]], label: str) -> None:
    for color, (method, curve) in enumerate(curves.items()):
        if not curve:
            continue
        style = "-" if method.startswith(("sign", "votes")) else "--" if method.startswith("PowerSGD") else ":"
        axis.plot([x for x, _ in curve], [loss for _, loss in curve], style, color=f"C{color}", label=method)
    axis.set_xscale("log")
    axis.set_xlabel(label)
    axis.grid(alpha=0.3)


def last(series: dict[int, float]) -> float:
    """Return the value after the most steps."""
    return series[max(series)]


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def write(store: Store, folder: Path, methods: Sequence[str], baseline: str, uncompressed: int) -> str:
    """Write communication.md and, if losses were measured, communication.png.

    Args:
        store: the measurements.
        folder: where to write to.
        methods: in the order in which they are shown.
        baseline: the method that the others are compared with.
        uncompressed: how many of PowerSGD's first steps are uncompressed.

    Returns:
        The text.
    """
    report = Report(store, methods, baseline, uncompressed)
    sections = [
        "# What gradients cost on the wire",
        "Written by `python benchmarks/communication.py report` from communication.csv: do not edit. Hosts are network"
        " namespaces of one machine, each worker one thread"
        f" ({platform.machine()}, torch {torch.__version__}, gloo). GPTs of `examples/gpt.py`, StoSignSGD at 2e-3.",
    ]
    if report.keys("traffic"):
        sections += ["## Bytes a step that leave a worker's card, by the kernel's count", report.traffic()]
    if report.keys("steps"):
        sections += [
            "## Time that communication adds to a step",
            "Two hosts on 2 CPU cores, 4 x 128 tokens each. Steps with and without communication in turn, median of the"
            f" pairs' differences; in brackets, as a part of {baseline}'s. What a method computes is in it.",
            report.steps(),
        ]
    for size in sorted({key.size for key in report.keys("loss")}):
        sections += [
            "## Validation loss by time",
            "The losses by step are those of one run of each method (one seed, 2 workers, 4 x 128 tokens each, linear"
            " warm-up of the learning rate over 10 steps, then constant). The clock is put together: a step takes what"
            " it takes without communication, and what the table above says that the method adds; PowerSGD's first"
            f" {uncompressed}, uncompressed, what {baseline}'s take."
            " The last look at the loss by then; - before the first.",
            *filter(None, (report.losses(size, mbit) for mbit in PLOTTED_RATES)),
            "![Validation loss by time and by bytes; losses above the first ones are cut off](communication.png)",
        ]
        figure = report.draw(size)
        figure.savefig(folder / "communication.png", dpi=110)
        plt.close(figure)
    if any(key.measure.startswith("quality") for key in store.found):
        sections += [
            "## Validation loss after equally many steps",
            "Each method at its own best learning rate, of a grid by factors of 2 with a worse rate on either side."
            " Mean and standard error over seeds. 4 x 128 tokens per worker and step, warm-up over a tenth of the steps"
            " and linear decay to a tenth of the rate. Gradients are clipped to norm 1: the average gradient, or each"
            " worker's own where workers vote on updates; not where the gradient is made of signs. In simulated"
            " runs each worker is a thread of one process, with the same bits (tests/benchmarks/test_simulation.py).",
            report.quality(),
        ]
    text = "\n\n".join(sections) + "\n"
    (folder / "communication.md").write_text(text)
    return text
