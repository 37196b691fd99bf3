"""The README's first command, and the claim it makes."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    result = subprocess.run(
        [sys.executable, str(DEMO), f"--out={folder}"], capture_output=True, text=True, timeout=1500, check=True
    )
    results = json.loads((folder / "results.json").read_text())
    return folder, result.stdout, {(r["optimizer"], r["state_precision"].partition(":")[0]): r for r in results}


pytestmark = [pytest.mark.slow, pytest.mark.timeout(1600)]


def test_adamw_collapses_with_fp8_states(demo):
    _, _, runs = demo
    collapsed = runs["adamw", "fp8-raw"]
    worse = collapsed["val_loss"] - runs["adamw", "float32"]["val_loss"]
    assert math.isnan(worse) or worse >= 0.3
    assert collapsed["zero_fraction"] > 0.5
    assert collapsed["collapsed_at"] is not None


def test_stosign_trains_on_with_fp8_states(demo):
    _, _, runs = demo
    fp8, full = runs["stosign", "fp8-raw"], runs["stosign", "float32"]
    assert abs(fp8["val_loss"] - full["val_loss"]) <= 0.05
    assert fp8["collapsed_at"] is None
    assert full["val_loss"] < 3.0  # it has learnt something: a uniform guess is 5.5


def test_table_figure_and_tensorboard_command_are_shown(demo):
    folder, printed, _ = demo
    for word in (
        "optimizer",
        "validation loss",
        "zeros in the denominator",
        "collapsed at step",
        "AdamW",
        "StoSignSGD",
    ):
        assert word in printed
    assert f"tensorboard --logdir {folder}" in printed
    assert "The state of AdamW has collapsed" in printed and "| smallest exp_avg_sq |" in printed
    assert "The state of StoSignSGD has collapsed" not in printed
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("run", "denominator"), [("adamw-fp8-raw", "exp_avg_sq"), ("stosign-fp8-raw", "exp_inf")])
def test_event_files_hold_every_tag(demo, run, denominator):
    events = EventAccumulator(str(demo[0] / run))
    events.Reload()
    prefix, layer = "optimizer_state", "model.blocks.0.qkv.weight"
    tags = {f"{kind}/{state}" for kind in ("zero_fraction", "abs_max", "rms") for state in ("exp_avg", denominator)}
    tags |= {f"underflow_fraction/{state}/{f}" for state in ("exp_avg", denominator) for f in ("fp8", "fp8-raw")}
    tags |= {"dead_fraction", "exploding_fraction", "update_rms", "grad_abs_max", "grad_square_max"}
    if denominator == "exp_inf":
        tags |= {"noise_rms", "sign_agreement"}
    expected = {f"{prefix}/{tag}" for tag in tags} | {f"per_layer_{tag}/{layer}" for tag in tags}
    assert expected <= set(events.Tags()["scalars"])
    states = ("exp_avg", denominator)
    histograms = {f"{prefix}/log10_abs/{state}" for state in states}
    histograms |= {f"per_layer_log10_abs/{state}/{layer}" for state in states}
    assert histograms <= set(events.Tags()["histograms"])
    assert "hp_metric" not in events.Tags()["scalars"]


def test_tensorboard_opens_on_the_page_with_both_optimizers(demo):
    folder, printed, _ = demo
    assert "http://localhost:6006/#custom_scalars" in printed
    for run in ("adamw-fp8-raw", "stosign-fp8-raw"):
        events = EventAccumulator(str(folder / run))
        events.Reload()
        assert "custom_scalars__config__" in events.Tags()["tensors"] and events.Tags()["images"]
