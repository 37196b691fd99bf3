"""What the results say: means over seeds with their spread, and the tables of RESULTS.md."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from evidence.runs import FINETUNE, IMAGES, STDLIB, Run
from evidence.store import Store
from evidence.study import (
    ABLATIONS,
    ATTEMPTS,
    COMPARED,
    COMPARED_LONGER,
    FP8,
    GEMM,
    LARGER,
    LARGER_SHARE,
    LONGER,
    LONGEST,
    METHODS,
    MUON_SIGN_RATES,
    OTHER_STATES,
    OURS,
    SMALL_STEPS,
    Scale,
)

DIVERGED = 100.0  # nats: what is above says no more


class Losses(NamedTuple):
    """Validation losses of one setting, by seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values) if self.values else math.nan

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        n = len(self.values)
        return statistics.stdev(self.values) / math.sqrt(n) if n > 1 and math.isfinite(self.mean) else math.nan

    def __str__(self) -> str:
        if not self.values:
            return "-"
        diverged = sum(value > DIVERGED for value in self.values)
        if diverged:
            return "diverges" if diverged == len(self.values) else f"diverges in {diverged} of {len(self.values)}"
        return f"{self.mean:.3f}" if math.isnan(self.error) else f"{self.mean:.3f} ± {self.error:.3f}"


Row = Sequence[Any]


def markdown(titles: Row, rows: Iterable[Row]) -> str:
    """Return a table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


class Tables:
    """The tables of a study of one scale.

    Args:
        store: the results.
        scale: of the runs to tell about.
    """

    def __init__(self, store: Store, scale: Scale) -> None:
        self.store, self.scale = store, scale

    def _found(self, method: str, **settings: Any) -> dict[Run, float]:
        """Return the losses of a method's runs; float32 throughout, the scale's steps and task unless set."""
        usual: dict[str, Any] = {"states": "float32", "gemm": "float32", "corpus": STDLIB}
        usual.update(steps=self.scale.steps, task=self.scale.task)
        return self.store.losses(method=method, **{**usual, **settings})

    def losses(self, method: str, lr: float, **settings: Any) -> Losses:
        """Return the losses of a setting's seeds; what is usual is as in the search for learning rates."""
        found = self._found(method, lr=lr, **settings)
        return Losses(tuple(loss for _, loss in sorted(found.items(), key=lambda item: item[0].seed)))

    def grid(self, method: str, **settings: Any) -> dict[float, float]:
        """Return the losses of the search for a learning rate."""
        found = self._found(method, **{"seed": 0, **settings})
        return {run.lr: loss for run, loss in sorted(found.items(), key=lambda item: item[0].lr)}

    def best_lr(self, method: str, **settings: Any) -> float:
        """Return the best learning rate of the search, NaN before it has begun."""
        grid = self.grid(method, **settings)
        if method == "ALIAS":
            return 1.0
        return min(grid, key=lambda lr: grid[lr]) if grid else math.nan

    def fp8(self, method: str, lr: float | None = None, **settings: Any) -> Losses:
        """Return the losses with FP8 matrix products at the method's best learning rate, or another."""
        return self.losses(method, self.best_lr(method) if lr is None else lr, **{"gemm": GEMM, **settings})

    def rates(self) -> str:
        """Return the search for learning rates."""
        rows = []
        for method in (*METHODS, *ABLATIONS):
            grid = self.grid(method)
            if grid and method != "ALIAS":
                best = self.best_lr(method)
                cells = [
                    f"**{lr:g}: {loss:.3f}**" if lr == best else f"{lr:g}: {loss:.3f}" for lr, loss in grid.items()
                ]
                rows.append((method, ", ".join(cells)))
        return markdown(("method", "peak learning rate: validation loss"), rows)

    def methods(self) -> str:
        """Return what each method reaches with float32 and with FP8 states."""
        rows = []
        for method in METHODS:
            full, low = self.fp8(method), self.fp8(method, states=FP8)
            if full.values:
                rows.append((method, f"{self.best_lr(method):g}", full, low, difference(low, full)))
        return markdown(("method", "peak lr", "float32 states", "FP8 states", "difference"), rows)

    def collapse(self) -> str:
        """Return AdamW with FP8 states at each learning rate of its grid, and the others compared at their best."""
        others = [(method, self.best_lr(method)) for method in COMPARED if method != "AdamW"]
        return self.pairs([*(("AdamW", lr) for lr in self.grid("AdamW")), *others])

    def pairs(self, methods: Iterable[tuple[str, float]]) -> str:
        """Return methods at learning rates with float32 and with FP8 states, FP8 matrix products."""
        rows = []
        for method, lr in methods:
            full, low = self.fp8(method, lr), self.fp8(method, lr, states=FP8)
            if full.values and low.values:
                worse = "yes" if min(low.values) > max(full.values) else "no"
                rows.append((method, f"{lr:g}", full, low, difference(low, full), worse))
        return markdown(
            ("method", "peak lr", "float32 states", "FP8 states", "difference", "worse with every seed"), rows
        )

    def formats(self) -> str:
        """Return the loss by format of the states."""
        rows = []
        for method, others in OTHER_STATES.items():
            for states in ("float32", FP8, *others):
                losses = self.fp8(method, states=states)
                if losses.values:
                    rows.append((method, states, losses, difference(losses, self.fp8(method))))
        return markdown(("method", "states", "validation loss", "above float32"), rows)

    def muon(self) -> str:
        """Return Muon with each partner, and AdamW, at the learning rates tried with FP8 states; float32 products."""
        rows = []
        for method in ("AdamW", "Muon", "MuonSign", *MUON_SIGN_RATES):
            settings = {"steps": self.scale.steps, "task": self.scale.task, "corpus": STDLIB, "gemm": "float32"}
            with_fp8 = {run.lr for run in self.store.losses(method=method, states=FP8, **settings)}
            for lr in sorted(with_fp8 or {self.best_lr(method)}):
                full, low = self.losses(method, lr), self.losses(method, lr, states=FP8)
                if full.values or low.values:
                    seeds = max(len(full.values), len(low.values))
                    rows.append((method, f"{lr:g}", full, low, difference(low, full), seeds))
        return markdown(("method", "peak lr", "float32 states", "FP8 states", "difference", "seeds"), rows)

    def ablations(self) -> str:
        """Return the variants of StoSignSGD, each at its best learning rate, without FP8."""
        rows = []
        for method in (OURS, "IE-StoSignSGD", "SignSGD", *ABLATIONS):
            lr = self.best_lr(method)
            losses = self.losses(method, lr) if not math.isnan(lr) else Losses(())
            if losses.values:
                rows.append((method, f"{lr:g}", losses, len(losses.values)))
        return markdown(("method", "peak lr", "validation loss", "seeds"), rows)

    def small_tasks(self) -> str:
        """Return the image and the fine-tuning task."""
        rows = []
        for task in (IMAGES, FINETUNE):
            for method in COMPARED:
                settings = {"task": task, "steps": SMALL_STEPS}
                lr = self.best_lr(method, **settings)
                full = self.losses(method, lr, **settings)
                low = self.losses(method, lr, states=FP8, **settings)
                if full.values:
                    score = "accuracy" if task == IMAGES else "val_accuracy"
                    rows.append(
                        (task, method, f"{lr:g}", full, low, difference(low, full), self.score(method, lr, score, task))
                    )
        return markdown(
            ("task", "method", "peak lr", "float32 states", "FP8 states", "difference", "accuracy with FP8 states"),
            rows,
        )

    def score(self, method: str, lr: float, tag: str, task: str) -> str:
        """Return the mean of the last values of a curve, with FP8 states, in percent."""
        found = self.store.losses(method=method, lr=lr, states=FP8, task=task)
        last = [max(self.store.results[run].curves[tag].items())[1] for run in found]
        return f"{statistics.mean(last):.1%}" if last else "-"

    def other_text(self) -> str:
        """Return the same at the same learning rates on the second text."""
        rows = []
        for corpus in sorted({run.corpus for run in self.store.results} - {STDLIB}):
            for method in COMPARED:
                full, low = self.fp8(method, corpus=corpus), self.fp8(method, corpus=corpus, states=FP8)
                if full.values:
                    rows.append((corpus.rpartition("/")[2], method, full, low, difference(low, full)))
        return markdown(("text", "method", "float32 states", "FP8 states", "difference"), rows)

    def longer(self) -> str:
        """Return what is compared, by the number of steps, each at its best learning rate for that many."""
        rows = []
        for method in COMPARED_LONGER:
            for steps in self.lengths():
                lr = self.best_lr(method, steps=steps)
                losses = self.losses(method, lr, steps=steps)
                if losses.values:
                    rows.append((method, steps, f"{lr:g}", losses, len(losses.values)))
        return markdown(("method", "steps", "peak lr", "validation loss", "seeds"), rows)

    def larger(self) -> str:
        """Return what a larger model does; one seed, learning rates not tuned."""
        rows = []
        settings = {"task": LARGER, "steps": round(LARGER_SHARE * self.scale.steps)}
        for method in ("AdamW", OURS):
            lr = self.best_lr(method) / 2
            full, low = self.losses(method, lr, **settings), self.losses(method, lr, states=FP8, **settings)
            if full.values:
                rows.append((LARGER, method, settings["steps"], f"{lr:g}", full, low, difference(low, full)))
        return markdown(("model", "method", "steps", "peak lr", "float32 states", "FP8 states", "difference"), rows)

    def attempts(self) -> str:
        """Return what might have raised the ratio of tokens, one seed, each at the best learning rate tried."""
        steps, rows = LONGER * self.scale.steps, []
        for method in ("AdamW", OURS, *ATTEMPTS):
            grid = self.grid(method, steps=steps)
            if grid:
                best = min(grid, key=lambda lr: grid[lr])
                rows.append((method, len(grid), f"{best:g}", f"{grid[best]:.3f}"))
        return markdown(("method", "rates tried", "best peak lr", "validation loss"), rows)

    def lengths(self) -> list[int]:
        """Return the numbers of steps for which StoSignSGD has been trained with float32 throughout."""
        runs = self.store.losses(method=OURS, gemm="float32", states="float32", task=self.scale.task, corpus=STDLIB)
        return sorted({run.steps for run in runs})

    def ratios(self) -> str:
        """Return how many more tokens a baseline needs for its final loss than StoSignSGD for the same loss."""
        every = {steps: self.losses(OURS, self.best_lr(OURS, steps=steps), steps=steps) for steps in self.lengths()}
        rows = []
        for steps in (self.scale.steps, LONGER * self.scale.steps, LONGEST * self.scale.steps):
            seeds = len(every[steps].values) if steps in every else 0
            ours = {n: losses for n, losses in every.items() if len(losses.values) >= seeds}
            for method in COMPARED_LONGER:
                target = self.losses(method, self.best_lr(method, steps=steps), steps=steps)
                if method == OURS or not target.values or not seeds:
                    continue
                reached = [
                    steps_to(target.mean, {n: losses.values[seed] for n, losses in ours.items()})
                    for seed in range(seeds)
                ]
                rows.append((method, steps, target, ours[steps], *ratio_cells(steps, reached, max(ours))))
        titles = ("baseline", "its steps", "its loss", f"{OURS}'s loss", "ratio of tokens", "seed by seed")
        return markdown(titles, rows)


def difference(low: Losses, full: Losses) -> str:
    """Return the difference of the means, with its standard error where both have one."""
    if not low.values or not full.values or not low.mean < DIVERGED:
        return "-"
    error = math.hypot(low.error, full.error)
    return f"{low.mean - full.mean:+.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")


def steps_to(loss: float, by_steps: dict[int, float]) -> float:
    """Return the steps at which a loss is reached, in between by the logarithm of the steps.

    Args:
        loss: to reach.
        by_steps: the final loss of a run, by the number of steps its schedule is made for.

    Returns:
        The steps, at least those of the shortest run; inf if the longest does not reach it.

    Example:
        >>> round(steps_to(2.5, {100: 3.0, 400: 2.0}))
        200
    """
    points = sorted(by_steps.items())
    for (before, high), (after, low) in zip([(points[0][0], math.inf), *points], points, strict=False):
        if low <= loss:
            if before == after:
                return float(after)
            return before * (after / before) ** ((high - loss) / (high - low))
    return math.inf


def ratio_cells(steps: int, reached: Sequence[float], longest: int) -> tuple[str, str]:
    """Return the ratio's mean over seeds and the single ones."""
    ratios = [steps / value for value in reached]
    each = ", ".join(f"{ratio:.2f}" if ratio > 0 else f"below {steps / longest:.2f}" for ratio in ratios)
    if 0.0 in ratios:
        return f"below {max(steps / longest, max(ratios)):.2f}", each
    losses = Losses(tuple(ratios))
    return (f"{losses.mean:.2f}" if math.isnan(losses.error) else f"{losses.mean:.2f} ± {losses.error:.2f}"), each
