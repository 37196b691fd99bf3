"""One training run of the study: from its settings to what is reported of it."""

import logging
import math
import shutil
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning import seed_everything
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

from lightning_stosign import Float8Precision, OptimizerStateMonitor, StateCollapseGuard, StoSignConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from finetune_causal_lm import DATA, Finetune, collate, load, read_examples
from gpt import GPTModule
from resnet_images import ResNet18, read_digits
from text_data import TextDataModule

# What StoSignConfig builds each from; betas are its defaults where none are given.
METHODS: dict[str, dict[str, Any]] = {
    "AdamW": {"optimizer": "adamw"},
    "SignSGD": {"optimizer": "signsgd"},
    "Lion": {"optimizer": "lion"},
    "Muon": {"optimizer": "muon"},
    "MuonSign": {"optimizer": "muon-sign"},
    "StoSignSGD": {"optimizer": "stosign"},
    "StoSignSGDv2": {"optimizer": "stosign", "betas": (0.9, 0.99)},
    "IE-StoSignSGD": {"optimizer": "stosign", "stochastic": False},
    "ALIAS": {"optimizer": "alias", "schedule": "constant"},
    "SignConverted(AdamW)": {"optimizer": "sign-adamw"},
    "SignConverted(AdaMax)": {"optimizer": "sign-adamax"},
    # ablations
    "StoSignSGD, no momentum": {"optimizer": "stosign", "betas": (0.0, 1.0)},
    "StoSignSGD, beta1 = 0.95": {"optimizer": "stosign", "betas": (0.95, 1.0)},
    "StoSignSGD, beta2 = 0.999": {"optimizer": "stosign", "betas": (0.9, 0.999)},
    "StoSignSGD, beta2 = 0.95": {"optimizer": "stosign", "betas": (0.9, 0.95)},
    "StoSignSGD, m_1 = g_1": {"optimizer": "stosign"},
    "StoSignSGD, cosine to 0": {"optimizer": "stosign", "min_lr_ratio": 0.0},
    "MuonSign, rest at half the rate": {"optimizer": "muon-sign"},
    "MuonSign, rest at twice the rate": {"optimizer": "muon-sign"},
}
REST = {"MuonSign, rest at half the rate": 0.5, "MuonSign, rest at twice the rate": 2.0}

STDLIB = "stdlib"

CONTEXT, SEQUENCES = 128, 8
TOKENS_A_STEP = CONTEXT * SEQUENCES

GPT = "gpt-"
IMAGES, FINETUNE = "resnet18-digits", "llama-instructions"

LOOKS = 8  # along a run: points of a curve
VALIDATION_BATCHES, LOOK_BATCHES = 64, 16

_TAGS = ("zero_fraction", "dead_fraction", "exploding_fraction", "noise_rms", "update_rms", "abs_max")


@dataclass(frozen=True)
class Run:
    """The settings of a run: all that its outcome depends on, besides versions.

    Args:
        method: a key of ``METHODS``.
        lr: peak learning rate; of ALIAS a factor on the step size that it finds.
        states: a ``StatePrecision`` name; of optimizers other than this package's the states are emulated.
        gemm: ``"float32"``, or the recipe of ``Float8Precision``.
        seed: of the initial weights, the data and the noise.
        steps: optimizer steps: linear warm-up over a tenth, then cosine to a tenth of ``lr``.
        task: ``"gpt-1m"``, ``"gpt-10m"``, ``"resnet18-digits"`` or ``"llama-instructions"``: the examples' models.
        corpus: of a GPT: ``"stdlib"``, or the path of a text file.
    """

    method: str
    lr: float
    states: str = "float32"
    gemm: str = "float32"
    seed: int = 0
    steps: int = 400
    task: str = "gpt-1m"
    corpus: str = STDLIB

    @property
    def name(self) -> str:
        """A name that is a file name, too."""
        text = f"{self.method} {self.lr:.4g} {self.states} {self.gemm} s{self.seed} {self.steps} {self.task}"
        return "".join(c if c.isalnum() or c in ".=-" else "_" for c in f"{text} {Path(self.corpus).stem}")


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Args:
        val_loss: nats (a byte of text) after the last step; NaN if training diverged.
        diverged_at: the step of the first loss that is not finite.
        collapsed_at: the step at which ``StateCollapseGuard`` saw a collapse.
        report: what the guard said about it: the table after the paper's Table 12.
        seconds: wall time of the training.
        curves: tag -> step -> value.
        histograms: state -> bucket's upper limit of log10 of its magnitude -> count, at the end.
    """

    val_loss: float
    diverged_at: int | None
    collapsed_at: int | None
    report: str
    seconds: float
    curves: dict[str, dict[int, float]] = field(default_factory=dict)
    histograms: dict[str, dict[float, float]] = field(default_factory=dict)


class StopWhenNotFinite(Callback):
    """Ends training in order at the first loss that is not finite."""

    def __init__(self) -> None:
        self.step: int | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.step is None and not math.isfinite(outputs["loss"].item()):
            self.step, trainer.should_stop = trainer.global_step, True


class FirstMomentum(Callback):
    """m_1 = g_1, as the paper annotates its SignSGD: a first step without momentum."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["betas"] = (0.0 if trainer.global_step == 0 else 0.9, 1.0)


class RateOfTheRest(Callback):
    """Gives what is not Muon's a learning rate of its own.

    Args:
        factor: how many times Muon's it is.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:  # a checkpoint has it
            for group in trainer.optimizers[0].param_groups:
                if not group["use_muon"]:
                    group["lr"] *= self.factor
                    group["initial_lr"] *= self.factor


class Loaders(LightningDataModule):
    """Two loaders as a data module."""

    def __init__(self, train: DataLoader, val: DataLoader) -> None:
        super().__init__()
        self._train, self._val = train, val

    def train_dataloader(self) -> DataLoader:
        return self._train

    def val_dataloader(self) -> DataLoader:
        return self._val


def prepare(run: Run, config: StoSignConfig) -> tuple[LightningModule, LightningDataModule]:
    """Return the task's model and data."""
    shuffle = torch.Generator().manual_seed(run.seed)
    if run.task == IMAGES:
        images = read_digits()
        return ResNet18(images.channels, 8, config), Loaders(
            DataLoader(images.train, 64, shuffle=True, drop_last=True, generator=shuffle),
            DataLoader(images.test, 512),
        )
    if run.task == FINETUNE:
        model, tokenizer = load(None, torch.float32)
        examples = read_examples(DATA, tokenizer, max_length=256)
        train, val = [e for i, e in enumerate(examples) if i % 10], examples[::10]
        return Finetune(model.train(), config), Loaders(
            DataLoader(train, 8, shuffle=True, generator=shuffle, collate_fn=collate),  # type: ignore[arg-type]
            DataLoader(val, 8, collate_fn=collate),  # type: ignore[arg-type]
        )
    size = run.task.removeprefix(GPT)
    paths = None if run.corpus == STDLIB else [run.corpus]
    return GPTModule(size=size, context=CONTEXT, stosign=config), TextDataModule(  # type: ignore[arg-type]
        paths=paths, context=CONTEXT, batch_size=SEQUENCES, seed=run.seed
    )


def train(run: Run, folder: Path, compiled: bool) -> Result:
    """Train, from the run's last checkpoint in ``folder`` where an interruption has left one.

    Args:
        run: the settings.
        folder: for checkpoints and logs; removed at the end.
        compiled: whether ``torch.compile`` takes an FP8 model: worth its half minute where many runs share a process.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    started = time.perf_counter()
    seed_everything(run.seed, verbose=False)
    options = {"schedule": "cosine", **METHODS[run.method]}
    config = StoSignConfig(
        lr=run.lr,
        warmup_steps=run.steps // 10,
        state_precision=None if run.states == "float32" else run.states,
        seed=run.seed,
        on_nonfinite="skip",  # so that every method diverges by the same rule: its loss
        **options,
    )
    module, data = prepare(run, config)
    if compiled and run.gemm != "float32":  # which is no faster for it
        assert isinstance(module.model, nn.Module)
        module.model.compile(dynamic=False)
    place, look = folder / run.name, max(1, run.steps // LOOKS)
    stop, guard = StopWhenNotFinite(), StateCollapseGuard(every_n_steps=max(1, look // 5))
    callbacks = [stop, guard, OptimizerStateMonitor(every_n_steps=look, per_layer=False, forecast=())]
    endless = run.task.startswith(GPT)  # its data have no epochs to speak of, and go on where they were
    if endless:
        callbacks.append(ModelCheckpoint(place, save_last=True, save_top_k=0, every_n_train_steps=look))
    if run.method.endswith("m_1 = g_1"):
        callbacks.append(FirstMomentum())
    if run.method in REST:
        callbacks.append(RateOfTheRest(REST[run.method]))
    trainer = Trainer(
        max_steps=run.steps,
        gradient_clip_val=1.0,
        plugins=[] if run.gemm == "float32" else [Float8Precision(run.gemm, exclude=["model.head"])],
        callbacks=callbacks,
        logger=TensorBoardLogger(place, name="", version=""),
        log_every_n_steps=look,
        val_check_interval=look if endless else None,
        check_val_every_n_epoch=None if endless else 1,
        limit_val_batches=LOOK_BATCHES,
        num_sanity_val_steps=0,
        enable_checkpointing=endless,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        devices=1,
    )
    last = place / "last.ckpt"
    trainer.fit(module, datamodule=data, ckpt_path=str(last) if last.exists() else None)
    loss = math.nan
    if stop.step is None:
        trainer.limit_val_batches = VALIDATION_BATCHES
        trainer.validate(module, datamodule=data, verbose=False)
        loss = trainer.callback_metrics["val_loss"].item()
    curves, histograms = _read_events(place)
    shutil.rmtree(place)
    return Result(
        val_loss=loss,
        diverged_at=stop.step,
        collapsed_at=min(guard.collapsed_at.values(), default=None),
        report=guard.report or "",
        seconds=time.perf_counter() - started,
        curves=curves,
        histograms=histograms,
    )


def _read_events(folder: Path) -> tuple[dict[str, dict[int, float]], dict[str, dict[float, float]]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    tags = {
        tag.removeprefix("optimizer_state/"): tag
        for tag in events.Tags()["scalars"]
        if tag in ("train_loss", "val_loss", "accuracy", "val_accuracy")
        or tag.removeprefix("optimizer_state/").startswith(_TAGS)
    }
    curves = {name: {e.step: e.value for e in events.Scalars(tag)} for name, tag in tags.items()}
    histograms = {}
    for tag in events.Tags()["histograms"]:
        value = events.Histograms(tag)[-1].histogram_value
        buckets = zip(value.bucket_limit, value.bucket, strict=True)
        histograms[tag.rpartition("/")[2]] = {limit: count for limit, count in buckets if count > 0}
    return curves, histograms


def in_worker(run: Run, folder: Path, compiled: bool) -> Result:
    """Train in a worker process, on one thread: as many runs side by side as there are cores."""
    torch.set_num_threads(1)
    return train(run, folder, compiled)
