"""Small tensors, which are looked at together, have the numbers that each has by itself."""

import math

import pytest
import torch
from torch import nn

from lightning_stosign import StoSignSGD
from lightning_stosign.health import alike, read_moments, snapshot
from lightning_stosign.health.snapshot import Snapshot, parameters_of

FORMATS = ["fp8:min_numel=0", "fp8-raw:static_scale=1024,min_numel=0", "fp8-raw:dtype=float8_e5m2,min_numel=0", "fp8"]
SIZES = [(8, 8), (64,), (8, 8), (1,), (5, 13), (), (65,), (200, 200)]
OPTIMIZERS = {
    "stosign": lambda params: StoSignSGD(params, lr=0.01, weight_decay=0.1, seed=3),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "adamw-tensor-lr": lambda params: torch.optim.AdamW(params, lr=torch.tensor(0.01)),
    "adafactor": lambda params: torch.optim.Adafactor(params),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
}


def stepped(make):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(size, generator=generator)) for size in SIZES]
    optimizer = make(params)
    for _ in range(2):
        before = [param.detach().clone() for param in params]
        for number, param in enumerate(params):
            param.grad = torch.randn(param.shape, generator=generator) * 10.0 ** -(2 * number)
            param.grad[torch.rand(param.shape, generator=generator) < 0.3] = 0.0
        optimizer.step()
    params[1].grad[0] = math.nan
    optimizer.state[params[2]][next(k for k, v in optimizer.state[params[2]].items() if v.ndim)].view(-1)[0] = math.inf
    return optimizer, before


def records(make, formats, depth=None):
    optimizer, before = stepped(make)
    looked = Snapshot(formats, histograms=True, quantiles=[0.1, 0.9])
    for number, (param, group) in enumerate(parameters_of(optimizer)):
        moments = read_moments(optimizer, param, group)
        looked.add_gradient(f"m.{number % 3}.{number}", param.grad)
        looked.add_states(f"m.{number % 3}.{number}", moments)
        looked.add_update(f"m.{number % 3}.{number}", before[number], param.detach(), group["lr"], 0.1)
    return looked.records(per_layer=True, depth=depth)


@pytest.mark.parametrize("depth", [None, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stacked_tensors_have_the_numbers_of_single_ones(monkeypatch, name, depth):
    stacked = []
    monkeypatch.setattr(snapshot, "stack", lambda values: stacked.append(alike.stack(values)) or stacked[-1])
    found, found_histograms = records(OPTIMIZERS[name], FORMATS, depth)
    assert max(len(rows) for rows in stacked) >= 3  # [8, 8], [64] and [8, 8] again
    monkeypatch.setattr(alike, "PART_SIZE", 0)
    expected, histograms = records(OPTIMIZERS[name], FORMATS, depth)
    assert found == pytest.approx(expected, rel=1e-9, nan_ok=True)
    assert found_histograms == histograms


def test_formats_of_blocks_are_forecast_one_by_one():
    make, formats = OPTIMIZERS["adamw"], ["fp8-block:min_numel=0", "fp8:min_numel=0"]
    found, _ = records(make, formats)
    alone, _ = records(make, formats[1:])
    assert {tag: found[tag] for tag in alone} == pytest.approx(alone, rel=1e-9, nan_ok=True)
    assert any("fp8-block" in tag and 0 < value < 1 for tag, value in found.items())


def test_a_layer_s_numbers_do_not_take_a_number_of_operations_each():
    def operations(layers):
        counted = Counted()
        params = [nn.Parameter(torch.ones(16)) for _ in range(layers)]
        optimizer = torch.optim.AdamW(params)
        for param in params:
            param.grad = torch.ones(16)
        optimizer.step()
        looked = Snapshot(["fp8", "fp8-raw"], histograms=True, quantiles=[0.5])
        for number, (param, group) in enumerate(parameters_of(optimizer)):
            looked.add_states(f"{number}", read_moments(optimizer, param, group))
        with counted:
            looked.records(per_layer=False)
        return counted.count

    assert operations(100) - operations(50) < 50 * 12  # mostly views; two hundred were they looked at one by one


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))
