"""SignStepSizeFinder on logistic regression: what it finds, that nothing but the learning rate changes, bad input."""

import copy

import lightning.pytorch as pl
import matplotlib
import numpy as np
import pytest
import reference_alias as reference
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stosign import (
    ALIAS,
    OptimizerStateMonitor,
    SignSGD,
    SignStepSizeFinder,
    StoSignConfig,
    StoSignMixin,
    find_step_size,
)

matplotlib.use("Agg")
PROBLEM = reference.LogisticRegression(n=256)


class Regression(pl.LightningModule):
    """Dropout, a buffer that is in no checkpoint, and shuffled data: what a trial run could leave traces in."""

    def __init__(self, build=lambda params: SignSGD(params, 0.01, momentum=0.0), dropout=0.0, interrupt_at=None):
        super().__init__()
        self.weight, self.build = nn.Parameter(torch.zeros(30)), build
        self.drop, self.calls, self.interrupt_at = nn.Dropout(dropout), 0, interrupt_at
        self.register_buffer("steps", torch.zeros(()), persistent=False)
        self.lrs, self.learning_rate = [], None

    def training_step(self, batch, batch_idx):
        self.calls += 1
        if self.calls == self.interrupt_at:
            raise KeyboardInterrupt
        self.steps += 1
        self.log("loss", 0.0)
        a, y = batch
        return nn.functional.softplus(-y * (self.drop(a) @ self.weight)).mean()

    def on_train_batch_start(self, batch, batch_idx):
        self.lrs.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def configure_optimizers(self):
        return self.build(self.parameters())

    def train_dataloader(self):
        data = TensorDataset(torch.from_numpy(PROBLEM.a).float(), torch.from_numpy(PROBLEM.y).float())
        return DataLoader(data, batch_size=32, shuffle=True)


def trainer(folder, **options):
    settings = {
        "accelerator": "cpu",
        "max_steps": 20,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return pl.Trainer(**{**settings, **options})


def search(folder, model, **options):
    torch.manual_seed(0)
    return find_step_size(trainer(folder), model, **{"steps": 20, **options})


def scheduled(params, scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)):
    optimizer = SignSGD(params, 0.01)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler(optimizer), "interval": "step"}}


@pytest.mark.parametrize("refine", [True, False])
def test_step_size_is_within_a_factor_of_three_of_the_best_constant_one(tmp_path, refine):
    torch.manual_seed(0)
    found = find_step_size(trainer(tmp_path), Regression(), steps=60, refine=refine).suggestion()
    grid = np.logspace(-3.5, -0.5, 25)
    losses = np.mean([PROBLEM.signsgd_grid(grid, PROBLEM.batches(60, 32, seed)) for seed in range(5)], axis=0)
    best = grid[losses.argmin()]
    assert best / 3 < found < 3 * best


@pytest.mark.parametrize(("refine", "factor"), [(False, 1.2), (True, 2.0)])
def test_start_has_little_influence(tmp_path, refine, factor):
    found = [search(tmp_path, Regression(), start=start, refine=refine).suggestion() for start in (1e-6, 1e-2, 10.0)]
    assert max(found) < factor * min(found)


def test_only_the_learning_rate_is_changed(tmp_path):
    model = Regression(dropout=0.5)
    run = trainer(tmp_path)
    torch.manual_seed(0)
    rng = torch.get_rng_state()
    found = find_step_size(run, model, steps=20).suggestion()
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(model.weight.detach(), torch.zeros(30)) and model.weight.grad is None
    assert model.steps == 0 and run.global_step == 0 and run.current_epoch == 0
    assert not run.optimizers[0].state and not run.callback_metrics
    assert run.optimizers[0].param_groups[0]["lr"] == model.learning_rate == found
    assert run.fit_loop.max_epochs == -1 and run.max_steps == 20 and run.limit_val_batches == 1.0
    assert list(tmp_path.iterdir()) == []


def test_training_with_the_finder_equals_training_with_what_it_finds(tmp_path):
    def train(model, *callbacks):
        torch.manual_seed(0)
        watching = [*callbacks, ModelCheckpoint(tmp_path, every_n_train_steps=7)]
        trainer(tmp_path, callbacks=watching, enable_checkpointing=True).fit(model)
        return model

    finder = SignStepSizeFinder(steps=20)
    found = train(Regression(scheduled, dropout=0.5), finder)
    lr = finder.search.suggestion()

    def by_hand(params):
        configured = scheduled(params)
        configured["optimizer"].param_groups[0].update(lr=lr, initial_lr=lr)
        configured["lr_scheduler"]["scheduler"].base_lrs = [lr]
        return configured

    expected = train(Regression(by_hand, dropout=0.5))
    assert torch.equal(found.weight, expected.weight)
    assert found.lrs[-20:] == expected.lrs == pytest.approx([lr * 0.5 ** (step // 5) for step in range(20)])
    assert torch.equal(found.steps, expected.steps)


def test_monitor_and_epochs_are_not_disturbed(tmp_path):
    model = Regression()
    logger = pl.loggers.CSVLogger(tmp_path)
    monitor = OptimizerStateMonitor(every_n_steps=5, per_layer=False, histograms=False)
    run = trainer(tmp_path, max_steps=-1, max_epochs=2, logger=logger, callbacks=[SignStepSizeFinder(20), monitor])
    run.fit(model)
    assert run.global_step == 16 and run.current_epoch == 2


@pytest.mark.parametrize("interrupt_at", [5, 25, 70])
def test_interrupted_search_leaves_the_state_as_it_was(tmp_path, interrupt_at):
    model = Regression(scheduled, dropout=0.5, interrupt_at=interrupt_at)
    run = trainer(tmp_path)
    torch.manual_seed(0)
    rng = torch.get_rng_state()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        find_step_size(run, model, steps=20)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(model.weight.detach(), torch.zeros(30)) and model.steps == 0
    assert run.optimizers[0].param_groups[0]["lr"] == 0.01 and not run.optimizers[0].state
    assert run.lr_scheduler_configs[0].scheduler.last_epoch == 0
    assert "step_size" not in str(list(tmp_path.iterdir()))
    assert not any(isinstance(callback, SignStepSizeFinder) for callback in run.callbacks)
    # The optimizer steps again by itself.
    model.weight.grad = torch.ones(30)
    run.optimizers[0].step()
    assert torch.equal(model.weight.detach(), torch.full((30,), -0.01))


def test_state_of_a_running_training_is_restored(tmp_path):
    class InTheMiddle(SignStepSizeFinder):
        def on_fit_start(self, trainer, pl_module):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                optimizer = trainer.optimizers[0]
                before = copy.deepcopy((pl_module.state_dict(), optimizer.state_dict()))
                self.find(trainer, pl_module)
                after = pl_module.state_dict(), optimizer.state_dict()
                assert torch.equal(before[0]["weight"], after[0]["weight"])
                assert before[1]["param_groups"] == after[1]["param_groups"]
                assert torch.equal(before[1]["state"][0]["exp_avg"], after[1]["state"][0]["exp_avg"])
                assert before[1]["state"][0]["step"] == after[1]["state"][0]["step"] == 8

    finder = InTheMiddle(steps=20, update_lr=False)
    trainer(tmp_path, callbacks=[finder]).fit(Regression(lambda params: SignSGD(params, 0.01)))
    assert finder.search is not None


def test_param_groups_keep_their_shares_and_warm_up_its_factor(tmp_path):
    class Two(Regression):
        def configure_optimizers(self):
            self.other = nn.Parameter(torch.zeros(3))
            groups = [{"params": [self.weight]}, {"params": [self.other], "lr": 0.001}]
            optimizer = SignSGD(groups, torch.tensor(0.01))
            warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}

    model, run = Two(), trainer(tmp_path)
    found = find_step_size(run, model, steps=20).suggestion()
    groups = run.optimizers[0].param_groups
    assert [float(group["initial_lr"]) for group in groups] == pytest.approx([found, found / 10])
    assert [float(group["lr"]) for group in groups] == pytest.approx([found / 4, found / 40])
    assert [float(lr) for lr in run.lr_scheduler_configs[0].scheduler.base_lrs] == pytest.approx([found, found / 10])


def test_config_of_the_mixin_learns_the_learning_rate(tmp_path):
    class Mixed(StoSignMixin, Regression):
        configure_optimizers = StoSignMixin.configure_optimizers

    model = Mixed()
    model.stosign = StoSignConfig(warmup_steps=3)
    assert model.stosign.lr != search(tmp_path, model).suggestion() == model.stosign.lr


@pytest.mark.parametrize("name", ["stosign", "adamw"])
def test_finds_rates_for_other_optimizers(tmp_path, name):
    builders = {"stosign": StoSignConfig("stosign"), "adamw": StoSignConfig("adamw")}
    model = Regression(lambda params: builders[name].build_optimizer([{"params": list(params)}]))
    assert 1e-3 < search(tmp_path, model).suggestion() < 1.0


def test_plot_shows_the_trials_and_marks_the_suggestion(tmp_path):
    found = search(tmp_path, Regression())
    axes, falls = found.plot(suggest=True).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    asked, _, mark = axes.lines
    assert len(asked.get_xdata()) == sum(trial.phi > 0 for trial in found.trials) > 2
    assert max(falls.lines[0].get_ydata()) == max(trial.fall for trial in found.trials)
    assert mark.get_xdata()[0] == mark.get_ydata()[0] == found.suggestion()
    _, ax = matplotlib.pyplot.subplots()
    assert found.plot(ax=ax) is ax.figure


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 9}, ValueError, "steps=9 must be at least 10"),
        ({"steps": 20.0}, TypeError, "steps=20.0 must be an int"),
        ({"measure_every": 0}, ValueError, "measure_every=0 must be at least 1"),
        ({"start": 0}, ValueError, "start=0 must be finite and greater than 0"),
        ({"start": float("nan")}, ValueError, "start=nan"),
        ({"start": "1"}, TypeError, "start='1' must be a number"),
    ],
)
def test_bad_argument_is_named(options, error, message):
    with pytest.raises(error, match=message):
        SignStepSizeFinder(**options)


def test_optimizer_without_a_learning_rate_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ALIAS has no learning rate to be found"):
        search(tmp_path, Regression(ALIAS))


def test_manual_optimization_and_several_optimizers_are_refused(tmp_path):
    model = Regression()
    model.automatic_optimization = False
    with pytest.raises(ValueError, match="Regression has automatic_optimization=False and 1 optimizer"):
        search(tmp_path, model)


def test_second_finder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the Trainer has a SignStepSizeFinder already"):
        find_step_size(trainer(tmp_path, callbacks=[SignStepSizeFinder()]), Regression())


def test_fast_dev_run_and_resumed_runs_do_not_search(tmp_path):
    finder = SignStepSizeFinder()
    with pytest.warns(UserWarning, match="does not search under fast_dev_run"):
        trainer(tmp_path, fast_dev_run=True, callbacks=[finder]).fit(Regression())
    run = trainer(tmp_path)
    run.fit(Regression())
    run.save_checkpoint(tmp_path / "a.ckpt")
    trainer(tmp_path, max_steps=30, callbacks=[finder]).fit(Regression(), ckpt_path=tmp_path / "a.ckpt")
    assert finder.search is None
