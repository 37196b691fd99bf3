"""Muon for the matrices with AdamW for the rest, as one optimizer."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn

from lightning_stosign.optim.wrappers.muon_adamw import MuonAdamW


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 2))


def split(net):
    params = list(net.parameters())
    return [p for p in params if p.dim() == 2], [p for p in params if p.dim() != 2]


def muon_adamw(net, **options):
    matrices, rest = split(net)
    return MuonAdamW(
        [{"params": matrices, "use_muon": True, "weight_decay": 0.2}, {"params": rest, "weight_decay": 0.0}],
        **{"lr": 0.02, "betas": (0.8, 0.9), **options},
    )


def take_steps(net, optimizers, steps, start=0):
    for step in range(start, start + steps):
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
        net.zero_grad()
        net(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def assert_same(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_muon_adamw_is_torch_s_two_optimizers_bit_for_bit():
    net, reference = network(), network()
    matrices, rest = split(reference)
    apart = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.8, weight_decay=0.2, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.02, betas=(0.8, 0.9), weight_decay=0.0),
    ]
    take_steps(net, [muon_adamw(net)], 5)
    take_steps(reference, apart, 5)
    assert_same(net, reference)


@pytest.mark.parametrize("copied", ["load_state_dict", "deepcopy", "pickle", "weights_only"])
def test_muon_adamw_continues_bit_for_bit(copied, tmp_path):
    net = network()
    optimizer = muon_adamw(net)
    take_steps(net, [optimizer], 3)
    if copied == "deepcopy":
        other, restored = copy.deepcopy((net, optimizer))
    elif copied == "pickle":
        other, restored = pickle.loads(pickle.dumps((net, optimizer)))
    else:
        torch.save(optimizer.state_dict(), tmp_path / "o.pt")
        other = copy.deepcopy(net)
        restored = muon_adamw(other, lr=0.5)
        restored.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=copied == "weights_only"))
    take_steps(net, [optimizer], 3, start=3)
    take_steps(other, [restored], 3, start=3)
    assert_same(net, other)


def test_a_copy_of_muon_adamw_has_states_of_its_own():
    net = network()
    optimizer = muon_adamw(net)
    take_steps(net, [optimizer], 1)
    other, restored = copy.deepcopy((net, optimizer))
    take_steps(other, [restored], 1)
    assert not torch.equal(
        optimizer.state[net[0].weight]["momentum_buffer"], restored.state[other[0].weight]["momentum_buffer"]
    )


def test_schedulers_reach_both_parts_of_muon_adamw():
    net = network()
    optimizer = muon_adamw(net)
    take_steps(net, [optimizer], 1)
    before = copy.deepcopy(net)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    take_steps(net, [optimizer], 1)
    scheduler.step()
    assert_same(net, before)


def test_schedulers_reach_both_parts_after_load_state_dict():
    net = network()
    optimizer = muon_adamw(net)
    take_steps(net, [optimizer], 1)
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(net)
    take_steps(net, [optimizer], 1)
    assert_same(net, before)


def test_a_group_added_later_is_trained():
    net = network()
    optimizer = muon_adamw(nn.Sequential(net[0], net[1]))
    optimizer.add_param_group({"params": [net[2].weight], "use_muon": True})
    before = net[2].weight.detach().clone()
    take_steps(net, [optimizer], 1)
    assert not torch.equal(net[2].weight, before)
    assert "momentum_buffer" in optimizer.state[net[2].weight]


def test_adding_a_group_keeps_the_states():
    net = network()
    optimizer = muon_adamw(nn.Sequential(net[0], net[1]))
    take_steps(net, [optimizer], 2)
    kept = optimizer.state[net[0].weight]["momentum_buffer"]
    optimizer.add_param_group({"params": [net[2].bias]})
    take_steps(net, [optimizer], 1)
    assert optimizer.state[net[0].weight]["momentum_buffer"] is kept


def test_muon_adamw_without_matrices_is_adamw():
    net, reference = network(), network()
    take_steps(net, [MuonAdamW(net.parameters(), lr=0.02, betas=(0.8, 0.9), weight_decay=0.1)], 3)
    take_steps(reference, [torch.optim.AdamW(reference.parameters(), 0.02, (0.8, 0.9), weight_decay=0.1)], 3)
    assert_same(net, reference)


def test_muon_adamw_evaluates_a_closure_once_with_gradients():
    x = nn.Parameter(torch.ones(2, 2))
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        loss = x.square().sum()
        loss.backward()
        return loss

    loss = MuonAdamW([{"params": [x], "use_muon": True}]).step(closure)
    assert (loss.item(), calls) == (4.0, [True])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, r"lr=-1\.0 must be"),
        ({"weight_decay": -1.0}, ValueError, r"weight_decay=-1\.0 must be"),
        ({"betas": (1.0, 0.9)}, ValueError, r"betas\[0\]=1\.0 must be"),
        ({"betas": (0.9, -0.1)}, ValueError, r"betas\[1\]=-0\.1 must be"),
        ({"betas": 0.9}, TypeError, r"betas=0\.9 must be a pair"),
    ],
)
def test_muon_adamw_refuses_options_out_of_range(options, error, message):
    with pytest.raises(error, match=message):
        MuonAdamW([nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize(
    "group", [{"use_muon": True, "shape": (3,)}, {"use_muon": True, "shape": (2, 2, 2)}, {"lr": -1.0, "shape": (2, 2)}]
)
def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was(group):
    net = network()
    optimizer = muon_adamw(net)
    options = {key: value for key, value in group.items() if key != "shape"}
    with pytest.raises(ValueError, match=re.compile("2D|lr")):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(group["shape"]))], **options})
    assert (len(optimizer.param_groups), [len(part.param_groups) for part in optimizer.parts]) == (2, [1, 1])
    take_steps(net, [optimizer], 1)
