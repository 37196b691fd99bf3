"""Nothing depends on torch's default device or default dtype, or keeps what it made under one of them."""

import copy
import functools
import io
import json
import sys
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from optim.contract_cases import backward, net
from torch import nn

from lightning_stosign import (
    ALIAS,
    OnlineToNonconvex,
    SignConverted,
    SignSGD,
    StoSignSGD,
    emulate_state_precision,
    promote_state,
)
from lightning_stosign.cli import main
from lightning_stosign.health import read_moments
from lightning_stosign.health.snapshot import Snapshot


@contextmanager
def foreign():
    """Change the defaults, with all that the package keeps between calls forgotten before."""
    for name, module in list(sys.modules.items()):
        if name.startswith("lightning_stosign") and not name.endswith("native_build"):
            for kept in vars(module).values():
                if isinstance(kept, functools._lru_cache_wrapper):
                    kept.cache_clear()
    before = torch.get_default_dtype()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


@contextmanager
def as_they_are():
    yield


def assert_same(one, other):
    """Nested tensors and numbers are the same, bit for bit."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.device == other.device and one.dtype == other.dtype
        assert torch.equal(one.double().nan_to_num(7e7), other.double().nan_to_num(7e7))
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_same(value, other[key])
    elif isinstance(one, (list, tuple)):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other or (one != one and other != other)


def run(build, context, promote=False):
    """Return parameters and state of a short training whose every call of the package is under a context."""
    model = net()
    with context():
        optimizer = build(model.parameters())
    for seed in range(3):
        loss = backward(model, seed)
        with context():
            optimizer.step(lambda loss=loss: loss)
            if promote and seed == 1:
                for param in model.parameters():
                    promote_state(optimizer, param)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    with context():
        again = build(model.parameters())
        again.load_state_dict(saved)
        copied = copy.deepcopy(again)
    return list(model.parameters()), again.state_dict(), copied.state_dict()


BUILDS = {
    "float32": StoSignSGD,
    "native": partial(StoSignSGD, fused=True),
    "bfloat16": partial(StoSignSGD, state_precision="bfloat16:stochastic_rounding=true,min_numel=0"),
    "fp8": partial(StoSignSGD, betas=(0.9, 0.9), state_precision="fp8:min_numel=0", weight_decay=0.1),
    "fp8-block": partial(StoSignSGD, stochastic=False, state_precision="fp8-block:min_numel=0"),
    "fp4-block": partial(StoSignSGD, state_precision="fp4-block:stochastic_rounding=true,min_numel=0"),
    "SignSGD": partial(SignSGD, state_precision="fp8:min_numel=0", maximize=True),
    "without momentum": partial(SignSGD, momentum=0.0),
    "SignConverted": lambda params: SignConverted(params, StoSignSGD),
    "OnlineToNonconvex": partial(OnlineToNonconvex, window=3),
    "ALIAS": partial(ALIAS, same_batch=False, d0=0.1),
    "Adam-style ALIAS": partial(ALIAS, same_batch=False, d0=0.1, beta2=0.99, momentum=0.9),
}


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS.keys())
def test_every_optimizer_takes_the_same_steps_under_any_defaults(build):
    expected = run(build, as_they_are)
    assert_same(run(build, foreign), expected)
    assert_same(run(build, as_they_are), expected)  # nor afterwards


@pytest.mark.parametrize("precision", ["fp4-block", "fp8-raw", "fp8", "fp8-block", "bfloat16"])
def test_states_are_promoted_the_same_under_any_defaults(precision):
    def build(params):
        return StoSignSGD(params, state_precision=f"{precision}:min_numel=0")

    expected = run(build, as_they_are, promote=True)
    assert_same(run(build, foreign, promote=True), expected)


@pytest.mark.parametrize("precision", ["fp4-block", "fp8-raw", "fp8", "fp8-block", "bfloat16"])
def test_emulated_states_are_the_same_under_any_defaults(precision):
    def states(context):
        x = nn.Parameter(torch.ones(200))
        x.grad = torch.linspace(-1, 1, 200)
        optimizer = torch.optim.SGD([x], momentum=0.9)
        with context():
            emulate_state_precision(optimizer, f"{precision}:min_numel=0")
            optimizer.step()
            optimizer.step()
        return [x, optimizer.state[x]]

    assert_same(states(foreign), states(as_they_are))


def test_statistics_are_the_same_under_any_defaults():
    x = nn.Parameter(torch.ones(5000))
    x.grad = torch.linspace(-1, 1, 5000).pow(9)
    optimizer = StoSignSGD([x])
    optimizer.step()

    def records(context):
        with context():
            snapshot = Snapshot(("fp8", "fp8-raw", "fp8-block", "fp4-block"), histograms=True, quantiles=(0.5,))
            snapshot.add_states("x", read_moments(optimizer, x, optimizer.param_groups[0]))
            return snapshot.records(True)

    assert_same(records(foreign), records(as_they_are))


def test_a_checkpoint_is_inspected_the_same_under_any_defaults(tmp_path, capsys):
    model = net()
    optimizer = StoSignSGD(model.parameters(), state_precision="fp8:min_numel=0")
    backward(model, 0)
    optimizer.step()
    saved = {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    torch.save({**saved, "pytorch-lightning_version": "2.6.0"}, tmp_path / "a.ckpt")

    def report(context):
        with context():
            assert main(["inspect", str(tmp_path / "a.ckpt"), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    assert report(foreign) == report(as_they_are)
