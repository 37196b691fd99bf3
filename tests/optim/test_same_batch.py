import pytest
import torch
from torch import nn

from lightning_stosign.optim.alias.same_batch import gradients_at


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))


def closure_of(net, clears=True):
    def closure():
        if clears:
            net.zero_grad()
        loss = net(torch.ones(3, 4)).square().mean()
        loss.backward()
        return loss

    return closure


def test_gradients_are_those_at_the_other_point_with_the_same_dropout(net):
    params = list(net.parameters())
    elsewhere = [param.detach() + 0.25 for param in params]
    state = torch.get_rng_state()
    found = gradients_at(params, elsewhere, closure_of(net))
    with torch.no_grad():
        for param, point in zip(params, elsewhere, strict=True):
            param.copy_(point)
    torch.set_rng_state(state)
    closure_of(net)()
    for grad, param in zip(found, params, strict=True):
        assert torch.equal(grad, param.grad)


def test_nothing_is_left_behind(net):
    params = list(net.parameters())
    values = [param.detach().clone() for param in params]
    params[0].grad = torch.full_like(params[0], 7.0)
    state = torch.get_rng_state()
    gradients_at(params, [torch.zeros_like(value) for value in values], closure_of(net))
    assert torch.equal(torch.get_rng_state(), state)
    for param, value in zip(params, values, strict=True):
        assert torch.equal(param, value)
    assert torch.equal(params[0].grad, torch.full_like(params[0], 7.0))
    assert [param.grad for param in params[1:]] == [None] * 3


def test_closure_that_adds_finds_the_same_gradients_as_the_next_call(net):
    params = list(net.parameters())
    for param in params:
        param.grad = torch.ones_like(param)
    found = gradients_at(params, [param.detach().clone() for param in params], closure_of(net, clears=False))
    closure_of(net, clears=False)()
    for grad, param in zip(found, params, strict=True):
        assert torch.equal(grad, param.grad)


def test_parameters_come_back_when_the_closure_fails(net):
    params = list(net.parameters())
    values, state = [param.detach().clone() for param in params], torch.get_rng_state()

    def closure():
        closure_of(net)()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gradients_at(params, [torch.zeros_like(value) for value in values], closure)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(param, value) for param, value in zip(params, values, strict=True))


def test_unused_parameter_has_no_gradient(net):
    unused = nn.Parameter(torch.ones(2))
    params = [*net.parameters(), unused]
    assert gradients_at(params, [param.detach().clone() for param in params], closure_of(net))[-1] is None
