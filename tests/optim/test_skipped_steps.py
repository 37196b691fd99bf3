"""Steps that are not taken, because a gradient is not finite or a GradScaler says so, leave no trace.

On an accelerator the host does not wait for the answer; here, on the CPU, it is as late.
"""

import copy
import inspect

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.amp import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_stosign import SignSGD, StoSignSGD
from lightning_stosign.optim import low_precision

# Small, odd, and with more than one block.
SHAPES = [(5,), (300,), (130, 129)]
OPTIONS = [
    {},
    {"stochastic": False, "betas": (0.9, 0.9)},
    {"state_precision": "fp8:stochastic_rounding=true,min_numel=0"},
    {"state_precision": "fp8-block:min_numel=0"},
    {"state_precision": "fp4-block:min_numel=0"},
    {"state_precision": "bfloat16:min_numel=0", "dtype": torch.bfloat16, "betas": (0.9, 0.9)},
    {"cls": SignSGD},
    {"cls": SignSGD, "state_precision": "fp8:min_numel=0"},
    {"fused": True},
]

every_optimizer = pytest.mark.parametrize("options", OPTIONS, ids=str)


@pytest.fixture
def deferred(monkeypatch):
    """As on an accelerator."""
    monkeypatch.setattr(low_precision, "defers", lambda jobs: True)


@pytest.fixture(params=[False, True], ids=["waiting", "deferred"])
def either_way(request, monkeypatch):
    monkeypatch.setattr(low_precision, "defers", lambda jobs: request.param)
    return request.param


def set_up(cls=StoSignSGD, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    return params, cls(params, lr=0.1, weight_decay=0.1, **options)


def set_grads(params, seed, scale=1.0, bad=None):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype) * scale
    if bad is not None:
        params[1].grad[7] = bad


def step(params, optimizer, seed, bad=None):
    set_grads(params, seed, bad=bad)
    optimizer.step()


def bits(tensor):
    return tensor.detach().clone().view(-1).view(torch.uint8)


def snapshot(params, optimizer):
    """The bits of parameters and states, step counts included."""
    return [{"param": bits(p), **{name: bits(value) for name, value in optimizer.state[p].items()}} for p in params]


def assert_same(one, other):
    for of_param, expected in zip(one, other, strict=True):
        assert of_param.keys() == expected.keys()
        for name, value in of_param.items():
            assert torch.equal(value, expected[name]), name


@every_optimizer
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_step_with_a_bad_value_changes_nothing_and_the_next_one_raises(options, bad, deferred):
    params, optimizer = set_up(**options)
    step(params, optimizer, 1)
    before = snapshot(params, optimizer)
    step(params, optimizer, 2, bad)
    assert_same(snapshot(params, optimizer), before)
    with pytest.raises(RuntimeError, match=r"the gradient of params\[1\] of group 0 \[300\] is not finite"):
        step(params, optimizer, 3)
    assert_same(snapshot(params, optimizer), before)
    step(params, optimizer, 3)  # told once
    assert not torch.equal(bits(params[0]), before[0]["param"])


@every_optimizer
@pytest.mark.filterwarnings("ignore:.*this step was skipped")
def test_what_follows_skipped_steps_is_as_without_them(options, either_way):
    params, optimizer = set_up(on_nonfinite="skip", **options)
    others, expected = set_up(**options)
    for seed, bad in ((1, float("inf")), (2, None), (3, float("inf")), (4, float("nan")), (5, None), (6, None)):
        step(params, optimizer, seed, bad)
        if bad is None:
            step(others, expected, seed)
        if seed == 4:  # what is not known yet does not get lost on the way
            state_dict = copy.deepcopy(optimizer.state_dict())
            assert all(state["step"] == 1 for state in state_dict["state"].values())
            optimizer = set_up(on_nonfinite="skip", **options)[1]
            optimizer.param_groups[0]["params"][:] = params
            optimizer.load_state_dict(state_dict)
    assert_same(snapshot(params, optimizer), snapshot(others, expected))


def test_a_skipped_step_is_told_at_the_next_one_which_is_taken(deferred):
    params, optimizer = set_up(on_nonfinite="skip")
    step(params, optimizer, 1, float("inf"))
    with pytest.warns(RuntimeWarning, match="this step was skipped"):
        step(params, optimizer, 2)
    assert optimizer.state[params[0]]["exp_inf"].count_nonzero() == 5


class _HostReads(TorchDispatchMode):
    """Counts how often the host reads a value of a tensor, for which it would wait for an accelerator."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [o for o in OPTIONS if not o.get("fused")], ids=str)
def test_the_host_reads_nothing_from_the_device(options, deferred):
    params, optimizer = set_up(**options, fused=False)
    step(params, optimizer, 1)
    set_grads(params, 2)
    with _HostReads() as reads:
        optimizer.step()
    assert reads.count == 0


def scaled_run(scaler, **options):
    """Five steps under a scaler whose scale is too large at first."""
    params, optimizer = set_up(**options)
    for seed in range(1, 6):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(seed)
        loss = sum((p.float() * torch.randn(p.shape, generator=generator)).sum() for p in params)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return params, optimizer


@pytest.mark.parametrize(
    "options", [{}, {"state_precision": "fp8:min_numel=0"}, {"cls": SignSGD}, {"dtype": torch.bfloat16}], ids=str
)
def test_a_grad_scaler_may_leave_scaling_and_skipping_to_the_step(options, either_way):
    """Which it does under fused=True, as with torch's optimizers; the steps are those that it skips itself."""
    scalers = [GradScaler("cpu", init_scale=2.0**127, growth_interval=1000) for _ in range(2)]
    params, optimizer = scaled_run(scalers[0], fused=True, **options)
    others, expected = scaled_run(scalers[1], fused=False, **options)
    assert optimizer._step_supports_amp_scaling and not expected._step_supports_amp_scaling
    assert scalers[0].get_scale() == scalers[1].get_scale() < 2.0**127
    assert 0 < int(optimizer.state[params[0]]["step"]) < 5
    assert_same(snapshot(params, optimizer), snapshot(others, expected))


def test_gradients_that_the_scaler_found_finite_are_checked_too(either_way):
    """Clipping by a norm that overflows makes them NaN after it has looked."""
    params, optimizer = set_up(fused=True)
    before = [bits(param) for param in params]
    scaler = GradScaler("cpu", init_scale=2.0)
    with pytest.raises(RuntimeError, match="is not finite"):
        for _ in range(2):
            scaler.scale(sum(p.sum() for p in params)).backward()
            scaler.unscale_(optimizer)
            params[1].grad[3] = torch.nan
            scaler.step(optimizer)
            scaler.update()
    assert all(torch.equal(bits(param), kept) for param, kept in zip(params, before, strict=True))


def line_of(function, text):
    lines, first = inspect.getsourcelines(function)
    return first + next(i for i, line in enumerate(lines) if text in line)


def test_the_warning_points_at_the_user_s_line(either_way):
    params, optimizer = set_up(on_nonfinite="skip")
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)  # wraps step()

    def closure():
        set_grads(params, 1, bad=torch.nan)
        return params[0].sum()

    with pytest.warns(RuntimeWarning, match="this step was skipped") as caught:
        optimizer.step(closure)
        optimizer.step(closure)  # here
    scheduler.step()
    assert caught[-1].filename == __file__
    assert caught[-1].lineno == line_of(test_the_warning_points_at_the_user_s_line, "# here")


class _Broken(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch):
        return self.layer(batch).mean() * torch.inf

    def configure_optimizers(self):
        return StoSignSGD(self.parameters(), on_nonfinite="skip")


def test_the_warning_points_at_the_user_s_line_in_a_fit(either_way, tmp_path):
    trainer = Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    with pytest.warns(RuntimeWarning, match="this step was skipped") as caught:
        trainer.fit(_Broken(), torch.utils.data.DataLoader(torch.ones(8, 2)))
    ours = [warning for warning in caught if "this step was skipped" in str(warning.message)]
    assert {warning.filename for warning in ours} == {__file__}
