"""When StateCollapseGuard calls a state collapsed."""

import re

import pytest
import torch
from fits import Regression, fit
from scripted import DYING, HEALTHY, INF, NAN, Scripted, run

from lightning_stosign import StateCollapseGuard, StoSignSGD, emulate_state_precision


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_collapse_is_after_patience_looks_in_a_row(patience):
    guard = StateCollapseGuard(patience=patience)
    run([HEALTHY, *[DYING] * 4], guard)
    assert guard.collapsed_at == {"exp_avg_sq": 1 + patience}


def test_recovery_resets_the_count():
    guard = StateCollapseGuard(patience=2)
    run([DYING, HEALTHY, DYING, HEALTHY, DYING], guard)
    assert guard.collapsed_at == {}


def test_after_a_recovery_the_count_starts_again():
    guard = StateCollapseGuard(patience=2)
    run([DYING, HEALTHY, DYING, DYING], guard)
    assert guard.collapsed_at == {"exp_avg_sq": 4}


@pytest.mark.parametrize(("share", "collapsed"), [(0.2, False), (0.3, False), (0.4, True), (1.0, True)])
def test_only_a_share_above_the_limit_is_a_collapse(share, collapsed):
    guard = StateCollapseGuard(max_zero_fraction=0.3, patience=1)
    run([share], guard)
    assert bool(guard.collapsed_at) is collapsed


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_value_that_is_not_finite_is_a_collapse_at_once(value):
    guard = StateCollapseGuard(max_zero_fraction=1.0, patience=100)
    run([HEALTHY, value, HEALTHY], guard)
    assert guard.collapsed_at == {"exp_avg_sq": 2}


# ---- which looks -----------------------------------------------------------------------------------------------------


def test_looks_are_at_every_log_every_n_steps_th_step():
    guard = StateCollapseGuard(patience=2)
    run([DYING] * 9, guard, log_every_n_steps=3)
    assert guard.collapsed_at == {"exp_avg_sq": 6}


def test_the_guard_s_own_interval_goes_before_the_trainer_s():
    guard = StateCollapseGuard(patience=2, every_n_steps=2)
    run([DYING] * 9, guard, log_every_n_steps=3)
    assert guard.collapsed_at == {"exp_avg_sq": 4}


def test_a_trainer_that_logs_nothing_does_not_silence_the_guard():
    guard = StateCollapseGuard(patience=1)
    run([DYING] * 50, guard, log_every_n_steps=0)
    assert guard.collapsed_at == {"exp_avg_sq": 50}


def test_looks_are_at_optimizer_steps_not_batches():
    guard = StateCollapseGuard(patience=2)
    run([DYING] * 4, guard, accumulate_grad_batches=2, log_every_n_steps=2)
    assert guard.collapsed_at == {"exp_avg_sq": 4}


# ---- which conditions ------------------------------------------------------------------------------------------------


def test_by_default_the_denominator_is_watched_and_no_other_state():
    guard = StateCollapseGuard(patience=1)
    run(Scripted(1.0, 1.0, states=["exp_avg"]), guard)
    assert guard.collapsed_at == {}


def test_named_states_are_watched():
    guard = StateCollapseGuard(patience=1, states=["exp_avg"])
    run(Scripted(1.0, 1.0, states=["exp_avg"]), guard)
    assert guard.collapsed_at == {"exp_avg": 1}


@pytest.mark.parametrize(("share", "collapsed"), [(0.1, {}), (0.2, {"exploding_fraction": 1})])
def test_a_zero_denominator_under_a_numerator_that_is_not_is_exploding(share, collapsed):
    guard = StateCollapseGuard(patience=1, max_exploding_fraction=0.1)
    run(Scripted(share, states=["exp_avg_sq"]), guard)
    assert guard.collapsed_at == collapsed


def test_a_few_exploding_coordinates_are_a_collapse_by_default():
    guard = StateCollapseGuard()
    run(Scripted(*[0.1] * 3, states=["exp_avg_sq"]), guard)
    assert guard.collapsed_at == {"exploding_fraction": 3}


@pytest.mark.parametrize(("share", "collapsed"), [(0.3, {}), (0.4, {"dead_fraction": 1})])
def test_a_zero_denominator_under_a_zero_numerator_is_dead(share, collapsed):
    guard = StateCollapseGuard(patience=1, max_dead_fraction=0.3)
    run([share], guard)
    assert guard.collapsed_at == collapsed


def test_conditions_are_counted_apart():
    guard = StateCollapseGuard(patience=2, max_dead_fraction=0.2)
    run([0.3, 0.6, 0.6], guard)
    assert guard.collapsed_at == {"dead_fraction": 2, "exp_avg_sq": 3}


# ---- of which layers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share_of_y", "collapsed"), [(0.6, {}), (0.7, {"exp_avg_sq": 1})])
def test_by_default_all_layers_together_are_judged(share_of_y, collapsed):
    guard = StateCollapseGuard(patience=1)  # x has 10 of 40 values: 0.75 * 0.6 = 0.45 and 0.75 * 0.7 = 0.525
    run([{"y": share_of_y}], guard)
    assert guard.collapsed_at == collapsed


def test_on_request_each_layer_is_judged():
    guard = StateCollapseGuard(patience=2, per_layer=True)
    run([{"x": DYING}, {"y": DYING}, {"x": DYING, "y": DYING}, {"x": DYING}], guard)
    assert guard.collapsed_at == {"exp_avg_sq/y": 3, "exp_avg_sq/x": 4}


def test_a_layer_s_value_that_is_not_finite_is_its_own():
    guard = StateCollapseGuard(per_layer=True)
    run([{"x": NAN}], guard)
    assert guard.collapsed_at == {"exp_avg_sq/x": 1}


class TwoOptimizers(Regression):
    """StoSignSGD, and momentum SGD that steps only from the second batch on; all gradients are 0."""

    def __init__(self):
        super().__init__(scale=lambda step: 0.0)
        self.automatic_optimization = False

    def configure_optimizers(self):
        return StoSignSGD(self.first.parameters()), torch.optim.SGD(self.head.parameters(), lr=0.1, momentum=0.9)

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        self.manual_backward(self.loss(batch) * 0.0)
        for optimizer in optimizers[: 1 if batch_idx == 0 else 2]:
            optimizer.step()


def test_two_optimizers_states_are_told_apart():
    guard = StateCollapseGuard(patience=2)
    fit(TwoOptimizers(), callbacks=[guard], max_steps=7)
    assert guard.collapsed_at == {"0-StoSignSGD/exp_inf": 2, "1-SGD/momentum_buffer": 2}


def test_with_two_optimizers_a_name_has_to_be_a_state_of_one_of_them():
    guard = StateCollapseGuard(patience=2, states=["exp_avg", "momentum_buffer"])
    fit(TwoOptimizers(), callbacks=[guard], max_steps=7)
    assert guard.collapsed_at == {"0-StoSignSGD/exp_avg": 2, "1-SGD/momentum_buffer": 2}


# ---- in real training ------------------------------------------------------------------------------------------------


class TinyGradients(Regression):
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 0.01)
        emulate_state_precision(optimizer, "fp8-raw:min_numel=0")
        return optimizer


def test_an_fp8_second_moment_that_underflows_is_found():
    module, guard = TinyGradients(scale=lambda step: 1e-2), StateCollapseGuard(patience=2)
    fit(module, callbacks=[guard])
    assert guard.collapsed_at == {"exp_avg_sq": 2, "exploding_fraction": 2}


def test_stosign_s_envelope_survives_the_same_gradients():
    guard = StateCollapseGuard(patience=1)
    fit(Regression("stosign-fp8", scale=lambda step: 1e-2), callbacks=[guard])
    assert guard.collapsed_at == {}


def test_a_healthy_run_is_left_alone():
    trainer, messages = run([0.5] * 5, StateCollapseGuard(patience=1, action="raise"))
    assert (trainer.global_step, messages) == (5, [])


def test_weights_are_bit_identical_with_and_without_the_guard():
    watched, alone = Regression("stosign-fp8"), Regression("stosign-fp8")
    fit(watched, callbacks=[StateCollapseGuard(per_layer=True)])
    fit(alone)
    for (name, p), q in zip(watched.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(p, q), name


# ---- arguments -------------------------------------------------------------------------------------------------------


def test_a_state_that_the_optimizer_does_not_have_is_an_error_at_the_first_look():
    with pytest.raises(
        ValueError, match=re.escape("AdamW has no state ['exp_inf']; accepted: ['exp_avg', 'exp_avg_sq']")
    ):
        run([HEALTHY], StateCollapseGuard(states=["exp_inf", "exp_avg"]))


def test_what_is_no_moment_is_not_offered():
    with pytest.raises(ValueError, match=re.escape("no state ['step']; accepted: ['exp_avg', 'exp_inf']")):
        fit(Regression("stosign-fp8"), callbacks=[StateCollapseGuard(states=["step"])])


def test_a_state_that_plain_sgd_does_not_have_is_an_error():
    with pytest.raises(ValueError, match=re.escape("SGD has no state ['momentum_buffer']; accepted: []")):
        fit(Regression("plain-sgd"), callbacks=[StateCollapseGuard(states=["momentum_buffer"])])


def test_a_state_that_neither_of_two_optimizers_has_is_an_error_once_both_have_stepped():
    message = "StoSignSGD and SGD have no state ['exp_avg_sq']; accepted: ['exp_avg', 'exp_inf', 'momentum_buffer']"
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(TwoOptimizers(), callbacks=[StateCollapseGuard(states=["exp_avg_sq"])], max_steps=7)


class SkipsTheFirstStep(Regression):
    def configure_optimizers(self):
        return StoSignSGD(self.parameters(), on_nonfinite="skip")


@pytest.mark.filterwarnings("ignore:.*is not finite:RuntimeWarning")
def test_a_first_step_that_is_skipped_is_no_missing_state():
    module = SkipsTheFirstStep(scale=lambda step: INF if step == 0 else 1.0)
    trainer = fit(module, callbacks=[StateCollapseGuard(states=["exp_inf"])])
    assert trainer.global_step == 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_zero_fraction": -0.1}, ValueError, r"max_zero_fraction=-0\.1 must be in \[0, 1\]"),
        ({"max_zero_fraction": 1.1}, ValueError, r"max_zero_fraction=1\.1 must be in \[0, 1\]"),
        ({"max_zero_fraction": NAN}, ValueError, r"max_zero_fraction=nan must be in \[0, 1\]"),
        ({"max_zero_fraction": "0.5"}, TypeError, r"max_zero_fraction='0\.5' must be a number"),
        ({"max_zero_fraction": True}, TypeError, r"max_zero_fraction=True must be a number"),
        ({"max_dead_fraction": 2}, ValueError, r"max_dead_fraction=2 must be in \[0, 1\]"),
        ({"max_exploding_fraction": None}, TypeError, r"max_exploding_fraction=None must be a number"),
        ({"patience": 0}, ValueError, r"patience=0 must be at least 1"),
        ({"patience": 2.0}, TypeError, r"patience=2\.0 must be an int"),
        ({"patience": True}, TypeError, r"patience=True must be an int"),
        (
            {"action": "explode"},
            ValueError,
            r"action='explode' is unknown; accepted: 'warn', 'stop',",
        ),
        ({"states": "exp_avg"}, TypeError, r"states='exp_avg' must be a list of names"),
        ({"states": 1}, TypeError, r"states=1 must be a list of names"),
        ({"states": []}, ValueError, r"states=\[\] watches nothing"),
        ({"per_layer": 1}, TypeError, r"per_layer=1 must be a bool"),
        ({"every_n_steps": 0}, ValueError, r"every_n_steps=0 must be at least 1"),
        ({"every_n_steps": 1.0}, TypeError, r"every_n_steps=1\.0 must be an int or None"),
    ],
)
def test_bad_arguments_are_refused_in_the_user_s_words(options, error, message):
    with pytest.raises(error, match=message):
        StateCollapseGuard(**options)
