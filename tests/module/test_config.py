"""StoSignConfig: what it accepts, and what reaches the optimizers."""

import math

import lightning.pytorch as pl
import pytest
import torch
from module.mixin_fits import NAMES, Model, fit, trainer
from torch import nn

from lightning_stosign import MuonSign, SignConverted, SignSGD, StatePrecision, StoSignConfig, StoSignMixin, StoSignSGD
from lightning_stosign.optim.wrappers.muon_adamw import MuonAdamW


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"optimizer": "sgd"}, ValueError, r"optimizer='sgd' is not supported; accepted: 'stosign', 'signsgd'"),
        ({"lr": -1.0}, ValueError, r"lr=-1\.0 must be finite and at least 0"),
        ({"lr": math.inf}, ValueError, r"lr=inf must be finite"),
        ({"lr": "0.1"}, TypeError, r"lr='0\.1' must be a number"),
        ({"betas": (1.0, 1.0)}, ValueError, r"betas\[0\]=1\.0 must be in \[0, 1\)"),
        ({"betas": (0.9, 0.0)}, ValueError, r"betas\[1\]=0\.0 must be in \(0, 1\]"),
        ({"betas": 0.9}, TypeError, r"betas=0\.9 must be a pair of numbers"),
        ({"betas": (0.9,), "optimizer": "signsgd"}, TypeError, r"betas=\(0\.9,\) must be a pair of numbers"),
        ({"betas": (1.5, 0.9), "optimizer": "signsgd"}, ValueError, r"momentum=1\.5 must be"),
        ({"betas": (0.9, 1.0), "optimizer": "adamw"}, ValueError, r"beta.*1\.0"),
        ({"betas": (0.9, 1.0), "optimizer": "muon"}, ValueError, r"betas\[1\]=1\.0 must be in \[0, 1\)"),
        ({"betas": (2.0, 0.9), "optimizer": "muon"}, ValueError, r"betas\[0\]=2\.0 must be"),
        ({"weight_decay": -0.1}, ValueError, r"weight_decay=-0\.1 must be finite and at least 0"),
        ({"no_decay": "bias"}, TypeError, r"no_decay='bias' must be a list of strings"),
        ({"no_decay": None}, TypeError, r"no_decay=None must be a list of strings"),
        ({"warmup_steps": -1}, ValueError, r"warmup_steps=-1 must be at least 0"),
        ({"warmup_steps": 0.1}, TypeError, r"warmup_steps=0\.1 must be an int"),
        ({"warmup_steps": True}, TypeError, r"warmup_steps=True must be an int"),
        ({"schedule": "step"}, ValueError, r"schedule='step' is not supported; accepted: 'cosine', 'linear'"),
        ({"min_lr_ratio": 1.5}, ValueError, r"min_lr_ratio=1\.5 must be between 0\.0 and 1\.0"),
        ({"wsd_decay_ratio": 0.0}, ValueError, r"wsd_decay_ratio=0.* must be greater than 0"),
        ({"wsd_decay_ratio": 2.0}, ValueError, r"wsd_decay_ratio=2\.0 must be between"),
        ({"state_precision": "fp9"}, ValueError, r"state_precision='fp9' is unknown"),
        ({"state_precision": 8}, TypeError, r"state_precision=8 must be a name or a StatePrecision"),
        ({"stochastic": "no"}, ValueError, r"stochastic='no' is not supported"),
        ({"seed": -1}, ValueError, r"seed=-1 must be in"),
        ({"seed": 1.0}, TypeError, r"seed=1\.0 must be an int"),
        ({"on_nonfinite": "ignore"}, ValueError, r"on_nonfinite='ignore' is not supported"),
    ],
)
def test_bad_options_are_refused_at_construction(options, error, message):
    with pytest.raises(error, match=message):
        StoSignConfig(**options)


def test_lists_become_tuples_so_that_a_config_is_hashable():
    config = StoSignConfig(betas=[0.9, 0.99], no_decay=["bias"])
    assert (config.betas, config.no_decay) == ((0.9, 0.99), ("bias",))
    assert hash(config) == hash(StoSignConfig(betas=(0.9, 0.99), no_decay=("bias",)))


def test_a_state_precision_becomes_its_name():
    precision = StatePrecision(torch.float8_e4m3fn, static_scale=1024)
    assert StoSignConfig(state_precision=precision).state_precision == "fp8-raw:static_scale=1024.0"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stosign", {"lr": 0.02, "betas": (0.9, 1.0), "stochastic": False, "seed": 7, "on_nonfinite": "skip"}),
        ("signsgd", {"lr": 0.02, "momentum": 0.9, "on_nonfinite": "skip"}),
        ("adamw", {"lr": 0.02, "betas": (0.9, 0.95)}),
        ("lion", {"lr": 0.02, "betas": (0.9, 0.99), "weight_decouple": True}),
        ("muon", {"lr": 0.02, "betas": (0.9, 0.95)}),
        ("muon-sign", {"lr": 0.02, "betas": (0.9, 1.0), "stochastic": False, "seed": 7, "on_nonfinite": "skip"}),
        ("sign-adamw", {"lr": 0.02, "betas": (0.9, 0.95), "stochastic": False, "seed": 7}),
        ("sign-adamax", {"lr": 0.02, "betas": (0.9, 0.999), "stochastic": False, "seed": 7}),
        ("alias", {"lr": 1.0, "momentum": 0.9, "beta2": 0.999, "on_nonfinite": "skip"}),
    ],
)
def test_options_reach_the_optimizer(name, expected):
    config = StoSignConfig(name, lr=0.02, stochastic=False, seed=7, on_nonfinite="skip", weight_decay=0.3)
    group = config.build_optimizer([{"params": [nn.Parameter(torch.ones(2, 2))]}]).param_groups[0]
    assert {option: group[option] for option in expected} == expected
    assert group["weight_decay"] == 0.3


@pytest.mark.parametrize(("name", "denominator"), [("sign-adamw", "exp_avg_sq"), ("sign-adamax", "exp_inf")])
def test_sign_optimizers_are_what_their_names_say(name, denominator):
    x = nn.Parameter(torch.ones(2, 2))
    optimizer = StoSignConfig(name).build_optimizer([{"params": [x]}])
    x.grad = torch.ones(2, 2)
    optimizer.step()
    assert isinstance(optimizer, SignConverted) and denominator in optimizer.state[x]


@pytest.mark.parametrize(("name", "stochastic"), [("stosign", True), ("sign-adamw", True), ("muon-sign", False)])
def test_noise_is_each_optimizer_s_own_choice_unless_said(name, stochastic):
    for said, expected in ((None, stochastic), (True, True), (False, False)):
        built = StoSignConfig(name, stochastic=said).build_optimizer([{"params": [nn.Parameter(torch.ones(2))]}])
        assert built.param_groups[0]["stochastic"] is expected


@pytest.mark.parametrize("name", NAMES)
def test_betas_reach_the_optimizer(name):
    config = StoSignConfig(name, betas=(0.8, 0.85))
    group = config.build_optimizer([{"params": [nn.Parameter(torch.ones(2, 2))], "use_muon": True}]).param_groups[0]
    options = {"signsgd": {"momentum": 0.8}, "muon": {"momentum": 0.8}, "alias": {"momentum": 0.8, "beta2": 0.85}}
    expected = options.get(name, {"betas": (0.8, 0.85)})
    assert {option: group[option] for option in expected} == expected


@pytest.mark.parametrize("name", ["stosign", "signsgd", "muon-sign"])
def test_state_precision_stores_the_states_of_this_package_s_optimizers(name):
    model, run = fit(StoSignConfig(name, state_precision="fp8:min_numel=0", schedule="constant"), max_steps=1)
    assert run.optimizers[0].state[model.head.weight]["exp_avg"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize(("name", "state"), [("adamw", "exp_avg"), ("lion", "exp_avg"), ("muon", "momentum_buffer")])
def test_state_precision_is_emulated_for_the_others(name, state):
    model, run = fit(StoSignConfig(name, state_precision="fp8-raw:min_numel=0", schedule="constant"), max_steps=1)
    value = run.optimizers[0].state[model.first.weight][state]
    assert value.abs().max() > 0
    assert torch.equal(value, value.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("stosign", StoSignSGD),
        ("signsgd", SignSGD),
        ("adamw", torch.optim.AdamW),
        ("muon", MuonAdamW),
        ("muon-sign", MuonSign),
    ],
)
def test_each_name_is_its_optimizer(name, cls):
    assert type(fit(StoSignConfig(name), max_steps=1)[1].optimizers[0]) is cls


@pytest.mark.parametrize("name", NAMES)
def test_each_optimizer_moves_every_parameter(name):
    before = Model().state_dict()
    after = fit(StoSignConfig(name, lr=0.1), max_steps=3)[0].state_dict()
    assert [key for key in before if torch.equal(before[key], after[key])] == []


class OwnDefaults(StoSignMixin, pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)


def test_without_a_config_the_defaults_apply():
    model = OwnDefaults()
    model.trainer = trainer(max_steps=10)
    assert type(model.configure_optimizers()["optimizer"]) is StoSignSGD


class NoModule(StoSignMixin):
    pass


def test_the_mixin_asks_for_a_lightning_module():
    with pytest.raises(TypeError, match=r"NoModule must be a LightningModule: class Model\(StoSignMixin"):
        NoModule().param_groups()
