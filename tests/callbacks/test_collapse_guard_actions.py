"""What StateCollapseGuard does about a collapse, what it says, and what a checkpoint keeps of it."""

import atexit
import re

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from fits import Regression, Step, events, fit
from lightning.pytorch.callbacks import ModelCheckpoint
from scripted import DYING, HEALTHY, NAN, Scripted, Underflowing, rows, run

from lightning_stosign import StateCollapseError, StateCollapseGuard, StatePrecision
from lightning_stosign.callbacks._collapse_report import smallest_number
from lightning_stosign.optim.emulation import as_stored

# ---- actions ---------------------------------------------------------------------------------------------------------


def test_warn_names_optimizer_state_step_and_share():
    trainer, messages = run([HEALTHY, DYING, DYING, DYING], StateCollapseGuard(patience=2))
    assert len(messages) == 1
    assert messages[0].startswith(
        "The state of AdamW has collapsed at step 3 (patience 2): 60.0% of exp_avg_sq is zero (limit 50.0%).\n\n| layer"
    )
    assert trainer.global_step == 4


def test_warn_says_when_values_are_not_finite():
    _, messages = run([NAN], StateCollapseGuard())
    assert "exp_avg_sq holds values that are not finite." in messages[0]


def test_warn_names_the_layers_that_are_judged_by_themselves():
    _, messages = run([{"y": DYING}], StateCollapseGuard(patience=1, per_layer=True))
    assert "60.0% of exp_avg_sq is zero in y (limit 50.0%)." in messages[0]


def test_one_message_says_all_that_collapsed_at_one_look():
    guard = StateCollapseGuard(patience=1)
    _, messages = run(Scripted(DYING, DYING, states=["exp_avg_sq"]), guard)
    assert len(messages) == 1
    assert "60.0% of exp_avg_sq is zero (limit 50.0%); 60.0% of the quotients explode (limit 1.0%)." in messages[0]


def test_it_acts_once_for_each_state():
    _, messages = run([DYING, DYING, HEALTHY, DYING, NAN, DYING], StateCollapseGuard(patience=1))
    assert len(messages) == 1


class ThenTheOther(Scripted):
    """Its first moment follows the second one a step later."""

    def follow_script(self, optimizer, args, kwargs):
        super().follow_script(optimizer, args, kwargs)
        if self.trainer.global_step == 1:
            optimizer.state[self.y]["exp_avg"].zero_()


def test_it_acts_for_each_state():
    guard = StateCollapseGuard(patience=1, states=["exp_avg_sq", "exp_avg"], max_exploding_fraction=1.0)
    _, messages = run(ThenTheOther(DYING, DYING, states=["exp_avg_sq"]), guard)
    assert guard.collapsed_at == {"exp_avg_sq": 1, "exp_avg": 2}
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


def test_raise_comes_out_of_fit_with_the_report():
    guard = StateCollapseGuard(patience=1, action="raise")
    with pytest.raises(StateCollapseError, match=re.escape("The state of AdamW has collapsed at step 2")) as raised:
        run([HEALTHY, DYING, DYING], guard)
    assert str(raised.value) == guard.report
    assert rows(guard.report).keys() == {"x", "y"}


def test_after_a_raise_training_resumes_from_the_last_checkpoint(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    guard = StateCollapseGuard(patience=1, action="raise")
    with pytest.raises(StateCollapseError):
        run([HEALTHY, HEALTHY, DYING], guard, callbacks=[checkpoint], enable_checkpointing=True)
    trainer, _ = run([HEALTHY] * 4, StateCollapseGuard(), ckpt_path=tmp_path / "last.ckpt")
    assert trainer.global_step == 4


# ---- the report ------------------------------------------------------------------------------------------------------


def test_report_lists_the_sick_layers_worst_first_and_since_when():
    guard = StateCollapseGuard(patience=2)
    run([{"y": 0.8}, {"x": 1.0, "y": 0.8}, {"x": 1.0, "y": 0.8}], guard)
    assert guard.collapsed_at == {"exp_avg_sq": 2}
    table = rows(guard.report)
    assert list(table) == ["x", "y"]
    assert [row["since step"] for row in table.values()] == ["2", "1"]
    assert [row["zeros of exp_avg_sq"] for row in table.values()] == ["100.0%", "80.0%"]


def test_report_leaves_healthy_layers_out():
    guard = StateCollapseGuard(patience=1)
    run([{"y": 0.8}], guard)
    assert rows(guard.report).keys() == {"y"}


def test_a_value_that_is_not_finite_is_worse_than_zeros():
    guard = StateCollapseGuard(patience=1)
    run([{"x": 1.0, "y": NAN}], guard)
    assert list(rows(guard.report)) == ["y", "x"]


def test_a_long_list_of_layers_is_cut():
    class Deep(Regression):
        def __init__(self):
            super().__init__(optimizer="adamw", scale=lambda step: 0.0)
            self.more = torch.nn.ParameterList(torch.nn.Parameter(torch.ones(2)) for _ in range(30))

        def loss(self, batch):
            return super().loss(batch) + sum(p.sum() for p in self.more)

    guard = StateCollapseGuard(patience=1)
    fit(Deep(), callbacks=[guard], max_steps=1)
    assert len(rows(guard.report)) == 20
    assert "... and 14 more layers" in guard.report


def test_report_has_the_columns_of_table_12():
    guard, seen = StateCollapseGuard(patience=2, every_n_steps=1), Step(1)
    fit(Underflowing(), callbacks=[guard, seen], gradient_clip_val=0.05)
    assert guard.collapsed_at == {"exp_avg_sq": 2, "exploding_fraction": 2}
    table = rows(guard.report)
    assert table
    for layer, row in table.items():
        for state in ("exp_avg", "exp_avg_sq"):
            assert row[f"zeros of {state}"] == f"{np.mean(seen.states[layer][state] == 0):.1%}"
        largest = np.abs(seen.clipped[layer]).max()
        assert (row["max abs g"], row["max g*g"]) == (f"{largest:.1e}", f"{largest**2:.1e}")
        assert (row["stored in"], row["smallest exp_avg_sq"]) == ("fp8-raw:min_numel=0", f"{2**-9:.1e}")


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize(
    "name",
    [
        "fp8-raw",
        "fp8-raw:static_scale=64",
        "fp8",
        "fp8:dtype=float8_e5m2",
        "fp4-block",
        "float16",
        "float32",
        "bfloat16",
    ],
)
@pytest.mark.parametrize("largest", [3e-3, 0.875, 1.0, 448.0])
def test_below_half_of_the_smallest_number_a_value_becomes_zero_and_above_it_does_not(name, degree, largest):
    precision = StatePrecision.parse(name)
    smallest = smallest_number(precision, degree, largest)
    if smallest < 1e-38:
        smallest = torch.tensor(smallest, dtype=torch.float64).float().item()  # held as a subnormal number
        values = torch.tensor([largest, smallest])
        assert as_stored(values, precision, degree)[1] == smallest
        return
    values = torch.tensor([largest, smallest * 0.49, smallest * 0.51])
    _, below, above = as_stored(values, precision, degree)
    assert (below, above) == (0, smallest)


def test_tensorboard_gets_the_report_as_a_text_record(tmp_path):
    guard = StateCollapseGuard(patience=2, every_n_steps=2)
    run([DYING] * 6, guard, folder=tmp_path)
    accumulator = events(tmp_path)
    (tag,) = [tag for tag in accumulator.Tags()["tensors"] if "collapse" in tag]
    (event,) = accumulator.Tensors(tag)
    assert (tag, event.step) == ("optimizer_state/collapse/text_summary", 3)
    assert event.tensor_proto.string_val[0].decode() == guard.report


# ---- over several fits -----------------------------------------------------------------------------------------------


def test_its_state_is_in_the_checkpoint_as_plain_values(tmp_path):
    guard = StateCollapseGuard(patience=2)
    trainer, _ = run([HEALTHY, {"y": 1.0}, {"y": 1.0}, {"y": 1.0}], guard)
    trainer.save_checkpoint(tmp_path / "4.ckpt")
    saved = torch.load(tmp_path / "4.ckpt", weights_only=True)["callbacks"][guard.state_key]
    assert saved == {
        "action": "warn",
        "collapsed_at": {"exp_avg_sq": 3},
        "promotions": [],
        "report": guard.report,
        "sick": {"exp_avg_sq": [2, 3], "exp_avg_sq/y": [2, 3]},
        "done": ["exp_avg_sq"],
    }


def test_a_resumed_run_goes_on_counting(tmp_path):
    run([HEALTHY, DYING], StateCollapseGuard(patience=2))[0].save_checkpoint(tmp_path / "2.ckpt")
    guard = StateCollapseGuard(patience=2)
    run([None, None, DYING, DYING], guard, ckpt_path=tmp_path / "2.ckpt")
    assert guard.collapsed_at == {"exp_avg_sq": 3}
    assert {row["since step"] for row in rows(guard.report).values()} == {"2"}


def test_a_resumed_run_does_not_act_again(tmp_path):
    before = StateCollapseGuard(patience=1)
    run([DYING], before)[0].save_checkpoint(tmp_path / "1.ckpt")
    guard = StateCollapseGuard(patience=1)
    trainer, messages = run([None, DYING, DYING], guard, ckpt_path=tmp_path / "1.ckpt")
    assert (trainer.global_step, messages, guard.collapsed_at) == (3, [], {"exp_avg_sq": 1})
    assert guard.report == before.report


def test_a_checkpoint_of_the_first_version_loads():
    guard = StateCollapseGuard(patience=1)
    guard.load_state_dict({"collapsed_at": {"exp_avg_sq": 1}, "looks_above": {"exp_avg_sq": 2}})
    assert (guard.collapsed_at, guard.promotions, guard.report) == ({"exp_avg_sq": 1}, [], None)
    assert guard.state_dict()["done"] == ["exp_avg_sq"]


def test_a_run_that_is_resumed_with_another_action_takes_it(tmp_path):
    run([DYING], StateCollapseGuard(patience=1))[0].save_checkpoint(tmp_path / "1.ckpt")
    guard = StateCollapseGuard(patience=1, action="stop")
    trainer, _ = run([None, DYING, DYING], guard, ckpt_path=tmp_path / "1.ckpt")
    assert (trainer.global_step, guard.collapsed_at) == (2, {"exp_avg_sq": 1})


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


# ---- on several ranks ------------------------------------------------------------------------------------------------


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
