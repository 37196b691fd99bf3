"""The study behind RESULTS.md: the search, the store, what is made of the numbers, and one run of each task."""

import csv
import math
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
from evidence import runs as runs_module
from evidence import study as study_module
from evidence.report import write
from evidence.runs import FINETUNE, IMAGES, Result, Run, train
from evidence.store import Store
from evidence.study import FP8, METHODS, OURS, Scale, Study, bracket
from evidence.tables import Losses, Tables, difference, markdown, ratio_cells, steps_to
from hypothesis import given
from hypothesis import strategies as st

SMALL = Scale(steps=8, seeds=2)


def result(loss=2.5, **fields):
    return Result(
        **{"diverged_at": None, "collapsed_at": None, "report": "", "seconds": 1.0, "val_loss": loss, **fields}
    )


@given(best=st.floats(-4, 4), start=st.sampled_from([1e-4, 1e-3, 1.0]))
def test_bracket_has_the_best_of_the_grid_with_a_worse_one_on_either_side(best, start):
    tried = {}

    def loss(lr):
        assert lr not in tried, "trained twice"
        tried[lr] = abs(math.log2(lr / start) - best)
        return tried[lr]

    found = bracket(loss, start)
    assert tried[found] == min(tried.values())
    assert {found / 2, found * 2} <= tried.keys()


def test_bracket_goes_away_from_rates_that_diverge():
    assert bracket(lambda lr: math.nan if lr >= 1 else (lr - 0.06) ** 2, 1.0) == 2.0**-4


def test_bracket_without_a_minimum_says_so():
    with pytest.raises(RuntimeError, match="no best learning rate"):
        bracket(lambda lr: lr, 1.0)


def test_store_gives_back_what_was_added_in_another_process(tmp_path):
    run = Run("StoSignSGD, m_1 = g_1", 1e-3, corpus="texts/kjv.txt")
    full = result(
        curves={"val_loss": {1: 3.0, 2: 2.5}, "zero_fraction/exp_avg": {1: 0.25}},
        histograms={"exp_avg": {-3.5: 2.0}},
        collapsed_at=7,
        report="| a |\n| --- |\n, and more",
    )
    diverged = result(math.nan, diverged_at=3)
    store = Store(tmp_path)
    store.add(run, full)
    store.add(replace(run, seed=1), diverged)
    again = Store(tmp_path).results
    assert again[run] == full
    assert math.isnan(again[replace(run, seed=1)].val_loss) and again[replace(run, seed=1)].diverged_at == 3
    assert Store(tmp_path).losses(seed=1) == {replace(run, seed=1): math.inf}


def test_store_refuses_other_columns_and_half_a_row(tmp_path):
    Store(tmp_path).add(Run("AdamW", 1e-3), result())
    path = tmp_path / "runs.csv"
    whole = path.read_text()
    path.write_text(whole + "AdamW,0.002,fl")
    with pytest.raises(ValueError, match="middle of a row"):
        Store(tmp_path).add(Run("AdamW", 2e-3), result())
    path.write_text(whole.replace("method", "optimizer", 1))
    with pytest.raises(ValueError, match="has the columns"):
        Store(tmp_path)


class Executor:
    """An executor that answers at once, and counts."""

    def __init__(self, loss):
        self.loss, self.asked = loss, []

    def submit(self, function, run, folder, compiled):
        self.asked.append(run)
        future = Future()
        curve = {
            "val_loss": {4: 3.0, 8: self.loss(run)},
            "noise_rms": {7: 0.9},
            "accuracy": {8: 0.9},
            "val_accuracy": {8: 0.5},
        }
        states = {"exp_avg": {-3.0: 1.0}, "exp_avg_sq": {-6.0: 1.0}, "exp_inf": {-2.0: 1.0}}
        future.set_result(result(self.loss(run), curves=curve, histograms=states))
        return future


def losses_of_a_story(run):
    """AdamW cannot do with FP8 states; its best rate is 2e-3; twice the steps take 0.5 off everybody."""
    base = 2.0 + 0.1 * abs(math.log2(run.lr / 2e-3)) + 0.01 * run.seed - 0.5 * math.log2(run.steps / SMALL.steps)
    return base + (3.0 if run.method == "AdamW" and run.states.startswith("fp8") else 0.0) + (run.method != OURS) * 0.25


def test_study_carries_out_its_plan_once_and_the_report_tells_it(tmp_path):
    executor, store = Executor(losses_of_a_story), Store(tmp_path)
    study = Study(store, executor, 1, tmp_path, SMALL, compiled=False, corpus="kjv.txt")
    for stage, _ in enumerate(study.everything()):
        if stage % 8 == 0:  # the report can be written at any time
            write(store, SMALL, "python study.py")
    text = write(store, SMALL, "python study.py").read_text()
    assert len(executor.asked) == len(set(executor.asked)) == len(store.results)
    assert {run.method for run in executor.asked} >= set(METHODS)
    for lr in ("0.001", "0.002", "0.004"):  # each rate of the grid, none at its edge
        assert f"| AdamW | {lr} |" in text
    assert "| AdamW | 0.002 | 2.255 ± 0.005 | 5.255 ± 0.005 | +3.000 ± 0.007 | yes |" in text
    assert "| StoSignSGD | 0.002 | 2.005 ± 0.005 | 2.005 ± 0.005 | +0.000 ± 0.007 | no |" in text
    # 0.25 nats are half of what twice the steps give: the baseline needs the square root of 2 times the tokens.
    assert "1.41 ± 0.01" in text
    assert "kjv.txt" in text
    (tmp_path / "guard.txt").write_text("$ python benchmarks/guard.py\nstops at step 3\n")
    (tmp_path / "wire.md").write_text("# On the wire\n\n## Bytes\n\n8\n")
    text = write(store, SMALL, "python study.py").read_text()
    assert "### On the wire\n\n#### Bytes\n\n8\n" in text
    assert "### guard\n\n```\n$ python benchmarks/guard.py\nstops at step 3\n```" in text
    executor.asked.clear()
    for _ in Study(Store(tmp_path), executor, 1, tmp_path, SMALL, compiled=False, corpus="kjv.txt").everything():
        assert executor.asked == []


def test_steps_to_a_loss():
    by_steps = {100: 3.0, 400: 2.0, 800: 1.0}
    assert steps_to(2.5, by_steps) == pytest.approx(200)
    assert steps_to(2.0, by_steps) == pytest.approx(400)
    assert steps_to(3.5, by_steps) == 100
    assert steps_to(0.5, by_steps) == math.inf
    assert ratio_cells(400, [200.0, 400.0], 800) == ("1.50 ± 0.50", "2.00, 1.00")
    assert ratio_cells(400, [400.0, math.inf], 800) == ("below 1.00", "1.00, below 0.50")


def test_losses_in_words():
    assert str(Losses((2.0, 2.2))) == "2.100 ± 0.100"
    assert str(Losses((2.0, math.inf))) == "diverges in 1 of 2"
    assert str(Losses((math.inf,))) == str(Losses((2e12,))) == "diverges"
    assert difference(Losses((2e12,)), Losses((1.5,))) == "-"
    assert difference(Losses((2.0,)), Losses((1.5,))) == "+0.500"
    assert difference(Losses((math.inf,)), Losses((1.5,))) == "-"
    assert markdown(("a|b",), [(1,)]) == "| a\\|b |\n| --- |\n| 1 |"


@pytest.mark.parametrize("task", ["gpt-1m", IMAGES, FINETUNE])
@pytest.mark.filterwarnings("ignore")
def test_a_run_of_each_task_reports_its_loss_and_curves(task, tmp_path, monkeypatch):
    monkeypatch.setattr(runs_module, "VALIDATION_BATCHES", 1)
    monkeypatch.setattr(runs_module, "LOOK_BATCHES", 1)
    outcome = train(Run(OURS, 1e-3, states=FP8, steps=8, task=task), tmp_path, compiled=False)
    assert 0 < outcome.val_loss < 6 and outcome.diverged_at is None
    assert max(outcome.curves["val_loss"]) == 8 and len(outcome.curves["zero_fraction/exp_inf"]) >= 7
    assert sum(outcome.histograms["exp_avg"].values()) > 1000
    assert list(tmp_path.iterdir()) == []  # nothing is left


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_run_that_was_killed_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(runs_module, "VALIDATION_BATCHES", 1)
    monkeypatch.setattr(runs_module, "LOOK_BATCHES", 1)
    run, steps = Run(OURS, 1e-3, states=FP8, steps=16), []
    whole = train(run, tmp_path, compiled=False)

    class Killed(BaseException):
        pass

    original = runs_module.StopWhenNotFinite.on_train_batch_end

    def kill(self, trainer, *args):
        original(self, trainer, *args)
        steps.append(trainer.global_step)
        if len(steps) == 11:
            raise Killed

    monkeypatch.setattr(runs_module.StopWhenNotFinite, "on_train_batch_end", kill)
    with pytest.raises(Killed):
        train(run, tmp_path, compiled=False)
    resumed = train(run, tmp_path, compiled=False)
    assert steps[11] > 1  # not from the start
    assert resumed.val_loss == whole.val_loss
    assert resumed.curves == whole.curves


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_diverges_stops_and_says_when(tmp_path):
    outcome = train(Run("AdamW", 1e30, steps=8), tmp_path, compiled=False)
    assert math.isnan(outcome.val_loss) and 1 <= outcome.diverged_at < 8


def test_first_momentum_is_the_first_gradient(tmp_path, monkeypatch):
    betas = []
    original = runs_module.FirstMomentum.on_train_batch_start

    def record(self, trainer, *args):
        original(self, trainer, *args)
        betas.append(trainer.optimizers[0].param_groups[0]["betas"][0])

    monkeypatch.setattr(runs_module.FirstMomentum, "on_train_batch_start", record)
    train(Run("StoSignSGD, m_1 = g_1", 1e-3, steps=3, task=IMAGES), tmp_path, compiled=False)
    assert betas == [0.0, 0.9, 0.9]


def test_every_method_of_the_plan_can_be_built():
    for method in (*METHODS, *study_module.ABLATIONS):
        assert set(runs_module.METHODS[method]) <= {"optimizer", "betas", "stochastic", "schedule"}


def test_committed_results_hold_what_is_claimed():
    folder = Path(__file__).parents[2] / "benchmarks" / "results"
    if not (folder / "runs.csv").exists():
        pytest.skip("no results are committed")
    tables = Tables(Store(folder), Scale())
    with (folder / "runs.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(tables.store.results)
    for lr in tables.grid("AdamW"):
        full, low = tables.fp8("AdamW", lr), tables.fp8("AdamW", lr, states=FP8)
        assert len(full.values) == len(low.values) == 3
        assert low.mean > full.mean + 0.1 and min(low.values) > max(full.values)
    ours, ours_in_fp8 = tables.fp8(OURS), tables.fp8(OURS, states=FP8)
    assert len(ours.values) == len(ours_in_fp8.values) == 3
    assert abs(ours_in_fp8.mean - ours.mean) < 0.02
