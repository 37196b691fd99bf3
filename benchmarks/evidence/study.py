"""The plan: which runs there are, in which order, and which learning rate each method deserves."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from evidence.runs import FINETUNE, IMAGES, STDLIB, Result, Run, in_worker
from evidence.store import Store

METHODS = (
    "AdamW",
    "StoSignSGD",
    "SignSGD",
    "Lion",
    "Muon",
    "MuonSign",
    "IE-StoSignSGD",
    "StoSignSGDv2",
    "SignConverted(AdamW)",
    "SignConverted(AdaMax)",
    "ALIAS",
)
OURS = "StoSignSGD"
COMPARED = ("AdamW", OURS, "SignSGD")  # where not every method is: for time
ABLATIONS = (
    "StoSignSGD, no momentum",
    "StoSignSGD, beta1 = 0.95",
    "StoSignSGD, beta2 = 0.999",
    "StoSignSGD, beta2 = 0.95",
    "StoSignSGD, m_1 = g_1",
)
MUON_SIGN_RATES = ("MuonSign, rest at half the rate", "MuonSign, rest at twice the rate")

# Where the search for a learning rate begins; it goes on by factors of 2 until the best has a worse one on either side.
STARTS = {
    "AdamW": 4e-3,
    "SignSGD": 1e-3,
    "Lion": 1e-3,
    "Muon": 4e-3,
    "MuonSign": 3.2e-2,
    "SignConverted(AdamW)": 2e-3,
}
START = 2e-3

FP8 = "fp8"  # states: E4M3, one scale a tensor, the paper's coarse scaling
GEMM = "current"  # FP8 matrix products: E4M3 forward, E5M2 gradients
OTHER_STATES = {
    OURS: ("fp8-raw:static_scale=1024", "fp8-block", "fp4-block:stochastic_rounding=true"),
    "AdamW": ("fp8-raw:static_scale=1024", "fp8-block", "fp4-block"),
}
SMALL_STEPS = 200  # of the image and the fine-tuning task
LONGER, BETWEEN = 3, 2  # times the steps of the others; the latter for ours alone
LONGEST = 6  # one seed, for how the ratio of tokens goes on
COMPARED_LONGER = (*COMPARED, "StoSignSGDv2")
# What might raise the ratio, at LONGER times the steps.
ATTEMPTS = (
    "StoSignSGD, m_1 = g_1",
    "StoSignSGD, beta2 = 0.95",
    "StoSignSGD, cosine to 0",
)
LARGER, LARGER_SHARE = "gpt-10m", 1 / 4  # of the steps, at half the learning rates


def bracket(loss: Callable[[float], float], start: float, most: int = 12) -> float:
    """Return the learning rate with the lowest loss among ``start * 2**k``, with a worse one tried on either side.

    Args:
        loss: of a learning rate; inf or NaN where training diverges.
        start: the first one tried.
        most: learning rates to try.

    Raises:
        RuntimeError: no minimum in between after ``most`` of them.

    Example:
        >>> bracket(lambda lr: abs(lr - 0.1), 0.5)
        0.125
    """
    losses: dict[int, float] = {}

    def at(k: int) -> float:
        if k not in losses:
            value = loss(start * 2.0**k)
            losses[k] = math.inf if math.isnan(value) else value
        return losses[k]

    best = 0
    while len(losses) < most:
        best = min((best, best - 1, best + 1), key=at)
        if {best - 1, best + 1} <= losses.keys():
            return start * 2.0**best
    raise RuntimeError(f"no best learning rate in between after {most} of them: {losses}")


@dataclass(frozen=True)
class Scale:
    """What size of a study: of each run and of the whole."""

    steps: int = 400
    task: str = "gpt-1m"
    seeds: int = 3


class Study:
    """Carries out the plan, skipping what the store has.

    Args:
        store: of the results.
        executor: runs ``train``.
        workers: how many runs it takes side by side.
        folder: for checkpoints of unfinished runs.
        scale: of the study.
        compiled: whether to compile the models.
        corpus: the second text, a path; None: only the first.
    """

    def __init__(
        self,
        store: Store,
        executor: Executor,
        workers: int,
        folder: Path,
        scale: Scale,
        compiled: bool,
        corpus: str | None = None,
    ) -> None:
        self.store, self.folder, self.scale, self.compiled, self.corpus = store, folder, scale, compiled, corpus
        self._executor, self._workers = executor, workers
        self._spent: list[float] = []

    def run(self, method: str, lr: float, **settings: object) -> Run:
        """Return a run of this scale."""
        return Run(method, lr, **{"steps": self.scale.steps, "task": self.scale.task, **settings})  # type: ignore[arg-type]

    def result(self, run: Run) -> Result:
        """Return a run's result, from the store or by training."""
        if run not in self.store.results:
            future: Future[Result] = self._executor.submit(in_worker, run, self.folder, self.compiled)
            result = future.result()
            self.store.add(run, result)
            self._spent.append(result.seconds / run.steps)
            print(
                f"{time.strftime('%H:%M:%S')}  {run.name:70} {result.val_loss:.4f}  {result.seconds:.0f} s", flush=True
            )
        return self.store.results[run]

    def results(self, title: str, runs: Iterable[Run]) -> str:
        """Train what is missing of these, side by side; return the title."""
        missing = [run for run in dict.fromkeys(runs) if run not in self.store.results]
        pace = sum(self._spent) / len(self._spent) if self._spent else 0.0
        left = sum(run.steps for run in missing) * pace / self._workers
        print(f"{title}: {len(missing)} runs, about {left / 60:.0f} minutes", flush=True)
        with ThreadPoolExecutor(self._workers) as threads:
            list(threads.map(self.result, missing))
        return title

    def best_lr(self, method: str, start: float, /, **settings: object) -> float:
        """Return a method's best learning rate: float32 throughout, seed 0."""
        if method == "ALIAS":
            return 1.0
        return bracket(lambda lr: self.result(self.run(method, lr, **settings)).val_loss, start)

    def tune(
        self, methods: Iterable[str], starts: dict[str, float] | None = None, /, **settings: object
    ) -> dict[str, float]:
        """Return the best learning rate of each, from where the search is to begin."""
        first = {method: (starts or STARTS).get(method, START) for method in methods}
        print(f"learning rates of {', '.join(first)}", flush=True)
        with ThreadPoolExecutor(self._workers) as threads:
            found = threads.map(lambda item: self.best_lr(item[0], item[1], **settings), first.items())
            return dict(zip(first, found, strict=True))

    def seeds(self, run: Run) -> list[Run]:
        """Return a run with each seed."""
        return [replace(run, seed=seed) for seed in range(self.scale.seeds)]

    def everything(self) -> Iterator[str]:
        """Carry out the plan, what matters most first; yields the title of each part that is done."""
        best = self.tune(METHODS)
        yield "learning rates"
        compared = {method: best[method] for method in COMPARED}
        yield self.results("float32 and FP8 states", self.pairs(compared))
        yield self.results("AdamW at each learning rate", self.at_each_rate("AdamW"))
        for task in (IMAGES, FINETUNE):
            settings = {"task": task, "steps": SMALL_STEPS}
            rates = self.tune(COMPARED, None, **settings)
            yield self.results(task, self.pairs(rates, gemm="float32", **settings))
        longer = self.tune(COMPARED_LONGER, best, steps=LONGER * self.scale.steps)
        yield self.results("longer runs", self.longer({method: longer[method] for method in ("AdamW", OURS)}))
        rates = {method: best[method] for method in (*COMPARED, "IE-StoSignSGD")} | self.tune(ABLATIONS)
        yield self.results("parts of StoSignSGD", self.fp8(rates, gemm="float32"))
        yield self.results("longer runs of the others", self.longer(longer))
        yield self.results("every method", self.fp8(best))
        formats = [(method, states) for method, others in OTHER_STATES.items() for states in others]
        runs = [run for method, states in formats for run in self.fp8({method: best[method]}, states=states)]
        yield self.results("other formats of the states", runs)
        if self.corpus is not None:
            yield self.results("another text", self.pairs(compared, corpus=self.corpus))
        self.tune(("AdamW", OURS), longer, steps=LONGEST * self.scale.steps)
        yield "the longest runs"
        rest = dict.fromkeys(("MuonSign", *MUON_SIGN_RATES), best["MuonSign"])
        yield self.results("Muon's partner", self.pairs(rest, gemm="float32"))
        every = self.pairs(best)
        yield self.results("FP8 states of every method, one seed", [run for run in every if run.seed == 0])
        if self.scale.task != LARGER:
            yield self.results("a larger model", self.larger(best))
        self.tune(ATTEMPTS, dict.fromkeys(ATTEMPTS, longer[OURS]), steps=LONGER * self.scale.steps)
        yield "attempts"
        yield self.results("FP8 states of every method", every)

    def fp8(self, rates: dict[str, float], **settings: object) -> list[Run]:
        """Return runs with FP8 matrix products, of each method at its learning rate, with each seed."""
        return [
            run
            for method, lr in rates.items()
            for run in self.seeds(self.run(method, lr, **{"gemm": GEMM, **settings}))
        ]

    def pairs(self, rates: dict[str, float], **settings: object) -> list[Run]:
        """Return the same with float32 and with FP8 states."""
        return [run for states in ("float32", FP8) for run in self.fp8(rates, states=states, **settings)]

    def at_each_rate(self, method: str) -> list[Run]:
        """Return the pairs of a method at each learning rate of its search."""
        scale = {"steps": self.scale.steps, "task": self.scale.task, "corpus": STDLIB}
        rates = sorted({run.lr for run in self.store.losses(method=method, gemm="float32", **scale)})
        runs = [run for lr in rates for run in self.pairs({method: lr})]
        return sorted(runs, key=lambda run: run.states == "float32")  # what FP8 states do comes first

    def longer(self, rates: dict[str, float]) -> list[Run]:
        """Return runs of three times the steps, and ours of twice; float32 throughout.

        Args:
            rates: the learning rate of each method for three times the steps.
        """
        runs = self.fp8(rates, gemm="float32", steps=LONGER * self.scale.steps)
        steps = BETWEEN * self.scale.steps
        ours = self.tune((OURS,), {OURS: rates[OURS] / 2}, steps=steps)
        return runs + self.fp8(ours, gemm="float32", steps=steps)

    def larger(self, best: dict[str, float]) -> list[Run]:
        """Return runs of a model with ten times the parameters; one seed, its rates not tuned."""
        settings = {"gemm": "float32", "task": LARGER, "steps": round(LARGER_SHARE * self.scale.steps)}
        rates = {method: best[method] / 2 for method in ("AdamW", OURS)}
        return [run for run in self.pairs(rates, **settings) if run.seed == 0]
