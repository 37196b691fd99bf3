"""Param groups that change after construction: every optimizer of the package goes by what they say now."""

import copy
from functools import partial

import pytest
import torch
from optim.contract_cases import assert_same_params, backward, net

from lightning_stosign import ALIAS, MuonSign, OnlineToNonconvex, SignConverted, SignSGD, StoSignSGD
from lightning_stosign.optim.wrappers.muon_adamw import MuonAdamW


def muon(params, **options):
    groups = [group if isinstance(group, dict) else {"params": [group]} for group in params]
    return MuonAdamW([{"use_muon": False, **group} for group in groups], **options)


MAKES = {
    "StoSignSGD": partial(StoSignSGD, lr=0.01, state_precision="fp8:min_numel=0"),
    "SignSGD": partial(SignSGD, lr=0.01),
    "SignConverted": partial(SignConverted, base=torch.optim.AdamW, lr=0.01),
    "SignConverted of Adagrad": partial(SignConverted, base=torch.optim.Adagrad, lr=0.01),
    "OnlineToNonconvex": partial(OnlineToNonconvex, lr=0.01, window=5),
    "MuonAdamW": partial(muon, lr=0.01),
    "MuonSign": partial(MuonSign, lr=0.01, state_precision="fp8:min_numel=0"),
    "ALIAS": partial(ALIAS, momentum=0.9, beta2=0.99),
}

each_optimizer = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)


def train(model, optimizer, seeds):
    for seed in seeds:
        optimizer.step(partial(backward, model, seed))


def parts(model):
    """Return the parameters in three parts."""
    params = list(model.parameters())
    return params[:2], params[2:5], params[5:]


def values(params):
    return [param.detach().clone() for param in params]


def moved(params, before):
    return [not torch.equal(param, old) for param, old in zip(params, before, strict=True)]


@each_optimizer
def test_groups_moved_by_hand_train_as_groups_made_so(make):
    model, twin = net(), net()
    first, second, third = parts(model)
    optimizer = make([{"params": first + second}, {"params": third}])
    of_first, of_second, of_third = parts(twin)
    expected = make([{"params": of_first}, {"params": of_second + of_third}])
    del optimizer.param_groups[0]["params"][len(first) :]
    optimizer.param_groups[1]["params"] = second + third
    train(model, optimizer, range(4))
    train(twin, expected, range(4))
    assert_same_params(model, twin)


@each_optimizer
def test_a_group_deleted_by_hand_stops_and_the_others_go_on(make, tmp_path):
    model = net()
    optimizer = make([{"params": part} for part in parts(model)])
    train(model, optimizer, range(2))
    gone = optimizer.param_groups.pop(0)["params"]
    before, rest = values(gone), [p for part in parts(model)[1:] for p in part]
    others = values(rest)
    train(model, optimizer, range(2, 5))
    assert not any(moved(gone, before)) and all(moved(rest, others))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")  # torch's fails on states of a parameter that has left
    assert all(param in optimizer.state for param in rest) and not any(param in optimizer.state for param in gone)


@each_optimizer
def test_the_deletion_of_the_first_group_keeps_states_and_estimates(make):
    model, twin = net(), net()
    train(model, optimizer := make([{"params": part} for part in parts(model)]), range(3))
    train(twin, other := make([{"params": part} for part in parts(twin)]), range(3))
    empty = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["params"] = []
    del other.param_groups[0]
    train(model, optimizer, range(3, 6))
    train(twin, other, range(3, 6))
    assert_same_params(model, twin)
    assert all(param.grad is not None for param in empty)


@each_optimizer
def test_replaced_parameters_are_trained(make):
    model = net()
    optimizer = make([{"params": part} for part in parts(model)])
    train(model, optimizer, range(2))
    old = model[0].weight
    model[0].weight = torch.nn.Parameter(old.detach().clone())
    optimizer.param_groups[0]["params"][0] = model[0].weight
    before, of_old = values([model[0].weight]), values([old])
    train(model, optimizer, range(2, 4))
    assert moved([model[0].weight], before) == [True] and moved([old], of_old) == [False]


@each_optimizer
def test_assigned_groups_get_the_missing_options_and_keep_the_states(make):
    # Lightning assigns optimizer.param_groups when it resumes a finetuning.
    model, twin = net(), net()
    train(model, optimizer := make(list(model.parameters())), range(3))
    train(twin, expected := make(list(twin.parameters())), range(3))
    params = [param for group in optimizer.param_groups for param in group["params"]]
    kept = {k: optimizer.param_groups[0][k] for k in ("lr", "step_size", "estimates") if k in optimizer.param_groups[0]}
    optimizer.param_groups = [{"params": tuple(params), **kept}]
    train(model, optimizer, range(3, 6))
    train(twin, expected, range(3, 6))
    assert_same_params(model, twin)


@each_optimizer
def test_a_changed_optimizer_resumes_bit_for_bit(make):
    def changed(model):
        first, second, third = parts(model)
        optimizer = make([{"params": first}, {"params": second}])
        return optimizer, {"params": third, "lr": 0.005}

    model = net()
    optimizer, added = changed(model)
    train(model, optimizer, range(2))
    optimizer.add_param_group(added)
    train(model, optimizer, range(2, 4))
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    train(model, optimizer, range(4, 6))

    resumed = net()
    resumed.load_state_dict(weights)
    optimizer, added = changed(resumed)
    optimizer.add_param_group(added)
    optimizer.load_state_dict(saved)
    train(resumed, optimizer, range(4, 6))
    assert_same_params(model, resumed)


@each_optimizer
def test_a_parameter_in_two_groups_is_refused(make):
    model = net()
    optimizer = make([{"params": part} for part in parts(model)])
    optimizer.param_groups[1]["params"].append(model[0].weight)
    backward(model, 0)
    with pytest.raises(ValueError, match=r"a parameter of shape \[16, 6\] is in groups 0 and 1"):
        optimizer.step(partial(backward, model, 0))


NAMED = {name: make for name, make in MAKES.items() if name != "MuonAdamW"}


@pytest.mark.parametrize("make", NAMED.values(), ids=NAMED)
def test_groups_with_and_without_names_join(make):
    model = net()
    named = list(model.named_parameters())
    optimizer = make(named[:2])
    optimizer.add_param_group({"params": [param for _, param in named[2:5]]})
    optimizer.add_param_group({"params": named[5:]})
    names = [group["param_names"] for group in optimizer.param_groups]
    assert names[0] == ["0.weight", "0.bias"] and names[2] == [name for name, _ in named[5:]]
    assert names[1] == [f"params[{i}] of group 1" for i in range(3)]
    before = values(model.parameters())
    train(model, optimizer, range(3))
    assert all(moved(model.parameters(), before))


def test_names_follow_parameters_that_are_moved():
    model = net()
    named = list(model.named_parameters())
    optimizer = StoSignSGD([{"params": named[:3]}, {"params": named[3:]}])
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop(0))
    groups = optimizer.state_dict()["param_groups"]
    assert groups[0]["param_names"] == ["0.bias", "1.weight"]
    assert groups[1]["param_names"] == [name for name, _ in named[3:]] + ["0.weight"]


@each_optimizer
def test_a_group_that_is_refused_is_not_taken(make):
    model = net()
    optimizer = make([{"params": parts(model)[0]}])
    with pytest.raises(ValueError, match="lr=-1"):
        optimizer.add_param_group({"params": parts(model)[1], "lr": -1})
    assert len(optimizer.param_groups) == 1
    train(model, optimizer, range(2))


@each_optimizer
def test_a_refused_option_of_an_assigned_group_is_named_at_the_next_step(make):
    model = net()
    optimizer = make(list(model.parameters()))
    optimizer.param_groups = [{"params": list(model.parameters()), "weight_decay": -2.0}]
    with pytest.raises(ValueError, match=r"weight_decay=-2\.0"):
        optimizer.step(partial(backward, model, 0))
