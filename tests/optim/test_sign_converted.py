import copy
import io
import pickle
from functools import partial

import numpy as np
import pytest
import pytorch_optimizer
import reference
import torch
from torch import nn
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    SparseAdam,
)

from lightning_stosign import SignConverted, StoSignSGD, emulate_state_precision
from lightning_stosign.optim.wrappers.muon_adamw import MuonAdamW

CONVERTIBLE = {
    "adam": Adam,
    "amsgrad": partial(Adam, amsgrad=True),
    "fused adam": partial(Adam, fused=True),
    "adamw": AdamW,
    "adamax": Adamax,
    "rmsprop": partial(RMSprop, momentum=0.9, centered=True),
    "adagrad": partial(Adagrad, initial_accumulator_value=0.1),
    "adadelta": Adadelta,
    "nadam": NAdam,
    "radam": RAdam,
    "muon": Muon,
    "lion": pytorch_optimizer.Lion,
    "adabelief": pytorch_optimizer.AdaBelief,
    "soap": pytorch_optimizer.SOAP,
    "shampoo": pytorch_optimizer.Shampoo,
}


class Momentum(Optimizer):
    """m_t = beta m_{t-1} + (1 - beta) g_t, as it is or over its running maximum."""

    def __init__(self, params, lr=1.0, over_running_max=False):
        super().__init__(params, {"lr": lr})
        self.over_running_max = over_running_max

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["m"], state["G"] = torch.zeros_like(p), torch.zeros_like(p)
                state["m"] += (p.grad - state["m"]) * (1 - 0.9)
                state["G"] = torch.maximum(state["G"], state["m"].abs())
                u = state["m"] / state["G"] if self.over_running_max else state["m"]
                p -= group["lr"] * u.nan_to_num_(0.0)


def problem(steps=20, shape=(8, 12), seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal(shape)), torch.from_numpy(rng.standard_normal((steps, *shape)))


def run(optimizer, x, grads):
    for g in grads:
        x.grad = g.to(x.dtype, copy=True)
        optimizer.step()
    return x.detach()


def test_conversion_of_adamax_is_algorithm_9():
    start, grads = problem()
    x = nn.Parameter(start.clone())
    optimizer = SignConverted([x], partial(Adamax, betas=(0.8, 0.95), eps=1e-6), 0.01, 0.1, seed=3)
    iterates = [run(optimizer, x, [g]).clone() for g in grads]
    noises = [reference.noise(reference.key(3, t, 0), start.numel()).reshape(start.shape) for t in range(1, 21)]
    expected = reference.sign_converted_adamax(start.numpy(), grads.numpy(), 0.01, 0.8, 0.95, 1e-6, 0.1, noises)
    np.testing.assert_allclose(torch.stack(iterates).numpy(), np.stack(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conversion_of_momentum_by_its_running_maximum_is_stosign_bit_for_bit(dtype, stochastic):
    start, grads = problem(shape=(64, 33))
    x, y = (nn.Parameter(start.to(dtype)) for _ in range(2))
    options = {"lr": 0.01, "weight_decay": 0.1, "stochastic": stochastic, "seed": 5}
    converted = run(SignConverted([x], Momentum, normalize=True, **options), x, grads)
    assert torch.equal(converted, run(StoSignSGD([y], **options), y, grads))


def test_conversion_of_momentum_over_running_maximum_is_stosign():
    start, grads = problem()
    x, y = (nn.Parameter(start.float()) for _ in range(2))
    converted = run(SignConverted([x], partial(Momentum, over_running_max=True), 0.01), x, grads)
    assert torch.equal(converted, run(StoSignSGD([y], 0.01), y, grads))


@pytest.mark.parametrize("base", CONVERTIBLE.values(), ids=CONVERTIBLE)
def test_in_expectation_form_is_the_base(base):
    start, grads = problem()
    x, y = (nn.Parameter(start.float()) for _ in range(2))
    converted = run(SignConverted([x], base, 0.01, stochastic=False), x, grads)
    torch.testing.assert_close(converted, run(base([y], lr=0.01, weight_decay=0), y, grads), rtol=0, atol=1e-5)


@pytest.mark.parametrize("base", CONVERTIBLE.values(), ids=CONVERTIBLE)
def test_steps_are_signs_whose_mean_is_the_update_of_the_base(base):
    start, grads = problem(steps=12, shape=(64, 64))
    x, y = (nn.Parameter(start.float() * 0) for _ in range(2))
    stochastic, mean = SignConverted([x], base, 1.0), SignConverted([y], base, 1.0, stochastic=False)
    excess, variance = 0.0, 0.0
    for g in grads:
        x.data.zero_(), y.data.zero_()
        sign, u = -run(stochastic, x, [g]).double(), -run(mean, y, [g]).double().clamp(-1, 1)
        assert set(sign.unique().tolist()) <= {-1.0, 0.0, 1.0}
        excess += float((u * (sign - u)).sum())
        variance += float((u.square() * (1 - u.square())).sum())
    assert abs(excess) <= 5 * variance**0.5


def test_sgd_with_momentum_normalised_moves_by_signs_of_unbiased_mean():
    x, y = (nn.Parameter(torch.zeros(20_000)) for _ in range(2))
    grads = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0)) * 1e-3
    base = partial(SGD, momentum=0.9)
    total = -run(SignConverted([x], base, 1.0, normalize=True), x, grads)
    mean = -run(SignConverted([y], base, 1.0, normalize=True, stochastic=False), y, grads)
    assert set(total.unique().tolist()) == {-2.0, 0.0, 2.0}
    u = mean - grads[0].sign()  # the first update is its own maximum
    assert abs(float((u * (total - mean)).sum())) <= 5 * float((u.square() * (1 - u.square())).sum()) ** 0.5


def test_coordinate_that_the_base_does_not_move_stays():
    x = nn.Parameter(torch.zeros(1000))
    run(SignConverted([x], Adam, 1.0), x, [torch.zeros(1000)] * 3)
    assert not x.any()


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (LBFGS, "LBFGS cannot be converted: it evaluates the closure several times a step"),
        (SparseAdam, "SparseAdam cannot be converted: it takes sparse gradients"),
        (Adafactor, "Adafactor cannot be converted: its update is not its learning rate times a function of the grad"),
        (ASGD, "ASGD cannot be converted: its update is not"),
        (pytorch_optimizer.Lamb, "Lamb cannot be converted: its update is not"),
        (pytorch_optimizer.ScheduleFreeAdamW, "ScheduleFreeAdamW cannot be converted: its update is not"),
        (pytorch_optimizer.Prodigy, "Prodigy cannot be converted: its update is not"),
        (pytorch_optimizer.AliG, "AliG cannot be converted: it has no learning rate"),
        (pytorch_optimizer.SophiaH, "SophiaH cannot be converted: its step on a 1-dimensional .* no closure, fails: "),
        (Muon, "Muon only supports 2D parameters"),
        (partial(SGD, momentum=0.9), "the updates of SGD grow with the gradients.*pass normalize=True"),
        (partial(AdamW, weight_decay=0.1), "base: weight_decay=0.1 would act on the shadow"),
    ],
)
def test_what_cannot_be_converted_is_refused_with_a_reason(base, message):
    with pytest.raises(ValueError, match=message):
        SignConverted([nn.Parameter(torch.ones(3))], base)


def test_group_that_the_base_refuses_is_not_added():
    optimizer = SignConverted([nn.Parameter(torch.ones(3, 3))], Muon)
    with pytest.raises(ValueError, match="Muon only supports 2D parameters"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert len(optimizer.param_groups) == len(optimizer.base.param_groups) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"base": "adam"}, TypeError, "base='adam' must be a function of param groups"),
        ({"base": nn.ParameterList}, TypeError, "base must build a torch.optim.Optimizer, not ParameterList"),
        ({"lr": -1.0}, ValueError, "lr=-1.0 must be finite and at least 0"),
        ({"weight_decay": float("nan")}, ValueError, "weight_decay=nan"),
        ({"stochastic": 1.5}, ValueError, "stochastic=1.5 is not supported; accepted: True, False"),
        ({"normalize": "max"}, ValueError, "normalize='max' is not supported"),
        ({"seed": 1.5}, TypeError, "seed=1.5 must be an int"),
        ({"seed": -1}, ValueError, r"seed=-1 must be in \[0, 2\*\*64\)"),
        ({"on_nonfinite": "ignore"}, ValueError, "on_nonfinite='ignore'"),
        ({"base": partial(Adam, betas=(2.0, 0.9))}, ValueError, "Invalid beta"),
    ],
)
def test_bad_argument_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        SignConverted([nn.Parameter(torch.zeros(2))], **{"base": Adam, **arguments})


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 3)).to(dtype)


def train(net, optimizer, steps, start=0):
    for step in range(start, start + steps):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).to(next(net.parameters()).dtype)
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(net.parameters()).detach()


BASES = {
    "adam": partial(Adam, betas=(0.8, 0.9)),
    "adagrad": partial(Adagrad, initial_accumulator_value=0.1),  # has states from the start
    "lion": pytorch_optimizer.Lion,  # counts steps in the param group
    "momentum": partial(Momentum, over_running_max=True),  # has an attribute that torch does not copy
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_checkpoint_with_the_state_of_the_base_continues_bit_for_bit(base, dtype):
    net, other = model(dtype), model(dtype)
    optimizer = SignConverted(net.parameters(), base, 0.01, seed=2)
    train(net, optimizer, 5)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    plain = base([nn.Parameter(torch.zeros(2))])
    plain.param_groups[0]["params"][0].grad = torch.ones(2)
    plain.step()
    assert set(saved["state"][0]) == {"outer_step", *plain.state_dict()["state"].get(0, {})}
    assert set(plain.state_dict()["param_groups"][0]) <= set(saved["param_groups"][0])

    other.load_state_dict(net.state_dict())
    loaded = SignConverted(other.parameters(), base, 0.5)
    loaded.load_state_dict(saved)
    assert torch.equal(train(net, optimizer, 5, start=5), train(other, loaded, 5, start=5))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_copies_continue_alike(base, copier):
    net = model()
    optimizer = SignConverted(net.parameters(), base, 0.01, normalize=True)
    train(net, optimizer, 3)
    other, copied = copier((net, optimizer))
    assert torch.equal(train(net, optimizer, 3, start=3), train(other, copied, 3, start=3))


def test_options_of_a_group_reach_the_base_and_schedulers_too():
    a, b = nn.Parameter(torch.ones(64)), nn.Parameter(torch.ones(64))
    optimizer = SignConverted([{"params": [a]}, {"params": [b], "betas": (0.5, 0.6), "maximize": True}], Adam, 0.25)
    a.grad = b.grad = torch.ones(64)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10, base_momentum=0.7)
    optimizer.step()
    assert optimizer.base.param_groups[0]["betas"] == (0.95, 0.999)  # OneCycleLR's first momentum
    assert optimizer.base.param_groups[1]["betas"] == (0.95, 0.6)
    lr = scheduler.get_last_lr()[0]
    torch.testing.assert_close(a.detach(), torch.full((64,), 1 - lr))
    torch.testing.assert_close(b.detach(), torch.full((64,), 1 + lr))
    assert [group["lr"] for group in optimizer.base.param_groups] == [1.0, 1.0]


def test_base_that_is_two_optimizers_is_converted():
    net = model()
    groups = [{"params": [net[0].weight], "use_muon": True}, {"params": [net[0].bias, *net[1].parameters()]}]
    optimizer = SignConverted(groups, MuonAdamW, 0.01)
    optimizer.add_param_group({"params": [net[2].weight], "use_muon": True})
    optimizer.add_param_group({"params": [net[2].bias]})
    train(net, optimizer, 2)
    assert "momentum_buffer" in optimizer.state[net[2].weight] and "exp_avg_sq" in optimizer.state[net[2].bias]


def test_closure_is_evaluated_once():
    net = model()
    optimizer = SignConverted(net.parameters(), Adam, 0.01)
    losses = []

    def closure():
        optimizer.zero_grad()
        losses.append(net(torch.ones(2, 6)).square().mean())
        losses[-1].backward()
        return losses[-1]

    assert optimizer.step(closure) is losses[0] and len(losses) == 1
    assert closure() < losses[0]


def test_shadows_take_no_memory_between_steps_and_unused_parameters_stay():
    used, unused, empty = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(0))
    optimizer = SignConverted([used, unused, empty], Adam, 0.5, 0.1)
    (used.sum() + empty.sum()).backward()
    optimizer.step()
    assert torch.equal(unused, torch.ones(4)) and set(optimizer.state) == {used}
    assert optimizer.base.param_groups[0]["params"][0].numel() == 0


def test_nonfinite_gradient_touches_nothing():
    net = model()
    optimizer = SignConverted(net.parameters(), Adam, 0.01, on_nonfinite="skip")
    before = train(net, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict()["state"])
    net[0].bias.grad.fill_(float("nan"))
    with pytest.warns(
        RuntimeWarning, match=r"SignConverted: the gradient of params\[1\] of group 0 \[16\] is not finite"
    ):
        optimizer.step()
    assert torch.equal(nn.utils.parameters_to_vector(net.parameters()), before)
    for index, saved in optimizer.state_dict()["state"].items():
        assert all(torch.equal(saved[name], value) for name, value in state[index].items())


def test_global_generator_is_untouched():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    x = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    run(SignConverted([x], Adam), x, [torch.ones(4)])
    assert torch.equal(before, torch.get_rng_state())


def test_states_of_the_base_can_be_emulated_in_low_precision():
    x = nn.Parameter(torch.ones(3))
    optimizer = SignConverted([x], AdamW)
    emulate_state_precision(optimizer, "fp8-raw:min_numel=0")
    run(optimizer, x, [torch.tensor([1.0, 1e-1, 1e-2])])
    assert optimizer.base.state[optimizer.base.param_groups[0]["params"][0]]["exp_avg_sq"][1] == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamWFp8"])
def test_torchao_base_is_converted_and_its_checkpoint_continues(name):
    torchao_optim = pytest.importorskip("torchao.optim")
    start, grads = problem(steps=4, shape=(64, 64))
    x, y = (nn.Parameter(start.float()) for _ in range(2))
    optimizer = SignConverted([x], getattr(torchao_optim, name))
    y.data.copy_(run(optimizer, x, grads[:2]))
    loaded = SignConverted([y], getattr(torchao_optim, name))
    file = io.BytesIO()  # its states would not be copied otherwise: torchao's .to(copy=True) shares memory
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert type(loaded.state[y]["exp_avg"]) is type(optimizer.state[x]["exp_avg"]) is not torch.Tensor
    assert torch.equal(run(optimizer, x, grads[2:]), run(loaded, y, grads[2:]))
