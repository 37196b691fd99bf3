"""What torch.optim's users rely on, where ALIAS keeps more than a state a parameter; and bad input."""

import copy
import io
import math
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_stosign import ALIAS

VARIANTS = [
    {},
    {"loss_lower_bound": 0.0},
    {"momentum": 0.9},
    {"momentum": 0.9, "beta2": 0.99, "weight_decay": 0.1},
    {"same_batch": False},
]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Dropout(0.25), nn.Linear(16, 3))


def train(net, optimizer, steps, start=0):
    losses = []
    for step in range(start, start + steps):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        torch.manual_seed(step)

        def closure(x=x):
            optimizer.zero_grad()
            loss = (net(x) - x[:, :3]).square().mean()
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
    return losses


def assert_same(a, b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


def through_a_file(value, **options):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_checkpoint_continues_bit_for_bit(options):
    net = model()
    optimizer = ALIAS(net.parameters(), measure_every=3, **options)
    train(net, optimizer, 8)
    saved = through_a_file({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, weights_only=True)
    other = model()
    loaded = ALIAS(other.parameters())
    other.load_state_dict(saved["net"])
    loaded.load_state_dict(saved["optimizer"])
    assert train(net, optimizer, 8, start=8) == train(other, loaded, 8, start=8)
    assert_same(net, other)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_continue_alike(copier):
    net = model()
    optimizer = ALIAS(net.parameters(), momentum=0.9, measure_every=3)
    train(net, optimizer, 8)
    other, copied = copier((net, optimizer))
    train(net, optimizer, 8, start=8)
    train(other, copied, 8, start=8)
    assert_same(net, other)


def test_state_dict_does_not_change_with_later_steps():
    net = model()
    optimizer = ALIAS(net.parameters(), measure_every=3)
    train(net, optimizer, 8)
    estimates = optimizer.state_dict()["param_groups"][0]["estimates"]
    before = copy.deepcopy(estimates)
    train(net, optimizer, 8, start=8)
    assert estimates == before


@pytest.mark.parametrize(
    ("options", "bytes_a_parameter"), [({}, 1), ({"momentum": 0.9}, 4), ({"beta2": 0.9}, 8), ({"same_batch": False}, 4)]
)
def test_memory_is_what_the_docstring_says(options, bytes_a_parameter):
    x = nn.Parameter(torch.zeros(100))
    optimizer = ALIAS([x], **options)
    x.grad = torch.ones(100)
    optimizer.step(lambda: torch.tensor(1.0))
    stored = [value for name, value in optimizer.state[x].items() if name != "step"]
    assert sum(value.numel() * value.element_size() for value in stored) == 100 * bytes_a_parameter


def test_dropout_of_the_training_is_that_of_any_optimizer():
    # The second evaluation replays the random numbers instead of drawing new ones.
    net, other = model(), model()
    optimizer, plain = ALIAS(net.parameters(), measure_every=1), torch.optim.SGD(other.parameters(), 0.1)
    train(net, optimizer, 3)
    after = torch.get_rng_state()
    train(other, plain, 3)
    assert torch.equal(after, torch.get_rng_state())


def test_frozen_unused_and_empty_parameters_are_left_alone():
    frozen, unused = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(2))
    empty, used = nn.Parameter(torch.ones(0, 3)), nn.Parameter(torch.ones(2))
    optimizer = ALIAS([frozen, unused, empty, used], weight_decay=0.1, measure_every=1)

    def closure():
        optimizer.zero_grad()
        loss = used.square().sum() + empty.sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(10)]
    assert losses[-1] < losses[0]
    assert torch.equal(frozen, torch.ones(2)) and torch.equal(unused, torch.ones(2))
    assert set(optimizer.state) == {used}


def test_parameter_without_gradient_for_a_step_does_not_disturb_the_measurement():
    # Two equal terms; one misses a step. The other's curvature is 2 a coordinate, whatever the first did before.
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = ALIAS([a, b], measure_every=1)

    def closure(params):
        optimizer.zero_grad()
        loss = sum(param.square().sum() for param in params)
        loss.backward()
        return loss

    curvatures = []
    for params in ((a, b), (a, b), (b,), (a, b), (a, b)):
        optimizer.step(lambda params=params: closure(params))
        curvatures.append(optimizer.param_groups[0]["estimates"]["curvature"].item())
    assert curvatures == pytest.approx([0.0, 8.0, 4.0, 4.0, 8.0], rel=1e-4)


def test_added_param_group_joins_in():
    x, y = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = ALIAS([x])

    def closure():
        optimizer.zero_grad()
        loss = x.square().sum() + 4 * y.square().sum()
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    optimizer.add_param_group({"params": [y], "lr": 0.5})
    losses = [optimizer.step(closure).item() for _ in range(30)]
    assert losses[-1] < 0.1 * losses[0]
    assert optimizer.param_groups[1]["step_size"] == optimizer.param_groups[0]["step_size"] / 2


def test_step_size_of_zero_for_a_while_is_survived():
    net = model()
    optimizer = ALIAS(net.parameters(), measure_every=1)
    train(net, optimizer, 5)
    before = copy.deepcopy(net)
    optimizer.param_groups[0]["lr"] = 0.0
    train(net, optimizer, 3)
    assert_same(net, before)
    optimizer.param_groups[0]["lr"] = 1.0
    losses = train(net, optimizer, 60)
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]


def test_zero_gradients_from_the_start_move_nothing():
    x = nn.Parameter(torch.ones(3))
    optimizer = ALIAS([x])

    def closure():
        x.grad = torch.zeros(3)
        return torch.tensor(0.0)

    for _ in range(4):
        optimizer.step(closure)
    assert torch.equal(x.detach(), torch.ones(3))


@pytest.mark.parametrize("variant", VARIANTS[:4], ids=str)
def test_nonfinite_gradient_raises_and_touches_nothing(variant):
    net = model()
    optimizer = ALIAS(net.named_parameters(), measure_every=1, **variant)
    train(net, optimizer, 3)
    before, saved = copy.deepcopy(net), copy.deepcopy(optimizer.state_dict())

    def closure():
        for param in net.parameters():
            param.grad = torch.full_like(param, math.nan)
        return torch.tensor(1.0)

    with pytest.raises(
        RuntimeError, match=r"the gradient of 0.weight \[16, 6\], .* is not finite; nothing was updated"
    ):
        optimizer.step(closure)
    assert_same(net, before)
    train(net, optimizer, 3, start=3)
    again = ALIAS(before.parameters())
    again.load_state_dict(saved)
    train(before, again, 3, start=3)
    assert_same(net, before)


def test_nonfinite_gradient_is_skipped_on_request():
    x = nn.Parameter(torch.ones(3))
    optimizer = ALIAS([x], on_nonfinite="skip")

    def closure():
        x.grad = torch.full((3,), math.inf)
        return torch.tensor(math.inf)

    with pytest.warns(RuntimeWarning, match="this step was skipped"):
        optimizer.step(closure)
    assert torch.equal(x.detach(), torch.ones(3)) and not optimizer.state


def test_gradient_that_overflows_only_at_the_previous_point_is_not_measured():
    x = nn.Parameter(torch.tensor([1.0]))
    optimizer = ALIAS([x], measure_every=1)
    calls = []

    def closure():
        calls.append(x.item())
        x.grad = torch.full((1,), math.inf) if len(calls) == 2 else 2 * x.detach()
        return x.detach().square().sum()

    for _ in range(4):
        optimizer.step(closure)
    assert math.isfinite(x.item()) and x.item() != 1.0


def falling(x):
    def closure():
        x.grad = torch.ones_like(x)
        return x.detach().sum()

    return closure


def test_loss_below_its_bound_warns_once_and_goes_on():
    x = nn.Parameter(torch.tensor([1.0]))
    optimizer = ALIAS([x], loss_lower_bound=2.0)
    with pytest.warns(RuntimeWarning, match=r"the loss 1 is below loss_lower_bound=2.0"):
        optimizer.step(falling(x))
    assert x.item() < 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(210):
            optimizer.step(falling(x))
    assert math.isfinite(x.item()) and optimizer.param_groups[0]["estimates"]["bound"] < 1.0


def test_first_loss_at_its_bound_does_not_stop_the_descent():
    x = nn.Parameter(torch.tensor([1.0]))
    optimizer = ALIAS([x], loss_lower_bound=1.0)

    def closure():
        x.grad = 2 * x.detach()
        return x.detach().square().sum()

    losses = [optimizer.step(closure).item() for _ in range(100)]
    assert losses[-1] < 0.9 * losses[0]


def test_loss_that_falls_below_its_bound_later_is_noticed():
    x = nn.Parameter(torch.tensor([1.0]))
    optimizer = ALIAS([x], loss_lower_bound=0.99)
    with pytest.warns(RuntimeWarning, match="is below loss_lower_bound=0.99"):
        for _ in range(120):
            optimizer.step(falling(x))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"momentum": 1.0}, ValueError, r"momentum=1.0 must be in \[0, 1\)"),
        ({"momentum": math.nan}, ValueError, "momentum=nan"),
        ({"beta2": -0.5}, ValueError, "beta2=-0.5"),
        ({"loss_lower_bound": math.nan}, ValueError, "loss_lower_bound=nan must be finite"),
        ({"loss_lower_bound": -0.5}, ValueError, "loss_lower_bound=-0.5 must be finite and at least 0"),
        ({"loss_lower_bound": "0"}, TypeError, "loss_lower_bound='0' must be a number"),
        ({"d0": 0.0}, ValueError, "d0=0.0 must be greater than 0, or None"),
        ({"d0": -1.0}, ValueError, "d0=-1.0"),
        ({"d0": math.nan}, ValueError, "d0=nan"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay=-0.1"),
        ({"same_batch": 1.5}, ValueError, "same_batch=1.5 is not supported; accepted: True, False"),
        ({"measure_every": 0}, ValueError, "measure_every=0 must be at least 1"),
        ({"measure_every": 2.0}, TypeError, "measure_every=2.0 must be an int"),
        ({"accumulate_grad_batches": 0}, ValueError, "accumulate_grad_batches=0 must be at least 1"),
        ({"on_nonfinite": "ignore"}, ValueError, "on_nonfinite='ignore'"),
    ],
)
def test_bad_argument_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ALIAS([nn.Parameter(torch.zeros(2))], **arguments)
    optimizer = ALIAS([nn.Parameter(torch.zeros(2))])
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], **arguments})
    assert len(optimizer.param_groups) == 1


def test_option_of_the_whole_optimizer_cannot_differ_between_groups():
    optimizer = ALIAS([nn.Parameter(torch.zeros(2))], d0=0.5)
    with pytest.raises(ValueError, match=r"d0=0.25 must be 0.5 as in the first param group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "d0": 0.25})


def test_missing_closure_is_explained():
    x = nn.Parameter(torch.ones(2))
    x.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"ALIAS needs optimizer.step\(closure\).*16-mixed.*same_batch=False"):
        ALIAS([x]).step()
    with pytest.raises(RuntimeError, match=r"loss_lower_bound=0.0 needs .* a closure that returns the loss"):
        ALIAS([x], loss_lower_bound=0.0).step(lambda: None)
    assert torch.equal(x.detach(), torch.ones(2))


@pytest.mark.slow
def test_sharded_model_trains_like_the_whole_with_one_communication_a_step():
    script = Path(__file__).with_name("alias_shards.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
