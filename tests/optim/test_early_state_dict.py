"""Reading the state before the first step, as torch.distributed.checkpoint does, changes nothing of the run."""

import copy

import pytest
import torch
from optim.contract_cases import assert_same_params, net
from optim.test_changing_groups import MAKES, train
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

MAKES = {
    **MAKES,
    "MuonSign's matrices": lambda params: MAKES["MuonSign"](
        [{"params": [p], "use_muon": p.dim() == 2} for p in params]
    ),
    "Muon's matrices": lambda params: MAKES["MuonAdamW"]([{"params": [p], "use_muon": p.dim() == 2} for p in params]),
}

each_optimizer = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)


def options(optimizer):
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


@each_optimizer
@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
def test_reading_the_state_before_the_first_step_changes_nothing_of_the_run(make, lr):
    model, twin = net(), net()
    optimizer, expected = make(list(model.parameters())), make(list(twin.parameters()))
    for group in (*optimizer.param_groups, *expected.param_groups):
        group["lr"] = copy.copy(lr)
    read = get_optimizer_state_dict(model, optimizer)
    assert options(optimizer) == options(expected)
    assert read["param_groups"][0]["params"][0] == "0.weight"
    train(model, optimizer, range(4))
    train(twin, expected, range(4))
    assert_same_params(model, twin)


@each_optimizer
def test_a_state_saved_before_the_first_step_starts_the_same_run(make):
    model, twin = net(), net()
    optimizer, expected = make(list(model.parameters())), make(list(twin.parameters()))
    early = copy.deepcopy(get_optimizer_state_dict(model, make(list(model.parameters()))))
    set_optimizer_state_dict(model, optimizer, early)
    train(model, optimizer, range(4))
    train(twin, expected, range(4))
    assert_same_params(model, twin)


@each_optimizer
def test_a_run_that_torch_distributed_checkpoint_saves_resumes_bit_for_bit(make):
    model = net()
    optimizer = make(list(model.parameters()))
    train(model, optimizer, range(3))
    saved, weights = copy.deepcopy(get_optimizer_state_dict(model, optimizer)), copy.deepcopy(model.state_dict())
    train(model, optimizer, range(3, 6))
    resumed = net()
    resumed.load_state_dict(weights)
    again = make(list(resumed.parameters()))
    set_optimizer_state_dict(resumed, again, saved)
    train(resumed, again, range(3, 6))
    assert_same_params(model, resumed)


def test_a_first_step_on_gradients_at_lr_0_counts():
    # A warm-up from 0: the momentum begins here.
    model, twin = net(), net()
    for m, lr in ((model, 0.0), (twin, 0.01)):
        optimizer = MAKES["StoSignSGD"](list(m.parameters()), lr=lr)
        train(m, optimizer, [0])
        assert {int(state["step"]) for state in optimizer.state.values()} == {1}
        m[0].weight.grad = None
    assert not torch.equal(model[0].weight, twin[0].weight)
