import numpy as np
import pytest
import reference
import torch

from lightning_stosign import SignSGD


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_iterates_equal_the_reference(momentum, weight_decay, maximize):
    rng = np.random.default_rng(0)
    start, grads = rng.standard_normal((5, 3)), rng.standard_normal((20, 5, 3))
    x = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = SignSGD([x], 0.01, momentum, weight_decay, maximize=maximize)
    iterates = []
    for g in grads:
        x.grad = torch.from_numpy(g)
        optimizer.step()
        iterates.append(x.detach().numpy().copy())
    expected = reference.signsgd(start, -grads if maximize else grads, 0.01, momentum, weight_decay)
    np.testing.assert_allclose(np.stack(iterates), np.stack(expected), rtol=0, atol=1e-12)


def test_without_momentum_nothing_but_the_step_is_stored():
    x = torch.nn.Parameter(torch.zeros(3))
    x.grad = torch.ones(3)
    optimizer = SignSGD([x], momentum=0.0)
    optimizer.step()
    assert set(optimizer.state[x]) == {"step"}
    assert torch.equal(x.grad, torch.ones(3))  # the gradient is not used as a buffer


@pytest.mark.parametrize("lr", [0.3, 0.01, 0.001])
def test_figure_1_is_not_solved_whatever_the_step_size(lr):
    # Both subgradients have opposite signs, so x1 + x2 stays what it was: f >= |x1 + x2| = 0.5.
    x = torch.nn.Parameter(torch.tensor([0.9, -0.4], dtype=torch.float64))
    optimizer = SignSGD([x], lr, momentum=0.0)
    for _ in range(500):
        loss = (x[0] + x[1]).abs() + 2 * (x[0] - x[1]).abs()
        assert loss.item() >= 0.5 - 1e-9
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_bad_momentum_is_named(momentum):
    with pytest.raises(ValueError, match=f"momentum={momentum}"):
        SignSGD([torch.nn.Parameter(torch.zeros(2))], momentum=momentum)
