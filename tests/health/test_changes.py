import pytest
import torch

from lightning_stosign.health import nominal_change

GRAD = torch.tensor([1.0, -2.0])


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.AdamW, {"betas": (0.8, 0.9)}),
        (torch.optim.Adam, {"betas": (0.8, 0.9), "maximize": True}),
        (torch.optim.Adamax, {"betas": (0.8, 0.9), "eps": 0.0}),
        (torch.optim.SGD, {"momentum": 0.8}),
        (torch.optim.SGD, {"momentum": 0.8, "dampening": 0.5}),
        (torch.optim.SGD, {"momentum": 0.8, "maximize": True}),
        (torch.optim.RMSprop, {"alpha": 0.8, "momentum": 0.0}),
        (torch.optim.Adagrad, {}),
        (torch.optim.Adadelta, {"rho": 0.8}),
        (torch.optim.NAdam, {"betas": (0.8, 0.9)}),
    ],
)
def test_nominal_change_is_what_the_next_step_with_the_same_gradient_does(optimizer, options):
    x = torch.nn.Parameter(torch.ones(2))
    made = optimizer([x], **options)
    x.grad = GRAD.clone()
    made.step()
    x.grad = torch.tensor([0.5, 4.0])
    made.step()
    before = {name: value.clone() for name, value in made.state[x].items()}
    group = made.param_groups[0]
    changes = {name: nominal_change(name, value, group, x.grad) for name, value in before.items()}
    made.step()
    known = {name: change for name, change in changes.items() if change is not None}
    assert known
    for name, change in known.items():
        torch.testing.assert_close(before[name] + change, made.state[x][name])


def test_without_a_gradient_averages_decay():
    change = nominal_change("exp_avg", torch.tensor([2.0, -1.0]), {"betas": (0.75, 0.9)})
    assert change.tolist() == [-0.5, 0.25]


def test_a_state_of_another_name_or_group_has_no_nominal_change():
    assert nominal_change("trend", GRAD, {"betas": (0.9, 0.99)}) is None
    assert nominal_change("exp_avg", GRAD, {"lr": 0.1}) is None
