"""What torch.optim's users rely on, for every optimizer of the package."""

import copy
import io
import pickle
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from torch import nn

from lightning_stosign import SignSGD, StoSignSGD

OPTIMIZERS = [StoSignSGD, SignSGD]
PRECISIONS = [
    None,
    "float32",
    "bfloat16:min_numel=0",
    "fp8:min_numel=0",
    "fp8-raw:static_scale=1024,min_numel=0",
    "fp8-block:stochastic_rounding=true,min_numel=0",
    "fp4-block:min_numel=0",
]

pytestmark = pytest.mark.parametrize("cls", OPTIMIZERS)


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 3)).to(dtype)


def train(net, optimizer, steps, start=0):
    for step in range(start, start + steps):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).to(next(net.parameters()).dtype)
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


def assert_same(a, b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


def assert_same_state(a, b):
    for p, q in zip(a.param_groups[0]["params"], b.param_groups[0]["params"], strict=True):
        assert a.state[p].keys() == b.state[q].keys()
        for name, value in a.state[p].items():
            assert b.state[q][name].dtype == value.dtype
            assert torch.equal(b.state[q][name].double(), value.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_checkpoint_continues_bit_for_bit(cls, precision, dtype):
    net = model(dtype)
    optimizer = cls(net.parameters(), 0.01, state_precision=precision)
    train(net, optimizer, 5)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    other = model(dtype)
    loaded = cls(other.parameters(), 0.5)
    other.load_state_dict(saved["net"])
    loaded.load_state_dict(saved["optimizer"])
    assert_same_state(optimizer, loaded)
    train(net, optimizer, 5, start=5)
    train(other, loaded, 5, start=5)
    assert_same(net, other)


def test_checkpoint_continues_in_a_fresh_process(cls, tmp_path):
    net = model()
    optimizer = cls(net.parameters(), 0.01, state_precision="fp8:min_numel=0")
    train(net, optimizer, 5)
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    train(net, optimizer, 5, start=5)
    script = f"""
        import sys, torch
        sys.path.insert(0, {str(__file__.rpartition("/")[0])!r})
        saved = torch.load({str(tmp_path / "a.pt")!r}, weights_only=True)  # before the package is imported
        from test_contract import model, train
        from lightning_stosign import {cls.__name__}
        net = model()
        optimizer = {cls.__name__}(net.parameters())
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        train(net, optimizer, 5, start=5)
        torch.save(net.state_dict(), {str(tmp_path / "b.pt")!r})
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)
    other = model()
    other.load_state_dict(torch.load(tmp_path / "b.pt", weights_only=True))
    assert_same(net, other)


def test_loading_does_not_share_tensors_with_the_state_dict(cls):
    net, other = model(), model()
    optimizer, loaded = cls(net.parameters(), 0.01), cls(other.parameters(), 0.01)
    train(net, optimizer, 2)
    state_dict = optimizer.state_dict()
    before = copy.deepcopy(state_dict["state"])
    loaded.load_state_dict(state_dict)
    train(other, loaded, 1)
    for index, state in before.items():
        for name, value in state.items():
            assert torch.equal(state_dict["state"][index][name], value)


def test_load_hooks_see_and_change_what_is_loaded(cls):
    net, other = model(), model()
    optimizer, loaded = cls(net.parameters(), 0.01, state_precision="fp8:min_numel=0"), cls(other.parameters(), 0.01)
    train(net, optimizer, 2)

    def double_the_step(_, state_dict):
        state = {i: {**s, "step": s["step"] * 2} for i, s in state_dict["state"].items()}
        return {**state_dict, "state": state}

    seen = []
    loaded.register_load_state_dict_pre_hook(double_the_step)
    loaded.register_load_state_dict_post_hook(lambda o: seen.append(o.state[next(other.parameters())]["exp_avg"].dtype))
    loaded.load_state_dict(optimizer.state_dict())
    assert loaded.state[next(other.parameters())]["step"] == 4
    assert seen == [torch.float8_e4m3fn]


def through_torch_save(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    ("copier", "precision"),
    [
        (copy.deepcopy, "fp8:min_numel=0"),
        (through_torch_save, "fp8:min_numel=0"),
        # torch 2.13 cannot read an FP8 tensor back from a plain pickle, whoever holds it.
        (lambda pair: pickle.loads(pickle.dumps(pair)), "bfloat16:min_numel=0"),
    ],
)
def test_copies_continue_alike(cls, copier, precision):
    net = model()
    optimizer = cls(net.parameters(), 0.01, weight_decay=0.1, state_precision=precision, on_nonfinite="skip")
    train(net, optimizer, 3)
    other, copied = copier((net, optimizer))
    train(net, optimizer, 3, start=3)
    train(other, copied, 3, start=3)
    assert_same(net, other)
    assert copied.param_groups[0]["on_nonfinite"] == "skip"


def test_state_of_an_older_version_takes_the_defaults_of_new_options(cls):
    net, other = model(), model()
    optimizer, loaded = cls(net.parameters(), 0.01), cls(other.parameters(), 0.01)
    train(net, optimizer, 2)
    state_dict = optimizer.state_dict()
    for option in ("on_nonfinite", "maximize", "fused", "state_precision"):
        del state_dict["param_groups"][0][option]
    loaded.load_state_dict(state_dict)
    train(other, loaded, 1)
    assert loaded.param_groups[0]["on_nonfinite"] == "raise"


def test_closure_is_run_with_gradients_and_its_loss_returned(cls):
    net = model()
    optimizer = cls(net.parameters(), 0.01)

    def closure():
        optimizer.zero_grad()
        loss = net(torch.ones(2, 6)).square().mean()
        loss.backward()
        return loss

    before = closure().item()
    assert optimizer.step(closure).item() == before
    assert closure().item() < before


def test_frozen_unused_and_empty_parameters_are_left_alone(cls):
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    unused, empty, used = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(0, 3)), nn.Parameter(torch.ones(2))
    optimizer = cls([frozen, unused, empty, used], 0.5, weight_decay=0.1)
    (used.sum() + empty.sum()).backward()
    optimizer.step()
    assert torch.equal(frozen, torch.ones(2)) and torch.equal(unused, torch.ones(2))
    assert not torch.equal(used, torch.ones(2))
    assert set(optimizer.state) == {used}


def test_scalar_parameter_trains(cls):
    x = nn.Parameter(torch.tensor(1.0))
    optimizer = cls([x], 0.25, state_precision="fp8-block:min_numel=0")
    x.square().backward()
    optimizer.step()
    assert x.item() == 0.75


def test_step_without_any_gradient_does_nothing(cls):
    net = model()
    cls(net.parameters(), 0.01).step()
    assert_same(net, model())


@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_lr_gives_the_same_steps(cls, shape):
    nets = model(), model()
    for net, lr in zip(nets, (0.25, torch.full(shape, 0.25)), strict=True):
        train(net, cls(net.parameters(), lr, weight_decay=0.5), 5)
    assert_same(*nets)


def test_param_groups_have_their_own_options(cls):
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = cls([{"params": [a]}, {"params": [b], "lr": 0.25, "maximize": True}], 0.5)
    optimizer.add_param_group({"params": [c := nn.Parameter(torch.ones(3))], "state_precision": "fp8:min_numel=0"})
    (a.sum() + b.sum() + c.sum()).backward()
    optimizer.step()
    assert (a.detach()[0], b.detach()[0], c.detach()[0]) == (0.5, 1.25, 0.5)
    assert optimizer.state[c]["exp_avg"].dtype == torch.float8_e4m3fn


def test_lr_scheduler_sets_the_size_of_the_step(cls):
    x = nn.Parameter(torch.zeros(4))
    optimizer = cls([x], 1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    sizes = []
    for _ in range(3):
        before = x.detach().clone()
        x.grad = torch.ones(4)
        optimizer.step()
        scheduler.step()
        sizes.append((x.detach() - before).abs().max().item())
    assert sizes == [1.0, 0.5, 0.25]


def test_global_generator_is_untouched(cls):
    net = model(torch.bfloat16)
    optimizer = cls(net.parameters(), 0.01, state_precision="fp8:stochastic_rounding=true,min_numel=0")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    net(torch.ones(2, 6, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_gradient_raises_and_touches_nothing(cls, bad):
    net = model()
    optimizer = cls(net.named_parameters(), 0.01)
    train(net, optimizer, 2)
    before, state = copy.deepcopy(net), copy.deepcopy(optimizer.state_dict()["state"])
    net[2].weight.grad[1, 1] = bad
    with pytest.raises(RuntimeError, match=r"the gradient of 2.weight \[3, 16\] is not finite; nothing was updated"):
        optimizer.step()
    assert_same(net, before)
    for index, saved in optimizer.state_dict()["state"].items():
        assert all(torch.equal(saved[name], value) for name, value in state[index].items())


def test_nonfinite_gradient_is_skipped_on_request(cls):
    net = model()
    optimizer = cls(net.parameters(), 0.01, on_nonfinite="skip")
    train(net, optimizer, 2)
    before = copy.deepcopy(net)
    net[0].bias.grad.fill_(float("nan"))
    with pytest.warns(RuntimeWarning, match=r"params\[1\] of group 0 \[16\] is not finite; this step was skipped"):
        optimizer.step()
    assert_same(net, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(net, optimizer, 1, start=3)


def test_grad_scaler_unscales_and_skips(cls):
    net, other = model(), model()
    optimizer, plain = cls(net.parameters(), 0.01), cls(other.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        scaler.scale(net(x).square().mean()).backward()
        if step == 1:
            net[0].weight.grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update(1024.0)
        if step != 1:
            train(other, plain, 1, start=step)
    assert_same(net, other)


def test_sparse_gradient_is_refused_by_name(cls):
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = cls(embedding.named_parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"does not support sparse gradients \(weight \[4, 2\]\)"):
        optimizer.step()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr=-1.0 must be finite and at least 0"),
        ({"lr": float("nan")}, ValueError, "lr=nan"),
        ({"lr": float("inf")}, ValueError, "lr=inf"),
        ({"lr": "fast"}, TypeError, "lr='fast' must be a number"),
        ({"lr": torch.zeros(2)}, ValueError, r"lr of shape \[2\]"),
        ({"lr": torch.tensor(-1.0)}, ValueError, "lr=-1.0"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay=-0.1"),
        ({"weight_decay": float("nan")}, ValueError, "weight_decay=nan"),
        ({"state_precision": "fp7"}, ValueError, "state_precision='fp7' is unknown"),
        ({"state_precision": 8}, TypeError, "state_precision=8"),
        ({"fused": "yes"}, ValueError, "fused='yes'"),
        ({"maximize": "no"}, ValueError, "maximize='no'"),
        ({"on_nonfinite": "ignore"}, ValueError, "on_nonfinite='ignore' is not supported; accepted: 'raise', 'skip'"),
    ],
)
def test_bad_argument_is_named(cls, arguments, error, message):
    with pytest.raises(error, match=message):
        cls([nn.Parameter(torch.zeros(2))], **arguments)
    optimizer = cls([nn.Parameter(torch.zeros(2))])
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], **arguments})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "param",
    [
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, dtype=torch.int32),
        torch.zeros(2).to(torch.float8_e4m3fn),
        torch.zeros(2, 2).to_sparse(),
    ],
    ids=["complex", "integer", "float8", "sparse"],
)
def test_unsuitable_parameter_is_refused(cls, param):
    with pytest.raises(ValueError, match=r"params: a parameter of shape \[2(, 2)?\] (is sparse|has dtype)"):
        cls([param])


def test_gradients_whose_sum_overflows_are_finite(cls):
    x = nn.Parameter(torch.zeros(4))
    x.grad = torch.full((4,), 3e38)
    cls([x], 0.5).step()
    assert torch.equal(x.detach(), torch.full((4,), -0.5))


def test_states_of_small_parameters_stay_in_float32(cls):
    large, small = (nn.Parameter(torch.ones(n)) for n in (4096, 4095))
    optimizer = cls([large, small], state_precision="fp8-block")
    for x in (large, small):
        x.grad = torch.ones_like(x)
    optimizer.step()
    assert optimizer.state[large]["exp_avg"].dtype == torch.float8_e4m3fn
    assert optimizer.state[small]["exp_avg"].dtype == torch.float32
    assert "exp_avg_scale" not in optimizer.state[small]
