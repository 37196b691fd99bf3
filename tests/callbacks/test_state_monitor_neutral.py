"""Monitoring changes nothing, costs nothing between records, and lets go."""

import lightning.pytorch as pl
import pytest
import torch
from fits import Regression, events, fit, scalars, trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_stosign import OptimizerStateMonitor


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


class Operations(TorchDispatchMode):
    """Counts torch's operations, and those that bring a number to the host."""

    def __init__(self):
        super().__init__()
        self.count, self.host_reads = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        self.host_reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def operations(folder, callbacks, **options):
    with Operations() as counted:
        fit(Regression("adamw"), folder, max_steps=6, callbacks=callbacks, **options)
    return counted


def test_steps_that_are_not_recorded_cost_no_operation(tmp_path):
    watched = operations(tmp_path / "a", [OptimizerStateMonitor(every_n_steps=7)])
    assert watched.count == operations(tmp_path / "b", []).count


def test_a_recorded_step_is_one_transfer_to_the_host(tmp_path, monkeypatch):
    transfers, cpu = [], Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: transfers.append(self.numel()) or cpu(self))
    plain = operations(tmp_path / "a", [])
    before = len(transfers)
    monitor = OptimizerStateMonitor(every_n_steps=2, forecast=["fp8", "fp8-block", "fp4-block", "bfloat16"])
    watched = operations(tmp_path / "b", [monitor])
    assert (len(transfers) - 2 * before, watched.host_reads) == (3, plain.host_reads)
