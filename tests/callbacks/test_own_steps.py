"""Callbacks count each optimizer's own steps, stand side by side, and tell Lightning's callbacks what they see."""

import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stosign import (
    OptimizerDashboard,
    OptimizerStateMonitor,
    StateCollapseGuard,
    StoSignConfig,
    StoSignMixin,
    StoSignSGD,
)

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


class Two(LightningModule):
    """Two optimizers under manual optimization; the first steps every k-th batch only."""

    def __init__(self, every, optimizer=StoSignSGD):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.every, self.optimizer = every, optimizer
        self.nets = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])

    def configure_optimizers(self):
        return [self.optimizer(net.parameters(), lr=1e-3) for net in self.nets]

    def training_step(self, batch, batch_idx):
        for number, (optimizer, net) in enumerate(zip(self.optimizers(), self.nets, strict=True)):
            if number == 1 or batch_idx % self.every == 0:
                optimizer.zero_grad()
                self.manual_backward(net(batch[0]).square().mean())
                optimizer.step()


class Dying(StoSignMixin, LightningModule):
    """AdamW whose second moment is zero in raw FP8 from the first step on."""

    def __init__(self):
        super().__init__()
        self.stosign = StoSignConfig("adamw", lr=1e-4, schedule="constant", state_precision="fp8-raw")
        self.net = nn.Linear(64, 64)

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) * 1e-2).square().mean()


def data(batches):
    return DataLoader(TensorDataset(torch.randn(8 * batches, 64, generator=torch.Generator().manual_seed(0))), 8)


def steps_of(folder, tag):
    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.step for event in events.Scalars(tag)]


@pytest.mark.parametrize("optimizer", [StoSignSGD, torch.optim.SGD], ids=["counted in the state", "not counted there"])
@pytest.mark.parametrize("every", [2, 3])
def test_records_come_every_nth_step_of_each_optimizer(every, optimizer, tmp_path):
    kwargs = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    module = Two(every, lambda params, lr: optimizer(params, lr=lr, **kwargs))
    monitor = OptimizerStateMonitor(every_n_steps=4, per_layer=False, forecast=(), quantiles=(), histograms=False)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer = Trainer(max_epochs=1, callbacks=[monitor], logger=logger, enable_checkpointing=False, **QUIET)
    trainer.fit(module, data(24))
    name, state = optimizer.__name__, "momentum_buffer" if kwargs else "exp_avg"
    batches = list(range(0, 24, every))[3::4]
    assert steps_of(tmp_path, f"optimizer_state/0-{name}/zero_fraction/{state}") == batches
    assert steps_of(tmp_path, f"optimizer_state/1-{name}/zero_fraction/{state}") == [3, 7, 11, 15, 19, 23]


def test_guard_names_the_optimizers_own_step():
    class Losing(Two):
        def configure_optimizers(self):
            return [StoSignSGD(net.parameters(), lr=1e-3, state_precision="fp8-raw") for net in self.nets]

        def training_step(self, batch, batch_idx):
            super().training_step([batch[0] * 1e-4], batch_idx)

    guard = StateCollapseGuard(every_n_steps=2, patience=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(max_epochs=1, callbacks=[guard], logger=False, enable_checkpointing=False, **QUIET)
        trainer.fit(Losing(5), data(20))
    assert guard.collapsed_at == {"0-StoSignSGD/exp_inf": 2, "1-StoSignSGD/exp_inf": 2}


def test_several_guards_and_dashboards_keep_states_of_their_own(tmp_path):
    def callbacks():
        guards = [StateCollapseGuard(every_n_steps=1, patience=1), StateCollapseGuard(every_n_steps=1, per_layer=True)]
        return [*guards, OptimizerDashboard(), OptimizerDashboard(draw_every_n_steps=5)]

    options = {"logger": TensorBoardLogger(tmp_path), "max_steps": 6, "log_every_n_steps": 2} | QUIET
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = callbacks()
        save = ModelCheckpoint(tmp_path, "last", every_n_train_steps=4)
        Trainer(callbacks=[*first, save], **options).fit(Dying(), data(8))
        again = callbacks()
        Trainer(callbacks=again, **options).fit(Dying(), data(8), ckpt_path=tmp_path / "last.ckpt")
    assert [guard.collapsed_at for guard in again[:2]] == [guard.collapsed_at for guard in first[:2]]
    assert again[0].collapsed_at == {"exp_avg_sq": 1} and "exp_avg_sq/net.weight" in again[1].collapsed_at


@pytest.mark.parametrize("key", ["StateCollapseGuard", "StateCollapseGuard{'action': 'stop'}"])
def test_guard_with_other_options_takes_over_the_only_ones_past(key):
    past = StateCollapseGuard()
    past.collapsed_at = {"exp_avg_sq": 7}
    guard = StateCollapseGuard(action="raise")
    guard.on_load_checkpoint(None, None, {"callbacks": {key: past.state_dict()}})
    assert guard.collapsed_at == {"exp_avg_sq": 7}
    two = {"callbacks": {key: past.state_dict(), "StateCollapseGuard{}": past.state_dict()}}
    other = StateCollapseGuard(action="raise")
    other.on_load_checkpoint(None, None, two)
    assert other.collapsed_at == {}


@pytest.mark.parametrize(
    ("options", "announced"),
    [
        ({"max_steps": 20, "min_steps": 10}, "Training will stop once Trainer(min_steps=10, min_epochs=1) allows it."),
        ({"max_epochs": 4, "min_epochs": 2}, "Training will stop once Trainer(min_epochs=2) allows it."),
        ({"max_steps": 20}, "Training stops."),
    ],
)
def test_guard_announces_the_stop_that_comes(options, announced):
    guard = StateCollapseGuard(action="stop", every_n_steps=1)
    trainer = Trainer(callbacks=[guard], logger=False, enable_checkpointing=False, **options, **QUIET)
    with pytest.warns(RuntimeWarning, match="has collapsed at step 3"):
        trainer.fit(Dying(), data(6))
    assert guard.report.endswith(announced)
    assert trainer.global_step == {"min_steps": 10, "min_epochs": 12}.get(list(options)[-1], 3)


@pytest.mark.parametrize("make", [EarlyStopping, ModelCheckpoint], ids=lambda make: make.__name__)
def test_scalars_can_be_watched_by_lightnings_callbacks(make, tmp_path):
    tag = "optimizer_state/zero_fraction/exp_avg_sq"
    watcher = make(monitor=tag, check_on_train_epoch_end=True) if make is EarlyStopping else make(tmp_path, monitor=tag)
    callbacks = [OptimizerStateMonitor(every_n_steps=2, per_layer=False), watcher]
    trainer = Trainer(max_epochs=2, callbacks=callbacks, logger=TensorBoardLogger(tmp_path), **QUIET)
    trainer.fit(Dying(), data(4))
    assert trainer.callback_metrics[tag] > 0.5
    best = watcher.best_score if make is EarlyStopping else watcher.best_model_score
    assert torch.equal(best, trainer.callback_metrics[tag])


class MovesInItsClosure(torch.optim.SGD):
    """Evaluates its closure first elsewhere, then where it is: as methods do that look at a step's other end."""

    @torch.no_grad()
    def step(self, closure=None):
        params = self.param_groups[0]["params"]
        for param in params:
            param.add_(1.0)
        with torch.enable_grad():
            closure()
        for param in params:
            param.sub_(1.0)
        with torch.enable_grad():
            loss = closure()
        super().step()
        return loss


def test_update_rms_is_of_the_step_whatever_the_closure_does_to_the_parameters(tmp_path):
    seen = []

    class Net(Dying):
        def configure_optimizers(self):
            self.stepper = MovesInItsClosure(self.parameters(), lr=0.5)
            return self.stepper

        def on_train_batch_start(self, batch, batch_idx):
            self.before = [param.detach().clone() for param in self.parameters()]

        def on_train_batch_end(self, *args):
            squares = sum(float((p - q).square().sum()) for p, q in zip(self.parameters(), self.before, strict=True))
            seen.append((squares / sum(p.numel() for p in self.parameters())) ** 0.5 / 0.5)

    monitor = OptimizerStateMonitor(every_n_steps=1, per_layer=False)
    trainer = Trainer(max_steps=3, callbacks=[monitor], logger=TensorBoardLogger(tmp_path), **QUIET)
    trainer.fit(Net(), data(3))
    recorded = float(trainer.callback_metrics["optimizer_state/update_rms"])
    assert recorded == pytest.approx(seen[-1], rel=1e-3)
