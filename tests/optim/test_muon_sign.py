"""Muon for the matrices with StoSignSGD for the rest, states in low precision."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_stosign import MuonSign, StoSignConfig, StoSignSGD, emulate_state_precision, promote_state, state_bytes
from lightning_stosign.optim.kernels import dispatch
from lightning_stosign.optim.numerics.orthogonal import orthogonalize
from lightning_stosign.optim.states.state_precision import StatePrecision
from lightning_stosign.optim.states.storage import read_state


def network(dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 8)).to(dtype)


def split(net):
    params = list(net.parameters())
    return [p for p in params if p.dim() == 2], [p for p in params if p.dim() != 2]


def muon_sign(net, **options):
    matrices, rest = split(net)
    groups = [{"params": matrices, "use_muon": True, "weight_decay": 0.2}, {"params": rest, "weight_decay": 0.0}]
    return MuonSign(groups, **{"lr": 0.02, "betas": (0.8, 1.0), **options})


def take_steps(net, optimizers, steps, start=0, scale=1.0):
    for step in range(start, start + steps):
        x = torch.randn(6, 16, generator=torch.Generator().manual_seed(step)).to(net[0].weight.dtype)
        net.zero_grad()
        (net(x).square().mean() * scale).backward()
        for optimizer in optimizers:
            optimizer.step()


def assert_same(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_with_float32_states_it_is_torch_s_muon_and_stosignsgd(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())  # torch's Muon, in float32
    net, reference = network(), network()
    matrices, rest = split(reference)
    apart = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.8, weight_decay=0.2, adjust_lr_fn="match_rms_adamw"),
        StoSignSGD(rest, lr=0.02, betas=(0.8, 1.0), stochastic=False),
    ]
    take_steps(net, [muon_sign(net)], 5)
    take_steps(reference, apart, 5)
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (12, 12), (1, 5)])
def test_orthogonalisation_has_torch_s_bits(shape):
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x = nn.Parameter(torch.zeros(shape))
    x.grad = grad.clone()
    torch.optim.Muon([x], lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0, adjust_lr_fn="original").step()
    expected = torch.zeros(shape).add(orthogonalize(grad, torch.bfloat16), alpha=-(max(1, shape[0] / shape[1]) ** 0.5))
    assert torch.equal(x.detach(), expected)
    in_float32 = orthogonalize(grad, torch.float32)
    assert (in_float32 - orthogonalize(grad, torch.bfloat16)).norm() < 0.05 * in_float32.norm()


def test_orthogonalisation_brings_singular_values_near_one_at_any_scale():
    matrix = torch.randn(12, 30, generator=torch.Generator().manual_seed(1))
    results = [orthogonalize(matrix * 2.0**power, torch.bfloat16) for power in (-100, -20, 0, 60, 120)]
    values = np.linalg.svd(results[0].float().numpy(), compute_uv=False)
    assert values.min() > 0.6 and values.max() < 1.3
    assert all(torch.equal(result, results[0]) for result in results)
    assert not orthogonalize(torch.zeros(3, 4), torch.float32).any()


@pytest.mark.parametrize("precision", ["fp8:min_numel=0", "fp8-block:min_numel=0", "fp4-block:min_numel=0"])
def test_a_step_follows_the_momentum_as_it_was_stored(precision):
    x = nn.Parameter(torch.zeros(24, 40))
    optimizer = MuonSign([{"params": [x], "use_muon": True}], lr=0.5, betas=(0.8, 1.0), state_precision=precision)
    for seed in range(3):
        x.grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(seed))
        before = x.detach().clone()
        optimizer.step()
        m = read_state(optimizer.state[x], "exp_avg", StatePrecision.parse(precision))
        assert not torch.equal(m, m.bfloat16().float() * 1.001) and m.unique().numel() < m.numel()
        expected = before - 0.5 * 0.2 * 40**0.5 * orthogonalize(0.8 * m + 0.2 * x.grad, torch.float32)
        torch.testing.assert_close(x.detach(), expected, rtol=0, atol=1e-5)


def test_a_matrix_takes_one_byte_of_states_per_parameter_and_the_rest_two():
    matrix, table = nn.Parameter(torch.ones(64, 128)), nn.Parameter(torch.ones(100, 64))
    optimizer = MuonSign([{"params": [matrix], "use_muon": True}, {"params": [table]}], state_precision="fp8")
    (matrix.sum() + table.sum()).backward()
    optimizer.step()
    assert state_bytes(optimizer) == matrix.numel() + 4 + 2 * (table.numel() + 4)


def test_multiplying_all_gradients_by_a_power_of_two_changes_nothing():
    nets = network(), network()
    for net, scale in zip(nets, (1.0, 2.0**-90), strict=True):
        take_steps(net, [muon_sign(net, state_precision="fp8:min_numel=0")], 4, scale=scale)
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def test_maximize_ascends():
    nets = network(), network()
    take_steps(nets[0], [muon_sign(nets[0], maximize=True)], 3, scale=-1.0)
    take_steps(nets[1], [muon_sign(nets[1])], 3)
    assert_same(*nets)


def test_bfloat16_matrices_keep_steps_below_their_spacing_on_average():
    # A step of 2**-12 of 1.0, whose spacing is 2**-8 below it.
    params = [nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16)) for _ in range(2)]
    for param, rounding in zip(params, ("stochastic", "nearest"), strict=True):
        optimizer = MuonSign([{"params": [param], "use_muon": True}], lr=2.0**-9, param_rounding=rounding)
        grad = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0))).Q.abs() * 0.5
        grad += torch.eye(64)
        for _ in range(16):
            param.grad = grad.bfloat16()
            optimizer.step()
    assert params[1].float().ne(1).float().mean() < params[0].float().ne(1).float().mean()
    direction = orthogonalize(grad, torch.float32) * 0.2 * 8
    moved = 1 - params[0].detach().float()
    slope = (moved * direction).sum() / direction.square().sum()
    assert slope.item() == pytest.approx(16 * 2.0**-9, rel=0.1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_touches_nothing(bad):
    net = network()
    optimizer = muon_sign(net, state_precision="fp8:min_numel=0", on_nonfinite="skip")
    take_steps(net, [optimizer], 2)
    before, states = copy.deepcopy(net), copy.deepcopy(optimizer.state_dict()["state"])
    net[1].bias.grad[0] = bad  # of the rest: Muon's matrices stay, too
    with pytest.warns(RuntimeWarning, match="this step was skipped"):
        optimizer.step()
    assert_same(net, before)
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value.double(), states[index][name].double()) for name, value in state.items())


@torch.no_grad()
def update(optimizer, found_inf):
    """Take a step as on an accelerator, where the host does not wait for whether the gradients are finite."""
    updates = list(optimizer._params_with_grad())
    jobs = optimizer._jobs(updates)
    batches = dispatch.choose(jobs)
    dispatch.look(batches)
    optimizer._update(updates, jobs, batches, torch.tensor(found_inf))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_device_decides_whether_a_step_is_taken(dtype):
    net, twin = network(dtype), network(dtype)
    optimizer, other = (muon_sign(n, state_precision="fp8:min_numel=0", fused=False) for n in (net, twin))
    take_steps(net, [optimizer], 1)
    take_steps(twin, [other], 1)
    before, state = copy.deepcopy(net), copy.deepcopy(optimizer.state_dict()["state"])
    update(optimizer, 1.0)
    assert_same(net, before)
    assert all(
        torch.equal(v.double(), state[i][n].double())
        for i, s in optimizer.state_dict()["state"].items()
        for n, v in s.items()
    )
    update(optimizer, 0.0)
    other.step()
    assert_same(net, twin)


def test_a_promoted_matrix_trains_on_in_wider_storage():
    net = network()
    optimizer = muon_sign(net, state_precision="fp8:min_numel=0")
    take_steps(net, [optimizer], 2)
    weight = net[0].weight
    before = read_state(optimizer.state[weight], "exp_avg", StatePrecision.parse("fp8")).clone()
    assert [str(promote_state(optimizer, weight)).partition(":")[0] for _ in range(2)] == ["fp8-block", "bfloat16"]
    assert torch.equal(optimizer.state[weight]["exp_avg"].float(), before)
    take_steps(net, [optimizer], 2, start=2)
    assert optimizer.state[weight]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_checkpoint_continues_bit_for_bit(dtype, tmp_path):
    net = network(dtype)
    optimizer = muon_sign(net, state_precision="fp8:stochastic_rounding=true,min_numel=0", stochastic=True)
    take_steps(net, [optimizer], 3)
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    other = copy.deepcopy(net)
    restored = muon_sign(other, lr=0.5)
    with pytest.warns(UserWarning, match="options replace"):
        restored.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
    twin, copied = copy.deepcopy((net, optimizer))
    for pair in ((net, optimizer), (other, restored), (twin, copied)):
        take_steps(pair[0], [pair[1]], 3, start=3)
    assert_same(net, other)
    assert_same(net, twin)


def test_muon_s_momentum_is_taken_over_from_torch_s_if_asked():
    net = network()
    groups = [{"params": split(net)[0], "use_muon": True}, {"params": split(net)[1], "use_muon": False}]
    old = StoSignConfig("muon").build_optimizer(copy.copy(group) for group in groups)
    take_steps(net, [old], 3)
    config = StoSignConfig("muon-sign", convert_on_resume=True)
    new = config.resumed(config.build_optimizer(copy.copy(group) for group in groups))
    new.load_state_dict(old.state_dict())
    weight, bias = net[0].weight, net[0].bias
    assert torch.equal(new.state[weight]["exp_avg"], old.state[weight]["momentum_buffer"])
    assert new.state[weight].keys() == {"exp_avg", "step"} and new.state[bias].keys() == {"exp_avg", "exp_inf", "step"}
    take_steps(net, [new], 2)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match=r"shape \[3\] in a group with use_muon=True; accepted: 2D"):
        MuonSign([{"params": [nn.Parameter(torch.ones(3))], "use_muon": True}])
    with pytest.raises(ValueError, match="use_muon=2 is not supported"):
        MuonSign([{"params": [nn.Parameter(torch.ones(3, 3))], "use_muon": 2}])
    optimizer = muon_sign(network())
    with pytest.raises(ValueError, match="workers cannot vote on its updates; use signs_of='gradients'"):
        optimizer.vote_by(None)
    with pytest.raises(ValueError, match="MuonSign stores its states itself"):
        emulate_state_precision(optimizer, "fp8")
