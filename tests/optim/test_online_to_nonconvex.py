import copy
import io
import math
from functools import partial

import numpy as np
import pytest
import reference
import torch
from torch import nn
from torch.optim import SGD, AdamW

from lightning_stosign import OnlineToNonconvex, StoSignSGD

HIDDEN, INPUTS = 5, 3


def data(seed=0):
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((16, INPUTS))
    return inputs, np.abs(inputs[:, 0]) - inputs[:, 1]


class Net(nn.Module):
    """The network of reference.relu_network, its parameters in the same order."""

    def __init__(self, start):
        super().__init__()
        self.first, self.a = nn.Linear(INPUTS, HIDDEN), nn.Parameter(torch.empty(HIDDEN))
        nn.utils.vector_to_parameters(torch.from_numpy(start), [self.first.weight, self.first.bias, self.a])

    def params(self):
        return [self.first.weight, self.first.bias, self.a]

    def vector(self):
        return nn.utils.parameters_to_vector(self.params()).detach().numpy().copy()

    def loss(self):
        inputs, targets = (torch.from_numpy(part) for part in data())
        return 0.5 * (torch.relu(self.first(inputs)) @ self.a - targets).square().mean()


def start(seed=1):
    return np.random.default_rng(seed).standard_normal(HIDDEN * (INPUTS + 2))


def train(net, optimizer, steps):
    points = []
    for _ in range(steps):
        points.append(net.vector())
        optimizer.zero_grad()
        net.loss().backward()
        optimizer.step()
    return points


def scales(seed, steps):
    """s ~ Exp(1) by inversion of the noise, which is in (-1, 1)."""
    words = (reference.noise(reference.key(seed, t, -1 & reference.MASK64), 1)[0] for t in range(1, steps + 1))
    return [-math.log((1 + n) / 2) for n in words]


def test_points_on_a_relu_network_equal_the_reference():
    steps, seed = 200, 4
    net = Net(start())
    optimizer = OnlineToNonconvex(net.params(), partial(StoSignSGD, betas=(0.8, 0.99)), 0.003, radius=0.01, seed=seed)
    points = train(net, optimizer, steps)
    sizes = [p.numel() for p in net.params()]
    noises = [
        np.concatenate([reference.noise(reference.key(seed, t, i), size) for i, size in enumerate(sizes)])
        for t in range(1, steps + 1)
    ]

    def gradient(x):
        return reference.relu_network(x, *data(), HIDDEN)[1]

    expected = reference.online_to_nonconvex(start(), gradient, 0.003, 0.8, 0.99, 0.01, noises, scales(seed, steps))
    np.testing.assert_allclose(points, expected, rtol=0, atol=1e-9)
    # and the reference's gradient is that of its loss
    x, direction = points[-1], np.random.default_rng(2).standard_normal(len(points[-1]))
    plus, minus = (reference.relu_network(x + h * direction, *data(), HIDDEN)[0] for h in (1e-6, -1e-6))
    assert (plus - minus) / 2e-6 == pytest.approx(gradient(x) @ direction, rel=1e-4)


def test_scaling_is_exponential():
    x = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = OnlineToNonconvex([x], SGD, lr=1.0, radius=1.0)
    draws = []
    for _ in range(4000):
        before = x.item()
        x.grad = torch.full((1,), -1.0, dtype=torch.float64)
        optimizer.step()
        draws.append(x.item() - before)  # Delta is at its limit of 1 from the first step on
    draws = np.sort(draws)
    # Kolmogorov-Smirnov: exceeded with probability 1e-6
    distance = np.abs(1 - np.exp(-draws) - np.arange(1, 4001) / 4000).max()
    assert distance < 2.7 / math.sqrt(4000)


def test_step_stays_within_the_radius_in_every_coordinate():
    net = Net(start())
    optimizer = OnlineToNonconvex(net.params(), lr=0.5, radius=0.01)
    for _ in range(20):
        train(net, optimizer, 1)
        assert all(optimizer.state[p]["delta"].abs().max() <= 0.01 for p in net.params())
    assert max(optimizer.state[p]["delta"].abs().max() for p in net.params()) == 0.01


def test_averages_restart_after_each_window_and_the_parameters_come_back():
    net = Net(start())
    optimizer = OnlineToNonconvex(net.params(), lr=0.001, radius=0.01, window=7)
    points = train(net, optimizer, 17)
    now = net.vector()
    with pytest.raises(KeyError), optimizer.averaged():
        np.testing.assert_allclose(net.vector(), np.mean(points[14:], axis=0), rtol=0, atol=1e-6)
        raise KeyError
    assert np.array_equal(net.vector(), now)


def test_without_a_window_nothing_is_averaged():
    net = Net(start())
    optimizer = OnlineToNonconvex(net.params())
    train(net, optimizer, 3)
    now = net.vector()
    with optimizer.averaged():
        assert np.array_equal(net.vector(), now)
    assert "window_mean" not in optimizer.state[net.a]


def test_weight_decay_is_the_learners_and_forgets_the_step():
    x = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = OnlineToNonconvex([x], partial(AdamW, betas=(0.0, 0.0)), 0.25, weight_decay=2.0, radius=10.0)
    x.grad = torch.full((3,), -1.0, dtype=torch.float64)
    optimizer.step()
    before = optimizer.state[x]["delta"].clone()
    x.grad.zero_()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[x]["delta"], before / 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("learner", [StoSignSGD, partial(AdamW, betas=(0.8, 0.9))])
def test_checkpoints_and_copies_continue_bit_for_bit(learner, dtype):
    net = Net(start())
    net.to(dtype)
    optimizer = OnlineToNonconvex(net.params(), learner, 0.01, window=4, seed=3)
    continue_on(net.params(), optimizer, 6)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = [nn.Parameter(p.detach().clone()) for p in net.params()]
    loaded = OnlineToNonconvex(twin, learner, 0.5)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    copied_params, copied = copy.deepcopy((net.params(), optimizer))
    results = [
        continue_on(net.params(), optimizer, 6),
        continue_on(twin, loaded, 6),
        continue_on(copied_params, copied, 6),
    ]
    for p, q, r in zip(*results, strict=True):
        assert torch.equal(p, q) and torch.equal(p, r)
    assert set(loaded.state[twin[0]]) >= {"delta", "window_mean", "outer_step", "exp_avg"}


def continue_on(params, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        torch.stack([p.float().square().sum() for p in params]).sum().backward()
        optimizer.step()
    return [p.detach() for p in params]


def test_parameters_that_join_late_share_the_random_factor():
    x, y = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = OnlineToNonconvex([x, y], SGD, lr=1.0, radius=1.0)
    x.grad = torch.ones(2)
    optimizer.step()
    before = x.detach().clone()
    y.grad = torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(x.detach() - before, y.detach())
    assert not torch.equal(y.detach(), before)  # the second step's factor, not the first's again


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"radius": 0}, ValueError, "radius=0 must be greater than 0"),
        ({"radius": float("inf")}, ValueError, "radius=inf must be finite"),
        ({"radius": "big"}, TypeError, "radius='big' must be a number"),
        ({"window": 0}, ValueError, "window=0 must be at least 1"),
        ({"window": 2.5}, TypeError, "window=2.5 must be an int or None"),
        ({"lr": -1.0}, ValueError, "lr=-1.0"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"learner": 3}, TypeError, "learner=3 must be a function of param groups"),
        ({"learner": list}, TypeError, "learner must build a torch.optim.Optimizer, not list"),
    ],
)
def test_bad_argument_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        OnlineToNonconvex([nn.Parameter(torch.zeros(2))], **arguments)
