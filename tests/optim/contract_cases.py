"""The package's optimizers as torch's own tests know an optimizer: an OptimizerInfo, one line for each in INFOS."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
)

from lightning_stosign import ALIAS, MuonSign, OnlineToNonconvex, SignConverted, SignSGD, StoSignSGD

COMMON = [
    {},
    {"lr": 0.01},
    {"lr": torch.tensor(0.001)},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "maximize": True},
    {"state_precision": "bfloat16:min_numel=0"},
    {"state_precision": "fp8:min_numel=0", "weight_decay": 0.1},
    {"state_precision": "fp8-block:stochastic_rounding=true,min_numel=0"},
    {"state_precision": "fp4-block:stochastic_rounding=true,min_numel=0"},
]


def info(cls, inputs, errors, fused=False):
    """Describe an optimizer: options to construct it with; options that it refuses, with the start of the message."""

    def error_inputs(device, dtype):
        refused = [
            ErrorOptimizerInput(OptimizerInput(None, kwargs), error_type=ValueError, error_regex=message)
            for kwargs, message in errors
        ]
        return get_error_inputs_for_all_optims(device, dtype) + refused

    return OptimizerInfo(
        cls,
        optim_inputs_func=lambda device, dtype=None: [OptimizerInput(None, kwargs, str(kwargs)) for kwargs in inputs],
        optim_error_inputs_func=error_inputs,
        supported_impls=("fused",) if fused else (),
        supports_fused_on=("cpu",) if fused else (),
        not_og_supported_flags=("maximize", "fused", "on_nonfinite", "state_precision"),
        supports_complex=False,
    )


class SignConvertedAdamax(SignConverted):
    """One base, so that it can be constructed as the others are."""

    def __init__(self, params, **options):
        super().__init__(params, torch.optim.Adamax, **options)


INFOS = [
    info(
        StoSignSGD,
        [*COMMON, {"betas": (0.0, 1.0)}, {"betas": (0.9, 0.9), "seed": 7}, {"stochastic": False}],
        [({"betas": (0.9, 0.0)}, r"betas\[1\]=0.0"), ({"seed": -1}, "seed=-1"), ({"lr": -0.1}, "lr=-0.1")],
        fused=True,
    ),
    info(SignSGD, [*COMMON, {"momentum": 0.0}], [({"momentum": -0.5}, "momentum=-0.5")], fused=True),
    info(
        SignConvertedAdamax,
        [*COMMON[:4], {"stochastic": False}, {"normalize": True}],
        [({"weight_decay": -1.0}, "weight_decay=-1.0"), ({"stochastic": 2}, "stochastic=2")],
    ),
]

each_info = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)


def _cases(infos):
    for info in infos:
        for case in _get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, info):
            yield pytest.param(partial(info.optim_cls, **case.kwargs), id=f"{info.name}-{case.desc}")


# Its step is not the learning rate's size, which the tests of each_info are about.
ONLINE_TO_NONCONVEX = info(OnlineToNonconvex, [*COMMON[:4], {"radius": 0.5, "window": 3}], [])


class MuonSignByShape(MuonSign):
    """Muon for the matrices of any group, so that it can be constructed as the others are."""

    @staticmethod
    def group_rule(group):
        params = [group["params"]] if isinstance(group["params"], torch.Tensor) else list(group["params"])
        matrix = [(p[1] if isinstance(p, tuple) else p).dim() == 2 for p in params]
        parts = {use: [p for p, m in zip(params, matrix, strict=True) if m is use] for use in (True, False)}
        return [{**group, "params": part, "use_muon": use} for use, part in parts.items() if part]


MUON_SIGN = info(
    MuonSignByShape,
    [
        {"lr": torch.tensor(0.001)},
        {"state_precision": "fp8:min_numel=0", "maximize": True},
        {"state_precision": "fp4-block:stochastic_rounding=true,min_numel=0", "stochastic": True},
    ],
    [],
    fused=True,
)

# It has no lr, and without a closure it compares each gradient with the last one.
_WITHOUT_CLOSURE = {"same_batch": False, "d0": 0.1}
FULL_GRADIENT_ALIAS = info(
    ALIAS,
    [{**_WITHOUT_CLOSURE, **more} for more in ({}, {"weight_decay": 0.1}, {"momentum": 0.9}, {"beta2": 0.99})],
    [],
)

# Every option of every optimizer, as a function of the parameters; with fused=True too, where there is that.
each_case = pytest.mark.parametrize(
    "build", list(_cases([*INFOS, MUON_SIGN, ONLINE_TO_NONCONVEX, FULL_GRADIENT_ALIAS]))
)


def net(dtype=torch.float32):
    """Return the model that the tests train, the same each time: matrices, a norm, and one size that is compiled."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 1)).to(dtype)


def backward(model, seed):
    """Set the gradients of a loss on data that depend on the seed alone."""
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()))
    model.zero_grad()
    loss = (model(x).squeeze() - x.sum(1)).square().mean()
    loss.backward()
    return loss


def train(model, optimizer, seeds):
    """Take a step for each seed."""
    for seed in seeds:
        backward(model, seed)
        optimizer.step()


def assert_same_params(a, b):
    for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert p.dtype == q.dtype and torch.equal(p, q), name


def assert_same_state(a, b):
    """Two optimizers' states have the same entries, dtypes and bits."""
    for of_a, of_b in zip(a.param_groups, b.param_groups, strict=True):
        for p, q in zip(of_a["params"], of_b["params"], strict=True):
            assert a.state[p].keys() == b.state[q].keys()
            for name, value in a.state[p].items():
                other = b.state[q][name]
                assert value.dtype == other.dtype and torch.equal(value.double(), other.double()), name
