"""The README's first command, and the claim it makes."""

import ast
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_stosign.cli import main

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo.py"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    result = subprocess.run(
        [sys.executable, str(DEMO), f"--out={folder}"], capture_output=True, text=True, timeout=1500, check=True
    )
    results = json.loads((folder / "results.json").read_text())
    return folder, result.stdout, {(r["optimizer"], r["state_precision"].partition(":")[0]): r for r in results}


def trains(test):
    return pytest.mark.slow(pytest.mark.timeout(1600)(test))


def test_the_wheel_holds_every_script_that_the_demo_imports():
    included = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    scripts = {Path(source).name for source in included["force-include"] if source.startswith("examples/")}
    examples = {path.stem for path in DEMO.parent.glob("*.py")}
    assert {"demo.py", "pretrain_gpt.yaml", "progress_lines.py"} <= scripts
    for script in (name for name in scripts if name.endswith(".py")):
        tree = ast.parse((DEMO.parent / script).read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {f"{name}.py" for name in imported & examples} <= scripts


def test_the_command_passes_its_options_on(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(DEMO.parent))
    import demo

    asked = []
    monkeypatch.setattr(demo, "train", lambda *args: asked.append(args) or sys.exit(7))
    with pytest.raises(SystemExit, match="7"):
        main(["demo", "--steps=3", "--lr=0.5", f"--out={tmp_path / 'runs'}"])
    assert asked == [("adamw", "float32", 0.5, 3, tmp_path / "runs")]


@trains
def test_adamw_collapses_with_fp8_states(demo):
    _, _, runs = demo
    collapsed = runs["adamw", "fp8-raw"]
    worse = collapsed["val_loss"] - runs["adamw", "float32"]["val_loss"]
    assert math.isnan(worse) or worse >= 0.3
    assert collapsed["zero_fraction"] > 0.5
    assert collapsed["collapsed_at"] is not None


@trains
def test_stosign_trains_on_with_fp8_states(demo):
    _, _, runs = demo
    fp8, full = runs["stosign", "fp8-raw"], runs["stosign", "float32"]
    assert abs(fp8["val_loss"] - full["val_loss"]) <= 0.05
    assert fp8["collapsed_at"] is None
    assert full["val_loss"] < 3.0  # it has learnt something: a uniform guess is 5.5


@trains
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


@trains
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


@trains
def test_tensorboard_opens_on_the_page_with_both_optimizers(demo):
    folder, printed, _ = demo
    assert "http://localhost:6006/#custom_scalars" in printed
    for run in ("adamw-fp8-raw", "stosign-fp8-raw"):
        events = EventAccumulator(str(folder / run))
        events.Reload()
        assert "custom_scalars__config__" in events.Tags()["tensors"] and events.Tags()["images"]
