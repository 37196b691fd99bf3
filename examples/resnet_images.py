"""ResNet-18 on images
===================

ResNet-18 on images with StoSignSGD and what it is compared with (arXiv 2604.15416, Figure 5).

.. code-block:: bash

    python examples/resnet_images.py                                             # scikit-learn's digits: a minute
    python examples/resnet_images.py --data cifar-10-batches-py --width 64 --epochs 100 --batch_size 128   # CIFAR-10

CIFAR-10 is read from a folder of the "python version" of https://www.cs.toronto.edu/~kriz/cifar.html (pickles: use a
copy that you trust); nothing is downloaded. Each optimizer trains the same network from the same start on the same
batches, at the peak learning rate given for it below, with a cosine schedule. The figure shows loss and test accuracy
by epoch.
"""

import logging
import pickle
import warnings
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stosign import StoSignConfig, StoSignMixin

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METHODS = {
    "StoSignSGD": StoSignConfig(optimizer="stosign", lr=1e-3),
    "SignSGD": StoSignConfig(optimizer="signsgd", lr=3e-4),
    "AdamW": StoSignConfig(optimizer="adamw", lr=2e-3),
    "AdamW as a sign": StoSignConfig(optimizer="sign-adamw", lr=1e-3),
}


class Images(NamedTuple):
    """Images of shape [n, channels, height, width], standardised, and their classes."""

    train: TensorDataset
    test: TensorDataset
    channels: int


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet18(StoSignMixin, LightningModule):
    """ResNet-18 for small images: a 3x3 stem without pooling, then four stages of two blocks.

    Args:
        channels: of the images.
        width: channels of the first stage; 64 is the original.
        stosign: optimizer and schedule.
    """

    def __init__(self, channels: int, width: int, stosign: StoSignConfig) -> None:
        super().__init__()
        self.stosign = stosign
        layers: list[nn.Module] = [
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        inputs = width
        for stage in range(4):
            outputs = width << stage
            layers += [Block(inputs, outputs, 1 if stage == 0 else 2), Block(outputs, outputs, 1)]
            inputs = outputs
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))
        self.losses: list[float] = []
        self.accuracies: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, classes = batch
        loss = F.cross_entropy(self.net(images), classes)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, classes = batch
        scores = self.net(images)
        self.log("val_loss", F.cross_entropy(scores, classes))
        self.log("accuracy", (scores.argmax(dim=1) == classes).float().mean())

    def on_validation_epoch_end(self) -> None:
        self.accuracies.append(float(self.trainer.callback_metrics["accuracy"]))

    def on_train_epoch_end(self) -> None:
        self.losses.append(float(self.trainer.callback_metrics["train_loss"]))


def read_cifar10(folder: Path) -> Images:
    """Read CIFAR-10's python version.

    Raises:
        FileNotFoundError: a batch file is missing.
    """
    parts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"data={str(folder)!r} must be a folder of CIFAR-10's python version; no {name} in it"
            )
        batch = pickle.loads((folder / name).read_bytes(), encoding="bytes")
        parts[name] = batch[b"data"].reshape(-1, 3, 32, 32), np.array(batch[b"labels"])
    images, classes = (np.concatenate([parts[name][i] for name in parts if name != "test_batch"]) for i in range(2))
    return standardised(images, classes, *parts["test_batch"])


def read_digits() -> Images:
    """Return scikit-learn's 1,797 digits of 8 x 8 pixels, every fifth of them for the test."""
    digits = load_digits()
    images, test = digits.images[:, None], np.arange(len(digits.images)) % 5 == 0
    return standardised(images[~test], digits.target[~test], images[test], digits.target[test])


def standardised(images: np.ndarray, classes: np.ndarray, test_images: np.ndarray, test_classes: np.ndarray) -> Images:
    """Scale to mean 0 and standard deviation 1 of the training images, by channel."""
    mean, std = (reduce(images, axis=(0, 2, 3), keepdims=True) for reduce in (np.mean, np.std))
    train, test = (
        TensorDataset(torch.from_numpy((x - mean) / std).float(), torch.from_numpy(y).long())
        for x, y in ((images, classes), (test_images, test_classes))
    )
    return Images(train, test, images.shape[1])


def train(data: Images, config: StoSignConfig, width: int, epochs: int, batch_size: int) -> ResNet18:
    seed_everything(0, verbose=False)
    module = ResNet18(data.channels, width, config)
    trainer = Trainer(
        max_epochs=epochs,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    shuffled = DataLoader(
        data.train, batch_size, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(0)
    )
    trainer.fit(module, shuffled, DataLoader(data.test, batch_size=512))
    return module


def main(
    data: str | None = None,
    width: int = 8,
    epochs: int = 8,
    batch_size: int = 64,
    out: str = "runs/resnet_images",
) -> dict[str, float]:
    """Train with each optimizer, print the test accuracies, draw the figure.

    Args:
        data: folder with CIFAR-10's python version; without it, scikit-learn's digits.
        width: channels of the network's first stage.
        epochs: passes over the training images.
        batch_size: images in a batch.
        out: folder for the figure.

    Returns:
        The test accuracy of each optimizer after the last epoch.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    images = read_digits() if data is None else read_cifar10(Path(data))
    trained = {}
    print(f"{'optimizer':18}{'peak lr':>10}{'train loss':>12}{'test accuracy':>15}")
    for name, config in METHODS.items():
        trained[name] = train(images, config, width, epochs, batch_size)
        loss, accuracy = trained[name].losses[-1], trained[name].accuracies[-1]
        print(f"{name:18}{config.lr:10g}{loss:12.4f}{accuracy:15.1%}", flush=True)

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name, module in trained.items():
        axes[0].semilogy(range(1, epochs + 1), module.losses, marker=".", label=name)
        axes[1].plot(range(1, epochs + 1), module.accuracies, marker=".", label=name)
    axes[0].set(xlabel="epoch", ylabel="training loss")
    axes[1].set(xlabel="epoch", ylabel="test accuracy")
    axes[0].legend()
    figure.suptitle(f"ResNet-18 (width {width}) on {'digits' if data is None else 'CIFAR-10'}")
    figure.savefig(folder / "resnet_images.png", dpi=120)
    plt.close(figure)
    print(f"Figure: {folder / 'resnet_images.png'}")
    return {name: module.accuracies[-1] for name, module in trained.items()}


if __name__ == "__main__":
    auto_cli(main)
