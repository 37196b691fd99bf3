"""Hyperparameters may be numpy scalars, as searches and configs hand them out; what is stored are Python numbers."""

import io
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from lightning_stosign import (
    ALIAS,
    Float8Precision,
    MuonSign,
    OnlineToNonconvex,
    OptimizerDashboard,
    OptimizerStateMonitor,
    SignConverted,
    SignDDPStrategy,
    SignSGD,
    SignStepSizeFinder,
    StateCollapseGuard,
    StatePrecision,
    StoSignConfig,
    StoSignSGD,
)
from lightning_stosign.optim.wrappers.muon_adamw import MuonAdamW

F32, F64, I64, U8, B = np.float32, np.float64, np.int64, np.uint8, np.bool_

OPTIMIZERS = {
    "StoSignSGD": partial(StoSignSGD, lr=F32(0.5), betas=(F64(0.5), F32(1)), weight_decay=np.float16(0.5), seed=I64(3),
                          stochastic=B(True), maximize=B(False), fused=B(False)),
    "SignSGD": partial(SignSGD, lr=F64(0.5), momentum=F32(0.5), weight_decay=I64(0), maximize=B(True)),
    "SignConverted": partial(SignConverted, base=partial(torch.optim.AdamW, eps=F64(1e-8)), lr=F32(0.5), seed=U8(3),
                             stochastic=B(False), normalize=B(True)),
    "OnlineToNonconvex": partial(OnlineToNonconvex, lr=F32(0.5), radius=F32(0.5), window=I64(3), seed=I64(1)),
    "ALIAS": partial(ALIAS, momentum=F32(0.5), beta2=F64(0.5), d0=F32(0.5), same_batch=B(False), measure_every=I64(3),
                     loss_lower_bound=F32(0), accumulate_grad_batches=U8(1)),
    "MuonSign": partial(MuonSign, lr=F32(0.5), betas=(F64(0.5), F32(1)), stochastic=B(True), seed=I64(3)),
    "MuonAdamW": partial(MuonAdamW, lr=F32(0.5), betas=(F64(0.5), F32(0.5)), weight_decay=I64(0)),
    "a fraction": partial(SignSGD, lr=Fraction(1, 2)),
}  # fmt: skip

PLAIN = (bool, int, float, str, type(None), torch.Tensor)


def assert_plain(value):
    if isinstance(value, (tuple, list)):
        for each in value:
            assert_plain(each)
    else:
        assert type(value) in PLAIN, repr(value)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_an_optimizer_takes_them_and_its_state_dict_loads_with_weights_only(make):
    x, y = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = make([x])
    optimizer.add_param_group({"params": [y], "lr": F64(0.25), "weight_decay": F32(0)})
    for group in optimizer.param_groups:
        for name, value in group.items():
            if name not in ("params", "param_names"):
                assert_plain(value)
    x.grad = y.grad = torch.ones(3)
    optimizer.step(lambda: 1.0)
    optimizer.param_groups[0]["lr"] = F64(0.125)  # as a scheduler would
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert saved["param_groups"][0]["lr"] == 0.125
    optimizer.load_state_dict(saved)
    optimizer.step(lambda: 1.0)


def test_they_step_as_python_s_numbers_do():
    results = []
    for number, seed in ((F64(0.3), I64(5)), (0.3, 5)):
        x = nn.Parameter(torch.linspace(-1, 1, 50))
        optimizer = StoSignSGD([x], lr=number, betas=(number, 1.0), weight_decay=number, seed=seed)
        for _ in range(3):
            x.grad = x.detach().clone()
            optimizer.step()
        results.append(x)
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (StoSignSGD, {"lr": F32(-1)}),
        (StoSignSGD, {"lr": F32("nan")}),
        (StoSignSGD, {"betas": (F32(1), 1.0)}),
        (SignSGD, {"momentum": F32(1)}),
    ],
)
def test_they_are_checked_as_python_s_numbers_are(make, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        make([nn.Parameter(torch.ones(1))], **arguments)


@pytest.mark.parametrize("value", [B(True), "0.1", 1j, np.complex64(1), np.array([0.1, 0.2])])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(TypeError, match="weight_decay"):
        SignSGD([nn.Parameter(torch.ones(1))], weight_decay=value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: StatePrecision(
            torch.float8_e4m3fn, "block", block_size=I64(64), stochastic_rounding=B(True), min_numel=U8(0)
        ),
        lambda: StatePrecision(torch.float8_e4m3fn, static_scale=F32(1024)),
        lambda: StoSignConfig(
            lr=F32(0.5),
            betas=(F64(0.5), F32(1)),
            weight_decay=I64(0),
            warmup_steps=I64(3),
            min_lr_ratio=F32(0.5),
            wsd_decay_ratio=F64(0.5),
            stochastic=B(True),
            seed=U8(3),
            convert_on_resume=B(False),
        ),
        lambda: OptimizerStateMonitor(
            every_n_steps=I64(3), depth=U8(2), per_layer=B(True), histograms=B(False), quantiles=(F32(0.5),)
        ),
        lambda: OptimizerDashboard(every_n_steps=I64(3), draw_every_n_steps=U8(9)),
        lambda: StateCollapseGuard(
            F32(0.5),
            I64(3),
            max_dead_fraction=F64(0.5),
            max_exploding_fraction=F32(0.5),
            per_layer=B(True),
            every_n_steps=I64(5),
        ),
        lambda: SignStepSizeFinder(
            steps=I64(20), start=F32(0.5), measure_every=U8(2), update_lr=B(True), refine=B(False)
        ),
        lambda: SignDDPStrategy(
            signs_of="gradients", stochastic=B(False), error_feedback=B(True), warmup_steps=I64(3), seed=U8(1)
        ),
        lambda: Float8Precision("block", backend="emulation", pad=B(True)),
    ],
    ids=["blocks", "static scale", "config", "monitor", "dashboard", "guard", "finder", "strategy", "plugin"],
)
def test_everything_that_is_configured_takes_them(make):
    made = make()
    for name, value in vars(made).items():
        assert not type(value).__module__.startswith("numpy"), name
        if isinstance(value, (tuple, list)):
            assert not any(type(each).__module__.startswith("numpy") for each in value), name
