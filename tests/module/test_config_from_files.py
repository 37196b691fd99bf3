"""The config in checkpoints, in YAML and on the command line."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from module.mixin_fits import Model, fit

from lightning_stosign import StatePrecision, StoSignConfig


def test_a_checkpoint_with_the_config_loads_with_weights_only(tmp_path):
    config = StoSignConfig(
        lr=0.02, state_precision=StatePrecision("float8_e4m3fn"), betas=[0.9, 0.5], no_decay=["bias"]
    )
    fit(config, max_steps=1)[1].save_checkpoint(tmp_path / "1.ckpt")
    assert torch.load(tmp_path / "1.ckpt", weights_only=True)["hyper_parameters"]["stosign"] == config


def test_load_from_checkpoint_brings_the_config_back(tmp_path):
    config = StoSignConfig(lr=0.02)
    fit(config, max_steps=1)[1].save_checkpoint(tmp_path / "1.ckpt")
    assert Model.load_from_checkpoint(tmp_path / "1.ckpt", weights_only=True).stosign == config


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_config_can_be_copied(copied):
    config = StoSignConfig("lion", state_precision="fp8")
    assert copied(config) == config


def cli(*args):
    return LightningCLI(
        Model,
        args=list(args),
        run=False,
        save_config_callback=None,
        trainer_defaults={"accelerator": "cpu", "logger": False},
    )


def test_the_command_line_fills_the_config():
    config = cli(
        "--model.stosign.optimizer=adamw",
        "--model.stosign.lr=3e-4",
        "--model.stosign.betas=[0.8,0.9]",
        "--model.stosign.no_decay=[bias,'head.*']",
        "--model.stosign.state_precision=fp8-raw:static_scale=1024",
    ).model.stosign
    assert config == StoSignConfig(
        "adamw",
        lr=3e-4,
        betas=(0.8, 0.9),
        no_decay=("bias", "head.*"),
        state_precision="fp8-raw:static_scale=1024",
    )


def test_yaml_fills_the_config(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "model:\n  stosign:\n    lr: 0.002\n    schedule: wsd\n    warmup_steps: 3\n    state_precision: fp8-block\n"
    )
    config = cli(f"--config={tmp_path / 'run.yaml'}").model.stosign
    assert config == StoSignConfig(lr=0.002, schedule="wsd", warmup_steps=3, state_precision="fp8-block")


def test_yaml_takes_a_state_precision_by_its_fields(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "model:\n  stosign:\n    state_precision:\n"
        "      class_path: lightning_stosign.StatePrecision\n"
        "      init_args: {dtype: torch.float8_e5m2, scaling: tensor}\n"
    )
    assert cli(f"--config={tmp_path / 'run.yaml'}").model.stosign.state_precision == "fp8:dtype=float8_e5m2"


def test_the_command_line_refuses_what_the_config_refuses():
    with pytest.raises(ValueError, match=r"min_lr_ratio=3\.0 must be between 0\.0 and 1\.0"):
        cli("--model.stosign.min_lr_ratio=3.0")


def test_fit_from_the_command_line_trains_with_the_config():
    options = ["--trainer.max_steps=2", "--trainer.enable_checkpointing=false", "--model.stosign.lr=0.25"]
    command = LightningCLI(
        Model,
        args=["fit", *options, "--model.stosign.state_precision=fp8", "--model.stosign.schedule=constant"],
        save_config_callback=None,
        trainer_defaults={"accelerator": "cpu", "logger": False, "enable_progress_bar": False},
    )
    (optimizer,) = command.trainer.optimizers
    assert command.trainer.global_step == 2
    assert {(g["lr"], g["state_precision"]) for g in optimizer.param_groups} == {(0.25, "fp8")}
