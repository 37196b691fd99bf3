"""The schedule ends where training ends, whatever decides that; ALIAS counts the batches of each gradient."""

import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from module.mixin_fits import NAMES, Model, fit, trainer

from lightning_stosign import StoSignConfig


def linear(**options):
    return StoSignConfig(**{"lr": 1.0, "schedule": "linear", "min_lr_ratio": 0.0, **options})


def first_lrs(model):
    return [lrs[0] for lrs in model.lrs]


def to_zero(steps):
    return pytest.approx([1 - step / steps for step in range(steps)])


# 8 batches an epoch
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"callbacks": [GradientAccumulationScheduler({0: 4})]}, 6),
        ({"callbacks": [GradientAccumulationScheduler({0: 8, 1: 3, 2: 1})]}, 1 + 3 + 8),
        ({"callbacks": [GradientAccumulationScheduler({1: 2})], "max_steps": 10}, 10),
        ({"callbacks": [GradientAccumulationScheduler({1: 2})], "max_steps": 100}, 8 + 4 + 4),
        ({"accumulate_grad_batches": 3}, 9),
        ({"limit_train_batches": 5, "accumulate_grad_batches": 2}, 9),
        ({"limit_train_batches": 0.5}, 12),
        ({"overfit_batches": 2}, 6),
    ],
)
def test_the_schedule_ends_at_the_last_step(options, steps):
    model, run = fit(linear(), max_epochs=3, **options)
    assert run.global_step == steps and first_lrs(model) == to_zero(steps)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0)


def test_a_second_fit_has_a_schedule_of_its_own_to_its_end():
    model, run = fit(linear(), max_epochs=2)
    model.lrs.clear()
    run.fit_loop.max_epochs = 3
    run.fit(model)
    assert run.global_step == 24 and first_lrs(model) == to_zero(8)


@pytest.mark.parametrize("options", [{}, {"callbacks": [GradientAccumulationScheduler({0: 1, 1: 4})]}])
def test_a_resumed_run_keeps_to_the_end(options, tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    callbacks = [*options.get("callbacks", []), saver]
    straight, _ = fit(linear(), max_epochs=3, callbacks=callbacks, enable_checkpointing=True)
    resumed, _ = fit(linear(), max_epochs=3, ckpt_path=tmp_path / "step=5.ckpt", **options)
    assert first_lrs(resumed) == first_lrs(straight)[5:]


def test_an_accumulation_schedule_that_a_resume_brings_moves_the_end(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    fit(linear(), max_epochs=2, callbacks=[saver], enable_checkpointing=True)
    scheduler = GradientAccumulationScheduler({1: 4})
    resumed, run = fit(linear(), max_epochs=3, callbacks=[scheduler], ckpt_path=tmp_path / "epoch=0.ckpt")
    assert run.global_step == 8 + 2 + 2
    assert first_lrs(resumed)[1:] == pytest.approx([1 - step / 12 for step in (9, 10, 11)])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{"max_steps": 0}, {"max_epochs": 0}, {"limit_train_batches": 0, "max_epochs": 2}])
def test_a_training_without_steps_runs(name, options):
    model, run = fit(StoSignConfig(name, warmup_steps=3), **options)
    assert run.global_step == 0 and model.lrs == []


def test_a_training_that_time_ends_needs_a_constant_schedule():
    with pytest.raises(ValueError, match="max_time is not known in steps"):
        fit(linear(), max_time={"hours": 1})
    model, _ = fit(linear(schedule="constant", warmup_steps=2), max_time={"hours": 1}, max_steps=3)
    assert first_lrs(model) == [0.5, 1.0, 1.0]


def test_a_time_limit_beside_a_schedule_is_told():
    with pytest.warns(UserWarning, match="a training that max_time stops before ends at a higher learning rate"):
        fit(linear(), max_time={"hours": 1}, max_epochs=1)


class Recorded(Model):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        group = optimizer.param_groups[0]
        self.lrs[-1] = (group["accumulate_grad_batches"], group["accumulated_batches"])


def test_alias_counts_the_batches_of_each_gradient():
    model = Recorded(StoSignConfig("alias", schedule="constant"))
    trainer(max_epochs=2, callbacks=[GradientAccumulationScheduler({0: 3, 1: 5})]).fit(model)
    assert model.lrs == [(3, 3), (3, 3), (3, 2), (5, 5), (5, 3)]
