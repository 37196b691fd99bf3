import math
from types import SimpleNamespace

import gpt
import pytest
import torch
from gpt import GPT, SIZES, GPTModule
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from text_data import TextDataModule

from lightning_stosign import StoSignConfig


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    return path


def tiny_gpt(**kwargs):
    torch.manual_seed(0)
    return GPT(**{"vocab_size": 50, "context": 16, "layers": 2, "heads": 2, "width": 32} | kwargs)


def make_trainer(*callbacks, **kwargs):
    return Trainer(
        **{"max_steps": 40, "logger": False, "enable_checkpointing": False} | kwargs,
        callbacks=list(callbacks),
        accelerator="cpu",
        devices=1,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def make_data(text, **kwargs):
    # 50 windows in the training text: an epoch has 12 batches, so that 40 steps cross its end three times.
    return TextDataModule(**{"paths": [str(text)], "context": 16, "batch_size": 4} | kwargs)


@pytest.mark.parametrize(
    ("size", "vocab_size", "context", "parameters"),
    [("1m", 256, 128, 842_496), ("10m", 256, 128, 10_795_008), ("124m", 50257, 1024, 124_439_808)],
)
def test_presets_have_the_published_number_of_parameters(size, vocab_size, context, parameters):
    with torch.device("meta"):
        model = GPT(vocab_size, context, *SIZES[size])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize(("tied", "matrices"), [(True, 1), (False, 2)])
def test_a_tied_head_is_the_embedding(tied, matrices):
    model = tiny_gpt(tied=tied)
    assert len({model.tokens.weight.data_ptr(), model.head.weight.data_ptr()}) == matrices


def test_a_token_changes_no_earlier_logits():
    model = tiny_gpt()
    tokens = torch.randint(50, (2, 16))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 50
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert all(not torch.equal(before[:, i], after[:, i]) for i in range(9, 16))


def test_the_order_of_tokens_matters():
    model = tiny_gpt()
    tokens = torch.arange(16)[None]
    swapped = tokens.clone()
    swapped[0, [0, 1]] = tokens[0, [1, 0]]
    assert not torch.allclose(model(tokens)[0, -1], model(swapped)[0, -1])


@pytest.mark.parametrize("vocab_size", [256, 1000])
def test_the_first_loss_is_that_of_a_uniform_guess(vocab_size):
    torch.manual_seed(0)
    module = GPTModule("1m", vocab_size=vocab_size, context=64)
    tokens = torch.randint(vocab_size, (8, 65))
    loss = module.loss((tokens[:, :-1], tokens[:, 1:]))
    assert loss.item() == pytest.approx(math.log(vocab_size), abs=0.1)


def test_residual_branches_start_smaller_the_more_there_are():
    block = tiny_gpt(layers=8, width=128).blocks[0]
    assert block.up.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for branch in (block.out, block.down):
        assert branch.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


def test_evaluation_is_without_dropout():
    model = tiny_gpt(dropout=0.5)
    tokens = torch.arange(16)[None]
    assert not torch.equal(model(tokens), model(tokens))
    assert torch.equal(model.eval()(tokens), tiny_gpt()(tokens))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"context": 0}, "context must be at least 1, got 0"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"heads": 3}, "heads must divide width, got heads=3 and width=32"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_a_bad_argument_is_named_with_what_is_accepted(kwargs, match):
    with pytest.raises(ValueError, match=match):
        tiny_gpt(**kwargs)


def test_an_unknown_size_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="size must be one of 1m, 10m, 124m, got '2m'"):
        GPTModule("2m")


def test_a_sequence_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="a sequence has 17 tokens, the model's context is 16"):
        tiny_gpt()(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"vocab_size": 100, "context": 16}, "the data's vocab_size=256 does not fit the model's vocab_size=100"),
        ({"context": 8}, "the data's context=16 does not fit the model's context=8"),
    ],
)
def test_data_that_does_not_fit_is_refused_before_training(text, kwargs, match):
    with pytest.raises(ValueError, match=match):
        make_trainer(max_steps=1).fit(GPTModule(**kwargs), datamodule=make_data(text))


class KillAfter(Callback):
    """Ends the training as a crash would."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


@pytest.mark.parametrize("accumulate", [2])
def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_one(text, tmp_path, accumulate):
    def make_module():
        seed_everything(0, verbose=False)
        return GPTModule(context=16, dropout=0.1, stosign=StoSignConfig(optimizer="adamw", warmup_steps=5))

    kwargs = {"accumulate_grad_batches": accumulate, "enable_checkpointing": True}
    uninterrupted, killed, resumed = make_module(), make_module(), make_module()
    make_trainer(accumulate_grad_batches=accumulate).fit(uninterrupted, datamodule=make_data(text))
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=20, save_top_k=-1)
    with pytest.raises(RuntimeError, match="killed"):
        make_trainer(save, KillAfter(30), **kwargs).fit(killed, datamodule=make_data(text))
    torch.rand(7)  # the global RNG is somewhere else now
    make_trainer(accumulate_grad_batches=accumulate).fit(
        resumed, datamodule=make_data(text), ckpt_path=tmp_path / "step=20.ckpt"
    )
    for (name, expected), actual in zip(uninterrupted.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, actual), name


def test_dropout_differs_between_batches_and_epochs_and_seeds(text):
    class Draws(Callback):
        def __init__(self):
            self.values = []

        def on_before_zero_grad(self, *args):
            self.values.append(torch.rand(()).item())

    draws = []
    for seed in (0, 1):
        callback = Draws()
        module = GPTModule(context=16, dropout=0.1, stosign=StoSignConfig(optimizer="adamw", seed=seed))
        make_trainer(callback, max_steps=30).fit(module, datamodule=make_data(text))
        draws += callback.values
    assert len(set(draws)) == len(draws) == 60


def test_throughput_excludes_validation(text, monkeypatch):
    clock = SimpleNamespace(now=0.0)

    class Passing(Callback):
        def on_train_batch_start(self, *args):
            clock.now += 2.0

        def on_validation_batch_start(self, *args):
            clock.now += 1000.0

    monkeypatch.setattr(gpt, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    module = GPTModule(context=16, stosign=StoSignConfig(optimizer="adamw"))
    trainer = make_trainer(Passing(), max_steps=10, log_every_n_steps=5, val_check_interval=3)
    trainer.fit(module, datamodule=make_data(text))
    assert trainer.progress_bar_metrics["tokens/s"] == 4 * 16 / 2.0


def test_a_checkpoint_rebuilds_the_module(text, tmp_path):
    module = GPTModule(context=16, stosign=StoSignConfig(optimizer="adamw", lr=0.5))
    trainer = make_trainer(max_steps=1)
    trainer.fit(module, datamodule=make_data(text))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    rebuilt = GPTModule.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert rebuilt.stosign == module.stosign
    tokens = torch.arange(16)[None]
    assert torch.equal(rebuilt.eval()(tokens), module.eval()(tokens))
