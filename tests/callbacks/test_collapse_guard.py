import atexit
import re
import warnings

import lightning.pytorch as pl
import pytest
import torch
from fits import Regression, fit
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_stosign import StateCollapseError, StateCollapseGuard, StoSignSGD, emulate_state_precision

NAN, INF = float("nan"), float("inf")
HEALTHY, DYING = 0.0, 0.6


class Scripted(pl.LightningModule):
    """Ten weights under AdamW, whose second moment gets a share of zeros (or a NaN or inf) prescribed by step."""

    def __init__(self, *script, state="exp_avg_sq"):
        super().__init__()
        self.script, self.state = script, state
        self.x = nn.Parameter(torch.ones(10))

    def training_step(self, batch, batch_idx):
        return self.x.square().sum()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW([self.x], lr=1e-12)

        def follow_script(optimizer, args, kwargs):
            value = self.script[self.trainer.global_step]
            moment = optimizer.state[self.x][self.state].fill_(1.0)
            if value in (INF, -INF) or value != value:
                moment[0] = value
            else:
                moment[: round(10 * value)] = 0

        optimizer.register_step_post_hook(follow_script)
        return optimizer

    def train_dataloader(self):
        return torch.utils.data.DataLoader(range(64))


def run(script, guard, **options):
    """Train through the script and return the trainer and the guard's warnings."""
    module = script if isinstance(script, pl.LightningModule) else Scripted(*script)
    options.setdefault("max_steps", len(module.script))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(module, callbacks=[guard, *options.pop("callbacks", [])], **options)
    return trainer, [str(w.message) for w in caught if "has collapsed" in str(w.message)]


# ---- when ------------------------------------------------------------------------------------------------------------


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


def test_looks_are_at_every_log_every_n_steps_th_step():
    guard = StateCollapseGuard(patience=2)
    run([DYING] * 9, guard, log_every_n_steps=3)
    assert guard.collapsed_at == {"exp_avg_sq": 6}


def test_looks_are_at_optimizer_steps_not_batches():
    guard = StateCollapseGuard(patience=2)
    run([DYING] * 4, guard, accumulate_grad_batches=2, log_every_n_steps=2)
    assert guard.collapsed_at == {"exp_avg_sq": 4}


def test_by_default_the_denominator_is_watched_and_no_other_state():
    guard = StateCollapseGuard(patience=1)
    run(Scripted(1.0, 1.0, state="exp_avg"), guard)
    assert guard.collapsed_at == {}


def test_named_states_are_watched():
    guard = StateCollapseGuard(patience=1, states=["exp_avg"])
    run(Scripted(1.0, 1.0, state="exp_avg"), guard)
    assert guard.collapsed_at == {"exp_avg": 1}


class TinyGradients(Regression):
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 0.01)
        emulate_state_precision(optimizer, "fp8-raw:min_numel=0")
        return optimizer


def test_an_fp8_second_moment_that_underflows_is_found():
    module, guard = TinyGradients(scale=lambda step: 1e-2), StateCollapseGuard(patience=2)
    fit(module, callbacks=[guard])
    assert guard.collapsed_at == {"exp_avg_sq": 2}


def test_stosign_s_envelope_survives_the_same_gradients():
    guard = StateCollapseGuard(patience=1)
    fit(Regression("stosign-fp8", scale=lambda step: 1e-2), callbacks=[guard])
    assert guard.collapsed_at == {}


class TwoOptimizers(Regression):
    def __init__(self):
        super().__init__(scale=lambda step: 0.0)
        self.automatic_optimization = False

    def configure_optimizers(self):
        return StoSignSGD(self.first.parameters()), torch.optim.SGD(self.head.parameters(), lr=0.1, momentum=0.9)

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        self.manual_backward(self.loss(batch) * 0.0)
        for optimizer in optimizers:
            optimizer.step()


def test_two_optimizers_states_are_told_apart():
    guard = StateCollapseGuard(patience=2)
    fit(TwoOptimizers(), callbacks=[guard], max_steps=6)
    assert guard.collapsed_at == {"0-StoSignSGD/exp_inf": 3, "1-SGD/momentum_buffer": 4}


# ---- what it does ----------------------------------------------------------------------------------------------------


def test_warn_names_state_step_and_share():
    trainer, messages = run([HEALTHY, DYING, DYING, DYING], StateCollapseGuard(patience=2))
    assert messages == [
        "The optimizer state 'exp_avg_sq' has collapsed at step 3: 60.0% of its entries are zero "
        "(more than 50.0%, 2 looks in a row)."
    ]
    assert trainer.global_step == 4


def test_warn_says_when_values_are_not_finite():
    _, messages = run([NAN], StateCollapseGuard())
    assert messages == [
        "The optimizer state 'exp_avg_sq' has collapsed at step 1: it holds values that are not finite."
    ]


def test_it_acts_once_for_each_state():
    _, messages = run([DYING, DYING, HEALTHY, DYING, NAN, DYING], StateCollapseGuard(patience=1))
    assert len(messages) == 1


def test_it_acts_for_each_state():
    guard = StateCollapseGuard(patience=1, states=["exp_avg_sq", "exp_avg"], max_zero_fraction=0.0)
    module = Scripted(0.0, 0.5)
    module.training_step = lambda batch, batch_idx: module.x[1:].square().sum()
    _, messages = run(module, guard)
    assert guard.collapsed_at == {"exp_avg": 1, "exp_avg_sq": 2}
    assert len(messages) == 2


class Ended(pl.Callback):
    ended = False

    def on_train_end(self, trainer, pl_module):
        self.ended = True


def test_stop_ends_training_after_the_step_and_in_order():
    ended = Ended()
    trainer, messages = run(
        [HEALTHY, DYING, DYING, DYING], StateCollapseGuard(patience=1, action="stop"), callbacks=[ended]
    )
    assert (trainer.global_step, ended.ended) == (2, True)
    assert messages[0].endswith("Training stops.")


def test_stop_leaves_a_last_checkpoint_of_the_step(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    guard = StateCollapseGuard(patience=1, action="stop")
    run([HEALTHY, DYING, DYING], guard, callbacks=[checkpoint], enable_checkpointing=True)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


def test_raise_comes_out_of_fit_with_the_message():
    message = "The optimizer state 'exp_avg_sq' has collapsed at step 2: 60.0% of its entries are zero"
    with pytest.raises(StateCollapseError, match=re.escape(message)):
        run([HEALTHY, DYING, DYING], StateCollapseGuard(patience=1, action="raise"))


def test_after_a_raise_training_resumes_from_the_last_checkpoint(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    guard = StateCollapseGuard(patience=1, action="raise")
    with pytest.raises(StateCollapseError):
        run([HEALTHY, HEALTHY, DYING], guard, callbacks=[checkpoint], enable_checkpointing=True)
    trainer, _ = run([HEALTHY] * 4, StateCollapseGuard(), ckpt_path=tmp_path / "last.ckpt")
    assert trainer.global_step == 4


def test_a_healthy_run_is_left_alone():
    trainer, messages = run([0.5] * 5, StateCollapseGuard(patience=1, action="raise"))
    assert (trainer.global_step, messages) == (5, [])


def test_weights_are_bit_identical_with_and_without_the_guard():
    watched, alone = Regression("stosign-fp8"), Regression("stosign-fp8")
    fit(watched, callbacks=[StateCollapseGuard()])
    fit(alone)
    for (name, p), q in zip(watched.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(p, q), name


# ---- over several fits -----------------------------------------------------------------------------------------------


def test_its_state_is_in_the_checkpoint_as_plain_values(tmp_path):
    trainer, _ = run([DYING, DYING], StateCollapseGuard(patience=1))
    trainer.save_checkpoint(tmp_path / "2.ckpt")
    saved = torch.load(tmp_path / "2.ckpt", weights_only=True)["callbacks"]["StateCollapseGuard"]
    assert saved == {"collapsed_at": {"exp_avg_sq": 1}, "looks_above": {"exp_avg_sq": 2}}


def test_a_resumed_run_goes_on_counting(tmp_path):
    run([DYING, DYING], StateCollapseGuard(patience=3))[0].save_checkpoint(tmp_path / "2.ckpt")
    guard = StateCollapseGuard(patience=3)
    run([None, None, DYING, DYING], guard, ckpt_path=tmp_path / "2.ckpt")
    assert guard.collapsed_at == {"exp_avg_sq": 3}


def test_a_resumed_run_does_not_act_again(tmp_path):
    run([DYING], StateCollapseGuard(patience=1))[0].save_checkpoint(tmp_path / "1.ckpt")
    guard = StateCollapseGuard(patience=1, action="raise")
    trainer, messages = run([None, DYING, DYING], guard, ckpt_path=tmp_path / "1.ckpt")
    assert (trainer.global_step, messages, guard.collapsed_at) == (3, [], {"exp_avg_sq": 1})


def test_a_new_fit_starts_anew():
    guard = StateCollapseGuard(patience=2)
    run([DYING, DYING, DYING], guard)
    _, messages = run([HEALTHY, HEALTHY, HEALTHY, DYING, DYING], guard)
    assert (len(messages), guard.collapsed_at) == (1, {"exp_avg_sq": 5})


class HookCount(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        (self.optimizer,) = trainer.optimizers
        self.during = len(self.optimizer._optimizer_step_post_hooks)


def test_hooks_are_gone_after_fit():
    count = HookCount()
    fit(Regression(), callbacks=[StateCollapseGuard(), count])
    assert (count.during, len(count.optimizer._optimizer_step_post_hooks)) == (1, 0)


class Failing(Regression):
    def training_step(self, batch, batch_idx):
        if self.global_step == 2:
            raise ZeroDivisionError
        return super().training_step(batch, batch_idx)


def test_hooks_are_gone_after_an_exception():
    count = HookCount()
    with pytest.raises(ZeroDivisionError):
        fit(Failing(), callbacks=[StateCollapseGuard(), count])
    assert (count.during, len(count.optimizer._optimizer_step_post_hooks)) == (1, 0)


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
        ({"patience": 0}, ValueError, r"patience=0 must be at least 1"),
        ({"patience": 2.0}, TypeError, r"patience=2\.0 must be an int"),
        ({"patience": True}, TypeError, r"patience=True must be an int"),
        ({"action": "explode"}, ValueError, r"action='explode' is unknown; accepted: 'warn', 'stop', 'raise'"),
        ({"states": "exp_avg"}, TypeError, r"states='exp_avg' must be a list of names"),
        ({"states": 1}, TypeError, r"states=1 must be a list of names"),
        ({"states": []}, ValueError, r"states=\[\] watches nothing"),
    ],
)
def test_bad_arguments_are_refused_in_the_user_s_words(options, error, message):
    with pytest.raises(error, match=message):
        StateCollapseGuard(**options)


class WriteStep(pl.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        (self.folder / f"rank{trainer.global_rank}").write_text(str(trainer.global_step))

        # Lightning leaves gloo's group to the interpreter's end, where its threads now and then abort the process.
        atexit.register(torch.distributed.destroy_process_group)


@pytest.mark.slow
def test_stop_ends_training_on_both_ranks_at_the_same_step(tmp_path):
    fit(
        Scripted(*[HEALTHY, DYING, DYING, DYING, DYING, DYING]),
        callbacks=[StateCollapseGuard(patience=2, action="stop"), WriteStep(tmp_path)],
        strategy="ddp_spawn",
        devices=2,
        max_steps=6,
    )
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"rank0": "3", "rank1": "3"}
