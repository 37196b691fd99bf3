"""Which steps are recorded, and as what: accumulated, manual, skipped."""

import re
import warnings

import numpy as np
import pytest
import torch
from fits import Regression, Step, fit, histograms, scalars
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_stosign import OptimizerStateMonitor, StoSignSGD


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_records_have_the_steps_of_lightning_s_own_metrics(tmp_path, accumulate, every):
    monitor = OptimizerStateMonitor(per_layer=False, histograms=False)
    options = {"max_steps": 7, "log_every_n_steps": every, "accumulate_grad_batches": accumulate}
    fit(Regression(), tmp_path, callbacks=[monitor], **options)
    found = scalars(tmp_path)
    assert list(found["optimizer_state/update_rms"]) == list(found["loss"]) == list(range(every - 1, 7, every))


def test_every_n_steps_overrides_the_trainer_s(tmp_path):
    monitor = OptimizerStateMonitor(every_n_steps=3, per_layer=False)
    fit(Regression(), tmp_path, max_steps=7, log_every_n_steps=1, callbacks=[monitor])
    assert list(scalars(tmp_path)["optimizer_state/update_rms"]) == [2, 5]
    assert list(histograms(tmp_path)["optimizer_state/log10_abs/exp_avg"]) == [2, 5]


def test_steps_go_on_counting_after_a_resume(tmp_path):
    monitor = OptimizerStateMonitor(every_n_steps=2, per_layer=False)
    fit(Regression(), tmp_path / "a", max_steps=3).save_checkpoint(tmp_path / "3.ckpt")
    fit(Regression(), tmp_path / "b", max_steps=6, callbacks=[monitor], ckpt_path=tmp_path / "3.ckpt")
    assert list(scalars(tmp_path / "b")["optimizer_state/update_rms"]) == [3, 5]


def test_gradient_records_are_of_the_accumulated_gradient(tmp_path):
    step = Step(1)
    fit(Regression(), tmp_path, callbacks=[OptimizerStateMonitor(), step], accumulate_grad_batches=3)
    expected = max(np.abs(grad).max() for grad in step.grads.values())
    assert scalars(tmp_path)["optimizer_state/grad_abs_max"][1] == pytest.approx(expected, rel=1e-6)


class TwoOptimizers(Regression):
    """Manual optimization: StoSignSGD on the first layer, AdamW on the head."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return StoSignSGD(self.first.parameters(), 0.01), torch.optim.AdamW(self.head.parameters(), 0.01)

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            loss = self.loss(batch)
            self.log("loss", loss)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()


@pytest.fixture(scope="module")
def two_optimizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    fit(TwoOptimizers(), folder, max_steps=8, log_every_n_steps=2, callbacks=[OptimizerStateMonitor()])
    return scalars(folder)


def test_two_optimizers_are_told_apart_by_number_and_class(two_optimizers):
    assert {tag.split("/")[1] for tag in two_optimizers if "/" in tag} == {"0-StoSignSGD", "1-AdamW"}


def test_each_of_two_optimizers_is_recorded_for_its_own_parameters(two_optimizers):
    by_optimizer = {
        prefix: {tag.rpartition("/")[2] for tag in two_optimizers if re.match(f"per_layer_update_rms/{prefix}/", tag)}
        for prefix in ("0-StoSignSGD", "1-AdamW")
    }
    assert by_optimizer == {"0-StoSignSGD": {"first.weight", "first.bias"}, "1-AdamW": {"head.weight", "head.bias"}}


@pytest.mark.parametrize("prefix", ["0-StoSignSGD", "1-AdamW"])
def test_two_optimizers_records_have_the_steps_of_lightning_s_own_metrics(two_optimizers, prefix):
    # 4 batches of 2 optimizer steps
    assert list(two_optimizers[f"optimizer_state/{prefix}/update_rms"]) == list(two_optimizers["loss"]) == [1, 3]


def test_two_optimizers_each_get_the_step_they_took(two_optimizers):
    assert two_optimizers["per_layer_update_rms/0-StoSignSGD/first.bias"][3] == pytest.approx(1.0, abs=1e-5)


def scaled(skipped_step, folder, every):
    """Fit with a GradScaler and a gradient that overflows at one step, which the scaler therefore skips."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(
            Regression("adamw", scale=lambda step: float("inf") if step == skipped_step else 1.0),
            folder,
            max_steps=5,
            log_every_n_steps=1,
            plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
            callbacks=[OptimizerStateMonitor(every_n_steps=every)],
        )
    return scalars(folder)


def test_a_step_that_amp_skips_is_not_recorded(tmp_path):
    assert list(scaled(2, tmp_path, every=1)["optimizer_state/update_rms"]) == [0, 1, 3, 4]


def test_a_step_that_amp_skips_is_not_recorded_later(tmp_path):
    assert list(scaled(1, tmp_path, every=2)["optimizer_state/update_rms"]) == [3]


def test_the_step_after_a_skipped_one_has_its_own_gradient(tmp_path):
    assert np.isfinite(scaled(2, tmp_path, every=1)["optimizer_state/grad_abs_max"][3])


def test_amp_gradients_are_recorded_without_the_loss_scale(tmp_path):
    plain = Step(0)
    fit(Regression("adamw"), callbacks=[plain], max_steps=1)
    expected = max(np.abs(grad).max() for grad in plain.grads.values())
    assert scaled(None, tmp_path, every=1)["optimizer_state/grad_abs_max"][0] == pytest.approx(expected, rel=0.02)


def fused_and_scaled(overflow_at, folder):
    """Fit a fused AdamW, which takes the loss scale out of the gradients itself."""
    module = Regression(scale=lambda step: float("inf") if step == overflow_at else 1.0)
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), 0.01, fused=True)
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(module, folder, max_steps=3, plugins=[precision], callbacks=[OptimizerStateMonitor()])
    return scalars(folder)


def test_a_fused_optimizer_s_gradients_are_recorded_without_the_loss_scale(tmp_path):
    plain = Step(0)
    fit(Regression("adamw"), callbacks=[plain], max_steps=1)
    expected = max(np.abs(grad).max() for grad in plain.grads.values())
    found = fused_and_scaled(None, tmp_path)
    assert found["optimizer_state/grad_abs_max"][0] == pytest.approx(expected, rel=0.02)


def test_a_step_that_a_fused_optimizer_skips_has_length_0(tmp_path):
    steps = fused_and_scaled(1, tmp_path)["optimizer_state/update_rms"]
    assert [steps[i] > 0 for i in sorted(steps)] == [True, False, True]


def test_a_step_skipped_for_its_gradient_has_length_0_despite_weight_decay(tmp_path):
    module = Regression(scale=lambda step: float("nan") if step == 1 else 1.0)
    module.configure_optimizers = lambda: StoSignSGD(module.parameters(), 0.01, weight_decay=0.1, on_nonfinite="skip")
    with pytest.warns(RuntimeWarning, match="this step was skipped"):
        fit(module, tmp_path, max_steps=3, callbacks=[OptimizerStateMonitor()])
    found = scalars(tmp_path)
    assert found["optimizer_state/update_rms"][1] == 0.0
    assert np.isnan(found["optimizer_state/grad_abs_max"][1])
    assert found["per_layer_update_rms/head.bias"][2] == pytest.approx(1.0, abs=1e-5)
