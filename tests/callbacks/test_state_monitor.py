import re
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from fits import Regression, Step, events, fit, histograms, scalars, trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from lightning_stosign import OptimizerStateMonitor, StoSignSGD
from lightning_stosign.health import log10_bin_edges

LAYERS = ["first.weight", "first.bias", "head.weight", "head.bias"]


def state_tags(*states, forecast=("fp8", "fp8-raw")):
    tags = {f"{kind}/{state}" for kind in ("zero_fraction", "abs_max", "rms") for state in states}
    tags |= {f"log10_quantile/{state}/{quantile}" for state in states for quantile in (0.05, 0.5, 0.95)}
    kinds = ("underflow_fraction", "stalled_fraction")
    return tags | {f"{kind}/{state}/{name}" for kind in kinds for state in states for name in forecast}


ALWAYS = {"update_rms", "grad_abs_max", "grad_square_max"}
QUOTIENT = {"dead_fraction", "exploding_fraction"}
NOISE = {"noise_rms", "sign_agreement"}
TAGS = {
    "stosign": ALWAYS | QUOTIENT | NOISE | state_tags("exp_avg", "exp_inf"),
    "stosign-fp8": ALWAYS | QUOTIENT | NOISE | state_tags("exp_avg", "exp_inf"),
    "in-expectation": ALWAYS | QUOTIENT | state_tags("exp_avg", "exp_inf"),
    "signsgd": ALWAYS | state_tags("exp_avg"),
    "adamw": ALWAYS | QUOTIENT | state_tags("exp_avg", "exp_avg_sq"),
    "sgd": ALWAYS | state_tags("momentum_buffer"),
    "plain-sgd": ALWAYS,
}


def with_prefix(tags):
    return {f"optimizer_state/{tag}" for tag in tags}


@pytest.mark.parametrize("optimizer", TAGS)
def test_tags_are_those_of_the_table_global_and_per_layer(tmp_path, optimizer):
    fit(Regression(optimizer), tmp_path, max_steps=1, callbacks=[OptimizerStateMonitor()])
    found = {tag for tag in scalars(tmp_path) if tag.startswith("optimizer_state/")}
    assert found == with_prefix(TAGS[optimizer] | {f"{tag}/{layer}" for tag in TAGS[optimizer] for layer in LAYERS})


def test_without_per_layer_only_the_global_tags_are_logged(tmp_path):
    fit(Regression("adamw"), tmp_path, max_steps=1, callbacks=[OptimizerStateMonitor(per_layer=False)])
    assert {tag for tag in scalars(tmp_path) if tag.startswith("optimizer_state/")} == with_prefix(TAGS["adamw"])
    assert set(histograms(tmp_path)) == with_prefix({"log10_abs/exp_avg", "log10_abs/exp_avg_sq"})


def test_forecast_names_the_formats(tmp_path):
    monitor = OptimizerStateMonitor(per_layer=False, histograms=False, forecast=["float16"])
    fit(Regression("signsgd"), tmp_path, max_steps=1, callbacks=[monitor])
    found = {tag for tag in scalars(tmp_path) if "underflow" in tag}
    assert found == {"optimizer_state/underflow_fraction/exp_avg/float16"}


@pytest.mark.parametrize("optimizer", ["lbfgs", "adafactor"])
def test_other_optimizers_of_torch_are_monitored(tmp_path, optimizer):
    fit(Regression(optimizer), tmp_path, max_steps=2, callbacks=[OptimizerStateMonitor()])
    assert with_prefix(ALWAYS) <= scalars(tmp_path).keys()


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Fits with clipping on, once for each optimizer: the values around step 2, and what was logged for it."""
    made = {}

    def run(optimizer):
        if optimizer not in made:
            folder, step = tmp_path_factory.mktemp(optimizer), Step(2)
            monitor = OptimizerStateMonitor(forecast=["fp8-raw:min_numel=0"])
            fit(Regression(optimizer), folder, callbacks=[monitor, step], gradient_clip_val=0.05)
            made[optimizer] = (step, {tag: by_step[2] for tag, by_step in scalars(folder).items()}, histograms(folder))
        return made[optimizer]

    return run


def test_gradient_clipping_was_on_in_these_tests(recorded):
    step, _, _ = recorded("adamw")
    assert np.linalg.norm(step.clipped["first.weight"]) < 0.5 * np.linalg.norm(step.grads["first.weight"])


@pytest.mark.parametrize("optimizer", ["stosign", "adamw", "plain-sgd"])
def test_gradient_records_are_before_clipping(recorded, optimizer):
    step, found, _ = recorded(optimizer)
    largest = {name: np.abs(grad).max() for name, grad in step.grads.items()}
    assert found["optimizer_state/grad_abs_max"] == pytest.approx(max(largest.values()), rel=1e-6)
    assert found["optimizer_state/grad_square_max"] == pytest.approx(max(largest.values()) ** 2, rel=1e-6)
    assert found["optimizer_state/grad_abs_max/head.weight"] == pytest.approx(largest["head.weight"], rel=1e-6)


def test_every_step_of_stosign_has_length_1_despite_decay_and_clipping(recorded):
    _, found, _ = recorded("stosign")
    # The weights of the input that is always 0 are dead: 8 of the 24.
    assert found["optimizer_state/update_rms/head.weight"] == pytest.approx(1.0, abs=1e-5)
    assert found["optimizer_state/update_rms/first.weight"] == pytest.approx(np.sqrt(16 / 24), abs=1e-5)
    assert found["optimizer_state/update_rms"] == pytest.approx(np.sqrt(33 / 41), abs=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "in-expectation", "signsgd"])
def test_update_rms_is_of_the_step_taken_without_decay(recorded, optimizer):
    step, found, _ = recorded(optimizer)
    lr, decay = 0.01, {"adamw": 0.01}.get(optimizer, 0.0)
    direction = np.concatenate(
        [((step.after[n] - step.before[n] + lr * decay * step.before[n]) / lr).reshape(-1) for n in LAYERS]
    )
    assert found["optimizer_state/update_rms"] == pytest.approx(np.sqrt(np.mean(direction**2)), rel=1e-4)


@pytest.mark.parametrize(
    ("optimizer", "state"), [("stosign", "exp_inf"), ("adamw", "exp_avg_sq"), ("sgd", "momentum_buffer")]
)
def test_state_records_are_of_the_state_after_the_update(recorded, optimizer, state):
    step, found, _ = recorded(optimizer)
    values = step.flat(state)
    assert found[f"optimizer_state/zero_fraction/{state}"] == pytest.approx(np.mean(values == 0), rel=1e-6)
    assert found[f"optimizer_state/abs_max/{state}"] == pytest.approx(np.abs(values).max(), rel=1e-6)
    assert found[f"optimizer_state/rms/{state}"] == pytest.approx(np.sqrt(np.mean(values**2)), rel=1e-6)
    assert found[f"optimizer_state/zero_fraction/{state}/first.weight"] == pytest.approx(1 / 3, rel=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "state"), [("stosign", "exp_avg"), ("adamw", "exp_avg"), ("adamw", "exp_avg_sq")]
)
def test_underflow_is_the_share_of_nonzero_entries_below_half_of_e4m3_s_smallest_number(recorded, optimizer, state):
    step, found, _ = recorded(optimizer)
    values = np.abs(step.flat(state))
    expected = np.count_nonzero((values > 0) & (values <= 2.0**-10)) / np.count_nonzero(values)
    assert found[f"optimizer_state/underflow_fraction/{state}/fp8-raw:min_numel=0"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("optimizer", "denominator"), [("stosign", "exp_inf"), ("adamw", "exp_avg_sq")])
def test_dead_and_exploding_fractions_are_of_all_coordinates(recorded, optimizer, denominator):
    step, found, _ = recorded(optimizer)
    m, d = step.flat("exp_avg"), step.flat(denominator)
    assert found["optimizer_state/dead_fraction"] == pytest.approx(np.mean((m == 0) & (d == 0)), rel=1e-6)
    assert found["optimizer_state/exploding_fraction"] == pytest.approx(np.mean((m != 0) & (d == 0)), rel=1e-6)


def test_noise_rms_and_sign_agreement_are_of_m_over_g(recorded):
    step, found, _ = recorded("stosign")
    m, G = step.flat("exp_avg"), step.flat("exp_inf")
    u = m[G > 0] / G[G > 0]
    assert found["optimizer_state/noise_rms"] == pytest.approx(np.sqrt(np.mean(1 - u**2)), rel=1e-5)
    assert found["optimizer_state/sign_agreement"] == pytest.approx(np.mean((1 + np.abs(u)) / 2), rel=1e-5)


def test_histograms_hold_the_log10_of_the_nonzero_magnitudes(recorded):
    step, _, found = recorded("adamw")
    values = np.abs(step.flat("exp_avg_sq"))
    edges = log10_bin_edges().numpy()
    counts, _ = np.histogram(np.log10(values[values > 0]), bins=edges)
    histogram = found["optimizer_state/log10_abs/exp_avg_sq"][2]
    filled = {round(edge, 2): n for edge, n in zip(histogram.bucket_limit, histogram.bucket, strict=True) if n}
    assert filled == {round(edge, 2): n for edge, n in zip(edges[1:], counts, strict=True) if n}
    assert histogram.num == np.count_nonzero(values)
    assert (histogram.min, histogram.max) == (edges[counts.nonzero()[0][0]], edges[counts.nonzero()[0][-1] + 1])


def test_histograms_are_for_each_layer_too(recorded):
    _, _, found = recorded("adamw")
    assert found["optimizer_state/log10_abs/exp_avg_sq/first.weight"][2].num == 16


def test_a_state_of_zeros_only_gives_an_empty_histogram(tmp_path):
    fit(Regression("sgd", scale=lambda step: 0.0), tmp_path, max_steps=1, callbacks=[OptimizerStateMonitor()])
    assert histograms(tmp_path)["optimizer_state/log10_abs/momentum_buffer"][0].num == 0


def test_low_precision_states_are_recorded_as_the_values_they_stand_for(tmp_path):
    step = Step(2)
    fit(Regression("stosign-fp8"), tmp_path, callbacks=[OptimizerStateMonitor(), step])
    values = np.concatenate([s["exp_inf"].reshape(-1) * s["exp_inf_scale"] for s in step.states.values()])
    assert scalars(tmp_path)["optimizer_state/abs_max/exp_inf"][2] == pytest.approx(values.max(), rel=1e-6)


def test_lbfgs_s_step_is_measured_from_before_its_first_evaluation(tmp_path):
    step = Step(0)
    fit(Regression("lbfgs"), tmp_path, max_steps=1, callbacks=[OptimizerStateMonitor(), step])
    moved = np.concatenate([((step.after[n] - step.before[n]) / 0.1).reshape(-1) for n in LAYERS])
    assert scalars(tmp_path)["optimizer_state/update_rms"][0] == pytest.approx(np.sqrt(np.mean(moved**2)), rel=1e-4)


# ---- steps -----------------------------------------------------------------------------------------------------------


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
        prefix: {
            tag.rpartition("/")[2] for tag in two_optimizers if re.match(f"optimizer_state/{prefix}/update_rms/", tag)
        }
        for prefix in ("0-StoSignSGD", "1-AdamW")
    }
    assert by_optimizer == {"0-StoSignSGD": {"first.weight", "first.bias"}, "1-AdamW": {"head.weight", "head.bias"}}


@pytest.mark.parametrize("prefix", ["0-StoSignSGD", "1-AdamW"])
def test_two_optimizers_records_have_the_steps_of_lightning_s_own_metrics(two_optimizers, prefix):
    # 4 batches of 2 optimizer steps
    assert list(two_optimizers[f"optimizer_state/{prefix}/update_rms"]) == list(two_optimizers["loss"]) == [1, 3]


def test_two_optimizers_each_get_the_step_they_took(two_optimizers):
    assert two_optimizers["optimizer_state/0-StoSignSGD/update_rms/first.bias"][3] == pytest.approx(1.0, abs=1e-5)


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


# ---- monitoring changes nothing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["stosign", "stosign-fp8", "signsgd", "adamw", "sgd", "lbfgs", "adafactor"])
def test_weights_are_bit_identical_with_and_without_the_monitor(tmp_path, optimizer):
    watched, alone = Regression(optimizer), Regression(optimizer)
    fit(watched, tmp_path, gradient_clip_val=0.1, callbacks=[OptimizerStateMonitor()])
    fit(alone, gradient_clip_val=0.1)
    for (name, p), q in zip(watched.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_dropout_was_on_in_these_tests():
    a, b = Regression("sgd"), Regression("sgd")
    fit(a, seed=0, max_steps=1)
    fit(b, seed=1, max_steps=1)
    assert not torch.equal(a.head.weight, b.head.weight)


def test_the_global_generator_is_where_it_would_be_without_the_monitor(tmp_path):
    fit(Regression(), tmp_path, callbacks=[OptimizerStateMonitor()])
    watched = torch.get_rng_state()
    fit(Regression())
    assert torch.equal(watched, torch.get_rng_state())


def test_states_are_bit_identical_with_and_without_the_monitor(tmp_path):
    runs = [
        fit(Regression("stosign-fp8"), tmp_path, callbacks=[OptimizerStateMonitor()]),
        fit(Regression("stosign-fp8"), callbacks=[]),
    ]
    watched, alone = ([*run.optimizers[0].state.values()] for run in runs)
    for a, b in zip(watched, alone, strict=True):
        assert {k: v.double().tolist() for k, v in a.items()} == {k: v.double().tolist() for k, v in b.items()}


def test_a_step_that_is_not_recorded_copies_no_parameter(tmp_path, monkeypatch):
    clones = []
    clone = Tensor.clone
    module = Regression("sgd")
    shapes = {p.shape for p in module.parameters()}

    def counted(self, *args, **kwargs):
        if self.shape in shapes:
            clones.append(module.global_step)
        return clone(self, *args, **kwargs)

    run = trainer(tmp_path, max_steps=4, callbacks=[OptimizerStateMonitor(every_n_steps=3)])
    # SGD clones its first gradient into the momentum; the monitor the four parameters at step 2.
    monkeypatch.setattr(Tensor, "clone", counted)
    run.fit(module)
    assert [step for step in clones if step != 0] == [2, 2, 2, 2]


class HookCount(pl.Callback):
    """Counts the hooks on the optimizer while it trains; keeps it for afterwards."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        (self.optimizer,) = trainer.optimizers
        self.during = len(self.optimizer._optimizer_step_post_hooks)


def test_hooks_are_gone_after_fit(tmp_path):
    count = HookCount()
    fit(Regression(), tmp_path, callbacks=[OptimizerStateMonitor(), count])
    assert (count.during, len(count.optimizer._optimizer_step_post_hooks)) == (1, 0)


class Failing(Regression):
    def training_step(self, batch, batch_idx):
        if self.global_step == 2:
            raise ZeroDivisionError
        return super().training_step(batch, batch_idx)


def test_hooks_are_gone_after_an_exception(tmp_path):
    count = HookCount()
    with pytest.raises(ZeroDivisionError):
        fit(Failing(), tmp_path, callbacks=[OptimizerStateMonitor(), count])
    assert (count.during, len(count.optimizer._optimizer_step_post_hooks)) == (1, 0)


def test_after_an_exception_no_copies_are_kept(tmp_path):
    monitor = OptimizerStateMonitor()
    with pytest.raises(ZeroDivisionError):
        fit(Failing(), tmp_path, callbacks=[monitor])
    assert not (monitor._begun or monitor._names or monitor._handles)


def test_a_second_fit_is_recorded_as_well(tmp_path):
    monitor = OptimizerStateMonitor(per_layer=False)
    fit(Regression(), tmp_path / "a", max_steps=2, callbacks=[monitor])
    fit(Regression("adamw"), tmp_path / "b", max_steps=2, callbacks=[monitor])
    assert list(scalars(tmp_path / "b")["optimizer_state/rms/exp_avg_sq"]) == [0, 1]


def test_a_fit_after_an_exception_is_recorded_once_a_step(tmp_path):
    monitor = OptimizerStateMonitor(per_layer=False)
    with pytest.raises(ZeroDivisionError):
        fit(Failing(), tmp_path / "a", callbacks=[monitor])
    fit(Regression(), tmp_path / "b", max_steps=3, callbacks=[monitor])
    assert [e.step for e in events(tmp_path / "b").Scalars("optimizer_state/update_rms")] == [0, 1, 2]


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        (["*.bias"], {"first.bias", "head.bias"}),
        (["first.*", "head.weight"], {"first.weight", "first.bias", "head.weight"}),
        (["head.weight"], {"head.weight"}),
    ],
)
def test_layers_are_chosen_by_globs(tmp_path, globs, expected):
    fit(Regression(), tmp_path, max_steps=1, callbacks=[OptimizerStateMonitor(layers=globs)])
    found = {tag.rpartition("/")[2] for tag in scalars(tmp_path) if tag.startswith("optimizer_state/update_rms/")}
    assert found == expected


def test_global_records_are_of_the_chosen_layers_only(tmp_path):
    fit(Regression(), tmp_path, max_steps=1, callbacks=[OptimizerStateMonitor(layers=["first.weight"])])
    found = scalars(tmp_path)
    assert found["optimizer_state/zero_fraction/exp_inf"][0] == pytest.approx(1 / 3)
    assert found["optimizer_state/grad_abs_max"] == found["optimizer_state/grad_abs_max/first.weight"]


@pytest.mark.parametrize("globs", [["nothing.*"], []])
def test_globs_that_match_nothing_are_an_error(tmp_path, globs):
    with pytest.raises(ValueError, match=re.escape(f"layers={globs} matches no parameter of Regression")):
        fit(Regression(), tmp_path, callbacks=[OptimizerStateMonitor(layers=globs)])


def test_a_trainer_without_a_logger_is_an_error():
    with pytest.raises(ValueError, match=r"logger=False; accepted: Trainer\(logger="):
        fit(Regression(), callbacks=[OptimizerStateMonitor()])


def test_validation_needs_no_logger():
    class Validated(Regression):
        def validation_step(self, batch, batch_idx):
            pass

        def val_dataloader(self):
            return self.train_dataloader()

    trainer(callbacks=[OptimizerStateMonitor()]).validate(Validated(), verbose=False)


def test_fast_dev_run_works(tmp_path):
    run = fit(Regression(), tmp_path, fast_dev_run=2, callbacks=[OptimizerStateMonitor()])
    assert run.global_step == 2


def test_log_every_n_steps_0_records_nothing(tmp_path):
    fit(Regression(), tmp_path, log_every_n_steps=0, callbacks=[OptimizerStateMonitor()])
    assert not any(tag.startswith("optimizer_state") for tag in scalars(tmp_path))


def test_other_loggers_get_the_scalars(tmp_path):
    run = fit(Regression(), logger=CSVLogger(tmp_path), max_steps=2, callbacks=[OptimizerStateMonitor()])
    assert "optimizer_state/update_rms/head.bias" in run.logger.experiment.metrics_keys


class FrozenHead(Regression):
    def __init__(self):
        super().__init__()
        self.head.requires_grad_(False)


def test_parameters_without_a_gradient_are_passed_over(tmp_path):
    fit(FrozenHead(), tmp_path, max_steps=1, callbacks=[OptimizerStateMonitor()])
    found = {tag.rpartition("/")[2] for tag in scalars(tmp_path) if tag.startswith("optimizer_state/update_rms/")}
    assert found == {"first.weight", "first.bias"}


class NoLr(torch.optim.Optimizer):
    """A parameter-free optimizer: its param groups have no lr."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        with torch.enable_grad():
            closure()
        for param in self.param_groups[0]["params"]:
            self.state[param]["trend"] = param.grad.clone()


class ParameterFree(Regression):
    def configure_optimizers(self):
        return NoLr(self.parameters())


def test_an_optimizer_without_lr_has_no_update_rms(tmp_path):
    fit(ParameterFree(), tmp_path, max_steps=1, callbacks=[OptimizerStateMonitor()])
    found = scalars(tmp_path)
    assert "optimizer_state/rms/trend" in found
    assert "optimizer_state/update_rms" not in found


class Embedded(Regression):
    def __init__(self):
        super().__init__()
        self.first = nn.Embedding(6, 8, sparse=True)

    def loss(self, batch):
        return self.first(batch[0].abs().long().clamp(max=5)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SparseAdam(self.first.parameters())


def test_sparse_gradients_are_monitored(tmp_path):
    fit(Embedded(), tmp_path, max_steps=1, callbacks=[OptimizerStateMonitor()])
    assert scalars(tmp_path)["optimizer_state/zero_fraction/exp_avg_sq"][0] > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every_n_steps": 0}, ValueError, r"every_n_steps=0 must be at least 1"),
        ({"every_n_steps": -3}, ValueError, r"every_n_steps=-3 must be at least 1"),
        ({"every_n_steps": 1.5}, TypeError, r"every_n_steps=1\.5 must be an int"),
        ({"every_n_steps": True}, TypeError, r"every_n_steps=True must be an int"),
        ({"forecast": "fp8"}, TypeError, r"forecast='fp8' must be a list of strings"),
        ({"forecast": None}, TypeError, r"forecast=None must be a list of strings"),
        ({"forecast": ["fp9"]}, ValueError, r"'fp9' is unknown; accepted"),
        ({"layers": "*.bias"}, TypeError, r"layers='\*\.bias' must be a list of strings"),
        ({"layers": 3}, TypeError, r"layers=3 must be a list of strings"),
    ],
)
def test_bad_arguments_are_refused_in_the_user_s_words(options, error, message):
    with pytest.raises(error, match=message):
        OptimizerStateMonitor(**options)
