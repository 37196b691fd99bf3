"""The learning rate over the steps of a training, and over its resume."""

import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from module.mixin_fits import NAMES, Model, fit, trainer
from torch.utils.data import DataLoader, IterableDataset

from lightning_stosign import StoSignConfig
from lightning_stosign.module import lr_factor

CLOSED_FORMS = {
    "linear": lambda t: 1 - 0.8 * t,
    "cosine": lambda t: 0.2 + 0.8 * (1 + math.cos(math.pi * t)) / 2,
}


@pytest.mark.parametrize("schedule", CLOSED_FORMS)
@pytest.mark.parametrize("warmup", [0, 5])
def test_decay_follows_its_closed_form_to_min_lr_ratio(schedule, warmup):
    factor = lr_factor(StoSignConfig(schedule=schedule, warmup_steps=warmup, min_lr_ratio=0.2), 25)
    expected = [CLOSED_FORMS[schedule]((step - warmup) / (25 - warmup)) for step in range(warmup, 26)]
    assert [factor(step) for step in range(warmup, 26)] == pytest.approx(expected)
    assert factor(25) == pytest.approx(0.2)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "wsd"])
def test_warmup_rises_linearly_from_its_first_step_to_1(schedule):
    factor = lr_factor(StoSignConfig(schedule=schedule, warmup_steps=4), 100)
    assert [factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_constant_needs_no_end():
    factor = lr_factor(StoSignConfig(schedule="constant", warmup_steps=2), math.inf)
    assert [factor(step) for step in (0, 1, 2, 10**9)] == [0.5, 1.0, 1.0, 1.0]


def test_wsd_is_constant_then_linear_over_its_share_of_all_steps():
    config = StoSignConfig(schedule="wsd", warmup_steps=2, min_lr_ratio=0.1, wsd_decay_ratio=0.25)
    factor = lr_factor(config, 20)
    expected = [0.5] + [1.0] * 15 + [1 - 0.9 * k / 5 for k in range(1, 6)]
    assert [factor(step) for step in (0, *range(1, 21))] == pytest.approx(expected[:1] + expected[1:])


def test_wsd_s_decay_does_not_begin_before_warmup_ends():
    factor = lr_factor(StoSignConfig(schedule="wsd", warmup_steps=6, wsd_decay_ratio=1.0, min_lr_ratio=0.0), 10)
    assert [factor(step) for step in range(5, 11)] == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.25, 0.0])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_beyond_the_end_lr_stays_at_its_floor(schedule):
    assert lr_factor(StoSignConfig(schedule=schedule, min_lr_ratio=0.3), 10)(15) == pytest.approx(0.3)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_schedules_that_end_need_an_end(schedule):
    with pytest.raises(
        ValueError, match=f"schedule='{schedule}' needs an end: set the Trainer's max_steps or max_epochs"
    ):
        lr_factor(StoSignConfig(schedule=schedule), math.inf)


def test_warmup_must_fit_into_the_training():
    with pytest.raises(ValueError, match="warmup_steps=10 must be less than the 10 steps of this training"):
        fit(StoSignConfig(warmup_steps=10), max_steps=10)


def linear(**options):
    return StoSignConfig(lr=1.0, schedule="linear", min_lr_ratio=0.0, **options)


@pytest.mark.parametrize("name", NAMES)
def test_the_schedule_reaches_all_param_groups(name):
    model, _ = fit(StoSignConfig(name, lr=0.1, schedule="linear", min_lr_ratio=0.0, warmup_steps=2), max_steps=4)
    peak = 1.0 if name == "alias" else 0.1  # a factor on the step size that it finds
    expected = [0.5 * peak, peak, peak, 0.5 * peak]
    assert [len(set(lrs)) for lrs in model.lrs] == [1] * 4
    assert [lrs[0] for lrs in model.lrs] == pytest.approx(expected)
    assert len(model.lrs[0]) == 2


@pytest.mark.parametrize("options", [{"max_steps": 8}, {"max_epochs": 4, "accumulate_grad_batches": 4}])
def test_the_schedule_counts_optimizer_steps(options):
    # 8 batches an epoch; 4 epochs of 2 steps
    model, _ = fit(linear(), **options)
    assert [lrs[0] for lrs in model.lrs] == pytest.approx([1 - k / 8 for k in range(8)])


def test_a_constant_schedule_has_no_scheduler():
    assert fit(StoSignConfig(schedule="constant"), max_steps=1)[1].lr_scheduler_configs == []


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.ones(3)


class EndlessModel(Model):
    def train_dataloader(self):
        return DataLoader(Endless(), batch_size=4)


def test_fast_dev_run_is_not_too_short_for_a_warm_up():
    model = Model(StoSignConfig(warmup_steps=100))
    pl.Trainer(fast_dev_run=True, accelerator="cpu", enable_model_summary=False, enable_progress_bar=False).fit(model)
    assert model.trainer.global_step == 1


@pytest.mark.parametrize("options", [{"max_steps": -1, "max_epochs": -1}, {"max_epochs": 1}])
def test_training_without_an_end_is_an_error(options):
    with pytest.raises(ValueError, match="schedule='cosine' needs an end"):
        trainer(**options).fit(EndlessModel())


def test_endless_data_need_max_steps_only():
    model = EndlessModel(linear())
    trainer(max_steps=4).fit(model)
    assert [lrs[0] for lrs in model.lrs] == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_a_resume_with_more_steps_extends_the_schedule(tmp_path):
    fit(linear(), max_steps=4)[1].save_checkpoint(tmp_path / "4.ckpt")
    model, _ = fit(linear(), ckpt_path=tmp_path / "4.ckpt", max_steps=8)
    # The first step after the resume still has the learning rate in the checkpoint: 0, the old schedule's end.
    assert [lrs[0] for lrs in model.lrs][1:] == pytest.approx([1 - k / 8 for k in (5, 6, 7)])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", [None, "fp8:min_numel=0"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, name, precision):
    config = StoSignConfig(name, lr=0.1, warmup_steps=2, state_precision=precision)
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    straight, _ = fit(config, max_epochs=2, callbacks=[checkpoint], enable_checkpointing=True)
    resumed, run = fit(config, ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=2)
    assert (run.global_step, len(resumed.lrs)) == (16, 8)
    for (key, p), q in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), key


def test_a_resume_with_a_kept_lr_follows_the_schedule_from_a_new_peak(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    fit(linear(), max_steps=8, callbacks=[saver], enable_checkpointing=True)
    with pytest.warns(UserWarning, match=r"lr=1\.0 \(not 0\.5\)"):
        fit(StoSignConfig(**{**vars(linear()), "lr": 0.5}), ckpt_path=tmp_path / "step=4.ckpt", max_steps=8)
    config = StoSignConfig(**{**vars(linear()), "lr": 0.5, "keep_on_resume": ("lr",)})
    model, _ = fit(config, ckpt_path=tmp_path / "step=4.ckpt", max_steps=8)
    assert [lrs[0] for lrs in model.lrs] == pytest.approx([0.5 * (1 - k / 8) for k in (4, 5, 6, 7)])
