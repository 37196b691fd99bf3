import itertools
import random
import re

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from text_data import StreamSampler, TextDataModule

BATCHES_PER_EPOCH = 12


class Recorder(LightningModule):
    """Trains nothing and remembers what it was given."""

    def __init__(self, folder=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.folder, self.seen = folder, []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, batch[0].tolist()))
        return 0 * self.weight

    def validation_step(self, batch, batch_idx):
        pass

    def on_train_end(self):
        if self.folder is not None:
            torch.save(self.seen, self.folder / f"{self.global_rank}.pt")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(random.Random(0).randbytes(850))  # 808 for training: 50 windows of 16 bytes and one byte
    return path


def text_data(text, **kwargs):
    return TextDataModule(**{"paths": [str(text)], "context": 16, "batch_size": 4} | kwargs)


def make_batches(data, number):
    data.setup("fit")
    return [tokens.tolist() for tokens, _ in itertools.islice(data.train_dataloader(), number)]


def fit(text, *, ckpt_path=None, callbacks=(), num_workers=0, folder=None, max_steps=30, **trainer_kwargs):
    trainer = Trainer(
        **{"accelerator": "cpu", "devices": 1, "enable_checkpointing": bool(callbacks)} | trainer_kwargs,
        max_steps=max_steps,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    recorder = Recorder(folder)
    trainer.fit(recorder, datamodule=text_data(text, num_workers=num_workers), ckpt_path=ckpt_path)
    return recorder.seen


def test_targets_are_the_tokens_one_position_later(text):
    data = text_data(text)
    data.setup("fit")
    tokens, targets = next(iter(data.train_dataloader()))
    assert tokens.shape == targets.shape == (4, 16)
    assert tokens.dtype == targets.dtype == torch.int64
    for window, target in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert bytes([*window, target[-1]]) in text.read_bytes()
        assert window[1:] == target[:-1]


def test_windows_depend_on_seed_and_index_only(text):
    data, again, other = (text_data(text, seed=seed) for seed in (0, 0, 1))
    for module in (data, again, other):
        module.setup("fit")
    whole = data.train_windows.__getitems__(list(range(100)))
    assert torch.equal(whole[70:75], again.train_windows.__getitems__([70, 71, 72, 73, 74]))
    assert torch.equal(whole[70], again.train_windows[70])
    assert not torch.equal(whole, other.train_windows.__getitems__(list(range(100))))


def test_windows_start_everywhere_in_the_training_text(text):
    data = text_data(text)
    data.setup("fit")
    starts = data.train_windows.starts(np.arange(20_000, dtype=np.uint64))
    assert np.array_equal(np.unique(starts), np.arange(len(data.train_windows.tokens) - 16))


def test_an_epoch_draws_windows_the_previous_one_did_not(text):
    seen = fit(text, max_steps=2 * BATCHES_PER_EPOCH)
    epochs = [[batch for epoch, _, batch in seen if epoch == number] for number in (0, 1)]
    assert len(epochs[0]) == len(epochs[1]) == BATCHES_PER_EPOCH
    assert not any(batch in epochs[0] for batch in epochs[1])


def test_ranks_share_the_windows_of_a_single_process(text):
    data = text_data(text)
    data.setup("fit")
    samplers = [StreamSampler(data.train_windows, ranks=2, rank=rank) for rank in (0, 1)]
    dealt = [list(itertools.islice(sampler, 10)) for sampler in samplers]
    assert sorted(dealt[0] + dealt[1]) == list(range(20))


@pytest.mark.parametrize("limit", [1.0, 5])
def test_workers_do_not_change_the_batches(text, limit):
    assert fit(text, limit_train_batches=limit) == fit(text, limit_train_batches=limit, num_workers=2)


def test_a_loader_goes_on_where_its_state_was_taken(text):
    expected = make_batches(text_data(text), 10)
    data = text_data(text)
    data.setup("fit")
    first = data.train_dataloader()
    assert [tokens.tolist() for tokens, _ in itertools.islice(first, 4)] == expected[:4]
    second = data.train_dataloader()
    second.load_state_dict(first.state_dict())
    assert [tokens.tolist() for tokens, _ in itertools.islice(second, 6)] == expected[4:]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("checkpoint", "trainer_kwargs"),
    [
        pytest.param({"every_n_train_steps": 20}, {}, id="middle of an epoch"),
        pytest.param({"every_n_train_steps": BATCHES_PER_EPOCH}, {}, id="last batch of an epoch"),
        pytest.param({"every_n_epochs": 1, "save_on_train_epoch_end": True}, {}, id="end of an epoch"),
        pytest.param({"every_n_epochs": 1, "save_on_train_epoch_end": False}, {}, id="after validation"),
        pytest.param({"every_n_train_steps": 10}, {"limit_train_batches": 5}, id="last batch of a cut epoch"),
        pytest.param({"every_n_train_steps": 4}, {"accumulate_grad_batches": 3, "max_steps": 10}, id="accumulation"),
        pytest.param({"every_n_train_steps": 20}, {"val_check_interval": 4}, id="validation between batches"),
    ],
)
def test_a_resumed_run_sees_the_batches_of_the_uninterrupted_one(
    text, tmp_path, checkpoint, trainer_kwargs, num_workers
):
    checkpoints = tmp_path / "checkpoints"
    save = ModelCheckpoint(checkpoints, filename="{step}", save_top_k=-1, **checkpoint)
    uninterrupted = fit(text, callbacks=[save], num_workers=num_workers, **trainer_kwargs)
    first = min(checkpoints.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    resumed = fit(text, ckpt_path=first, num_workers=num_workers, **trainer_kwargs)
    assert 0 < len(resumed) < len(uninterrupted)
    assert resumed == uninterrupted[-len(resumed) :]
    step = int(first.stem.removeprefix("step="))
    assert len(uninterrupted) - len(resumed) == step * trainer_kwargs.get("accumulate_grad_batches", 1)


@pytest.mark.slow
def test_two_processes_resume_where_they_were(text, tmp_path):
    ddp = {"strategy": "ddp_spawn", "devices": 2, "max_steps": 16}
    checkpoints, *folders = (tmp_path / name for name in ("checkpoints", "whole", "resumed"))
    for folder in folders:
        folder.mkdir()
    save = ModelCheckpoint(checkpoints, filename="{step}", every_n_train_steps=10, save_top_k=-1)
    fit(text, callbacks=[save], folder=folders[0], **ddp)
    fit(text, ckpt_path=checkpoints / "step=10.ckpt", folder=folders[1], **ddp)
    whole, resumed = ([torch.load(folder / f"{rank}.pt") for rank in (0, 1)] for folder in folders)
    for rank in (0, 1):
        assert resumed[rank] == whole[rank][10:]
    single_process = [window for *_, batch in fit(text, max_steps=32) for window in batch]
    by_rank = [[window for *_, batch in seen for window in batch] for seen in whole]
    assert [window for pair in zip(*by_rank, strict=True) for window in pair] == single_process


def test_overfitting_sees_the_same_batches_every_epoch(text):
    batches = [batch for *_, batch in fit(text, overfit_batches=2, max_steps=6)]
    assert batches[:2] == batches[2:4] == batches[4:]


def test_validation_covers_its_text_once(text):
    data = text_data(text, val_fraction=0.5)
    data.setup("fit")
    windows = torch.cat([tokens for tokens, _ in data.val_dataloader()])
    held_out = text.read_bytes()[425:]
    starts = sorted(held_out.index(bytes(window)) for window in windows.tolist())
    assert starts == list(range(0, 26 * 16, 16))


@pytest.mark.parametrize("part", [10, 100, 500])
def test_the_first_validation_windows_are_a_fair_sample(tmp_path, part):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(32_000))
    data = TextDataModule([str(path)], val_paths=[str(path)], context=16)
    data.setup("fit")
    starts = np.sort(data.val_windows.starts(np.arange(part, dtype=np.uint64))).astype(np.int64)
    gaps = np.diff(np.concatenate([starts, starts[:1] + 32_000]))
    assert gaps.max() <= 3 * 32_000 / part


def test_the_default_text_is_the_standard_library():
    data = TextDataModule()
    data.setup("fit")
    assert data.vocab_size == 256
    assert len(data.train_windows) > 20_000
    assert b"def " in data.train_windows.tokens.tobytes()


def test_several_text_files_are_joined(tmp_path):
    for name, content in (("b.txt", b"b" * 300), ("a.txt", b"a" * 300)):
        (tmp_path / name).write_bytes(content)
    data = TextDataModule([str(tmp_path / "*.txt")], val_paths=[str(tmp_path / "b.txt")], context=16)
    data.setup("fit")
    assert data.train_windows.tokens.tobytes() == b"a" * 300 + b"\n" + b"b" * 300
    assert data.val_windows.tokens.tobytes() == b"b" * 300


def test_token_files_are_mapped_not_read(tmp_path):
    train, val = (np.arange(start, start + 4000, dtype=np.uint16) for start in (0, 40_000))
    train.tofile(tmp_path / "train.bin")
    val.tofile(tmp_path / "val.bin")
    data = TextDataModule([str(tmp_path / "train.bin")], [str(tmp_path / "val.bin")], context=32)
    data.setup("fit")
    assert isinstance(data.train_windows.tokens, np.memmap)
    assert data.vocab_size == 50257
    for loader, low, high in ((data.train_dataloader(), 0, 4000), (data.val_dataloader(), 40_000, 44_000)):
        tokens, targets = next(iter(loader))
        assert torch.equal(tokens + 1, targets)
        assert low <= tokens.min() <= targets.max() < high


@pytest.mark.parametrize(
    ("argument", "value", "accepted"),
    [
        ("context", 0, "at least 1"),
        ("batch_size", 0, "at least 1"),
        ("num_workers", -1, "at least 0"),
        ("val_fraction", 0.0, "in (0, 1)"),
        ("val_fraction", 1.0, "in (0, 1)"),
        ("seed", -1, "in [0, 2**64)"),
        ("vocab_size", 70_000, "in [1, 65536]"),
    ],
)
def test_a_bad_argument_is_named_with_what_is_accepted(text, argument, value, accepted):
    with pytest.raises(ValueError, match=re.escape(f"{argument} must be {accepted}, got {value}")):
        text_data(text, **{argument: value})


@pytest.mark.parametrize("argument", ["paths", "val_paths"])
@pytest.mark.parametrize("pattern", ["missing.txt", "*.missing", "."])
def test_a_path_without_files_is_named(text, tmp_path, argument, pattern):
    path = str(tmp_path / pattern)
    with pytest.raises(ValueError, match=f"^{argument} must name existing files .*{re.escape(path)}"):
        text_data(text, **{argument: [path]}).setup("fit")


def test_an_empty_list_of_paths_is_refused(text):
    with pytest.raises(ValueError, match="paths must name at least one file"):
        text_data(text, paths=[]).setup("fit")


@pytest.mark.parametrize(("kwargs", "split"), [({"context": 808}, "training"), ({"context": 42}, "validation")])
def test_text_of_a_single_context_is_too_short(text, kwargs, split):
    match = rf"the {split} text has \d+ tokens with val_fraction=0.05, context=\d+ needs at least"
    with pytest.raises(ValueError, match=match):
        text_data(text, **kwargs).setup("fit")


def test_a_batch_larger_than_an_epoch_is_refused(text):
    data = text_data(text, batch_size=51)
    data.setup("fit")
    with pytest.raises(ValueError, match="batch_size must be at most 50, got 51"):
        data.train_dataloader()


def test_text_and_token_files_do_not_mix(text, tmp_path):
    np.zeros(1000, dtype=np.uint16).tofile(tmp_path / "train.bin")
    with pytest.raises(ValueError, match=r"^paths must be text files or a single \.bin file"):
        text_data(text, paths=[str(text), str(tmp_path / "train.bin")]).setup("fit")
    with pytest.raises(ValueError, match="paths and val_paths must both be text or both"):
        text_data(text, val_paths=[str(tmp_path / "train.bin")]).setup("fit")


@pytest.mark.parametrize("size", [0, 1001])
def test_a_file_that_holds_no_uint16_tokens_is_refused(tmp_path, size):
    (tmp_path / "train.bin").write_bytes(bytes(size))
    with pytest.raises(ValueError, match=rf"^paths must name a \.bin file of uint16 tokens, got .* of {size} bytes"):
        TextDataModule([str(tmp_path / "train.bin")]).setup("fit")


@pytest.mark.parametrize("dataloader", ["train_dataloader", "val_dataloader"])
def test_a_token_beyond_the_vocabulary_is_named(tmp_path, dataloader):
    np.full(4000, 300, dtype=np.uint16).tofile(tmp_path / "train.bin")
    data = TextDataModule([str(tmp_path / "train.bin")], context=16, vocab_size=300)
    data.setup("fit")
    with pytest.raises(ValueError, match="vocab_size must be greater than every token, got 300 and token 300"):
        next(iter(getattr(data, dataloader)()))
