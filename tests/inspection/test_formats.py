import json

import pytest
import torch
from inspection.written_by import CELLS, FORMATS, OPTIMIZERS, fsdp1, trained

from lightning_stosign.health import read_moments
from lightning_stosign.inspection import as_json, inspect_checkpoint


def report_of(path, **options):
    return json.loads(json.dumps(as_json(inspect_checkpoint(path, **options)), allow_nan=False))


def live_states(net, optimizer):
    """Return what the optimizer's states hold, by the parameter's name, in its own order."""
    names = {param: name for name, param in net.named_parameters()}
    return {
        names[param]: read_moments(optimizer, param, group).states
        for group in optimizer.param_groups
        for param in group["params"]
    }


@pytest.mark.filterwarnings("ignore")
def test_what_fsdp1_flattened_is_one_layer(tmp_path):
    net, live = trained("AdamW")
    (layer,) = report_of(fsdp1("flat")(tmp_path, net, live))["optimizers"][0]["layers"]
    whole = torch.cat([states["exp_avg"].reshape(-1) for states in live_states(net, live).values()])
    found = layer["states"]["exp_avg"]
    assert found["values"] == whole.numel() and found["abs_max"] == pytest.approx(whole.abs().max().item())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("format", "optimizer"), CELLS)
def test_the_states_that_the_optimizer_had_are_found(tmp_path, format, optimizer):
    write, format_name, has_names = FORMATS[format]
    net, live = trained(optimizer)
    expected = live_states(net, live)
    report = report_of(write(tmp_path, net, live), forecast=["fp8-raw:min_numel=0"])
    assert report["format"] == format_name
    (found,) = report["optimizers"]
    without_options = "safetensors" in format
    assert found["optimizer"] == OPTIMIZERS[optimizer][1] or without_options or "DeepSpeed" in format
    by_name = {layer["name"]: layer["states"] for layer in found["layers"]}
    if not has_names:
        by_name = dict(zip(expected, by_name.values(), strict=True)) if len(by_name) > 1 else {}
        by_name = by_name or dict(zip(expected, (layer["states"] for layer in found["layers"]), strict=True))
    prefix = "net." if format == "Lightning `.ckpt`" else ""
    for name, states in expected.items():
        if None in by_name and prefix + name not in by_name:
            continue  # a name that is not certain
        layer = by_name[prefix + name]
        compared = 0
        for state, value in states.items():
            if without_options and state not in layer:
                continue  # a code book's algorithm stands in the options
            assert layer[state]["values"] == value.numel()
            assert layer[state]["rms"] == pytest.approx(value.double().square().mean().sqrt().item(), rel=1e-5)
            assert layer[state]["zero_fraction"] == pytest.approx((value == 0).double().mean().item())
            compared += 1
        assert compared > 0
