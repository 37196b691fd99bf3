import random
from pathlib import Path

import pretrain_gpt
import pytest
import torch
from lightning.pytorch import Callback

CONFIGS = {path.stem: str(path) for path in Path(pretrain_gpt.__file__).parent.glob("pretrain_*.yaml")}


class KillAtStep30(Callback):
    """Ends the training as a crash would."""

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 30:
            raise RuntimeError("killed")


@pytest.fixture(autouse=True)
def in_a_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "so", "on"]
    (tmp_path / "text.txt").write_text(" ".join(random.Random(0).choices(words, k=1500)))


def fit(*args):
    """Run the shipped configuration on a small text."""
    small = [
        "--data.paths",
        "[text.txt]",
        "--data.context",
        "16",
        "--data.batch_size",
        "8",
        "--trainer.accelerator",
        "cpu",
    ]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    return pretrain_gpt.main(["fit", "--config", CONFIGS["pretrain_gpt"], *small, *quiet, *args])


def test_the_context_of_the_data_is_the_models():
    cli = fit("--trainer.limit_train_batches", "0")
    assert cli.model.context == cli.datamodule.context == 16


@pytest.mark.parametrize("config", CONFIGS)
def test_configs_are_valid(config, capsys):
    with pytest.raises(SystemExit) as end:
        pretrain_gpt.main(["fit", "--config", CONFIGS[config], "--print_config"])
    assert end.value.code == 0
    assert "state_precision: fp8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model.size", "2m"], "size"),
        (["--model.stosign.lr", "-1"], "lr"),
        (["--data.batch_size", "0"], "batch_size"),
        (["--trainer.max_stepz", "1"], "max_stepz"),
    ],
)
def test_a_bad_argument_is_named(arguments, named, capsys):
    with pytest.raises((SystemExit, ValueError)) as end:
        fit(*arguments)
    assert named in capsys.readouterr().err + str(end.value)


@pytest.mark.slow
def test_the_example_learns():
    cli = fit("--trainer.max_steps", "100", "--trainer.val_check_interval", "50")
    assert cli.trainer.callback_metrics["val_loss"] < 2.5
    assert list(Path("runs/gpt-1m/version_0").glob("events.out.tfevents.*"))
    assert Path("runs/gpt-1m/version_0/checkpoints/last.ckpt").exists()


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_one():
    steps = ["--model.dropout", "0.1", "--trainer.max_steps", "45", "--trainer.callbacks.every_n_train_steps", "20"]
    uninterrupted = fit(*steps).model
    with pytest.raises(RuntimeError, match="killed"):
        fit(*steps, "--trainer.callbacks+", "test_pretrain_gpt.KillAtStep30")
    checkpoint = Path("runs/gpt-1m/version_1/checkpoints/last.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 20
    resumed = fit(*steps, "--ckpt_path", str(checkpoint)).model
    for (name, expected), actual in zip(uninterrupted.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, actual), name


@pytest.mark.slow
def test_products_and_states_in_four_bits_train_as_float32_does():
    four_bits = [
        "--trainer.plugins=Float8Precision",
        "--trainer.plugins.init_args.recipe=nvfp4",
        "--trainer.plugins.init_args.backend=emulation",
        "--model.stosign.state_precision=fp4-block:stochastic_rounding=true",
    ]
    short = ["--trainer.max_steps=60", "--trainer.limit_val_batches=0", "--model.stosign.warmup_steps=10"]
    losses = []
    for options in (["--trainer.plugins=null", "--model.stosign.state_precision=null"], four_bits):
        cli = fit(*short, *options)
        losses.append(cli.trainer.callback_metrics["train_loss"].item())
    states = cli.trainer.optimizers[0].state.values()
    assert sum(state["exp_inf"].dtype == torch.uint8 for state in states) == 17  # 16 matrices and the embedding
    assert losses[0] < 2.5 and losses[1] < losses[0] + 0.15
