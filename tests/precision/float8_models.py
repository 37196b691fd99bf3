"""Small models and Trainers shared by the tests of Float8Precision."""

from typing import Any
from unittest import mock

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from torchao.float8.float8_linear import Float8Linear

from lightning_stosign.precision import Float8Precision

BATCH = 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Net(LightningModule):
    """32 -> 64 -> 64 -> 16 -> 3: the last layer is too narrow for FP8."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.norm = nn.LayerNorm(64)
        self.middle = nn.Linear(64, 64, bias=False)
        self.last = nn.Linear(64, 16)
        self.head = nn.Linear(16, 3)
        self.losses: list[float] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm(self.first(inputs)))
        return self.head(torch.relu(self.last(torch.relu(self.middle(hidden)))))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def test_step(self, batch: Any, index: int) -> None:
        self.log("test_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Wide(Net):
    """With sizes that every recipe takes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(32, 128), nn.Linear(128, 128)
        self.norm, self.last, self.head = nn.LayerNorm(128), nn.Linear(128, 16), nn.Linear(16, 3)


class Blocks(LightningModule):
    """Three blocks between two layers that are not checkpointed."""

    mode: str = "plain"

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(32, 128)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128)) for _ in range(3)
        )
        self.out = nn.Linear(128, 128)
        self.losses: list[float] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.into(inputs)
        for block in self.blocks:
            if self.mode == "plain":
                hidden = hidden + block(hidden)
            else:
                hidden = hidden + checkpoint(block, hidden, use_reentrant=self.mode == "reentrant")
        return self.out(hidden)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = (self(batch[0]) - batch[0].repeat(1, 4)).float().square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def net(seed: int = 0, model: type[LightningModule] = Net) -> Any:
    torch.manual_seed(seed)
    return model()


def batches(count: int = 2) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count * BATCH, 32, generator=generator)
    targets = torch.stack([inputs[:, :8].sum(1), inputs[:, 8].abs(), inputs[:, 9]], 1) / 3
    return DataLoader(TensorDataset(inputs, targets), batch_size=BATCH)


def trainer(plugin: Any = None, steps: int = 2, **arguments: Any) -> Trainer:
    return Trainer(
        **{
            "plugins": [] if plugin is None else [plugin],
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": steps,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **arguments,
        }
    )


def torchao_plugin(**arguments: Any) -> Float8Precision:
    return Float8Precision(backend="torchao", **arguments)


def te_plugin(**arguments: Any) -> Float8Precision:
    return Float8Precision(backend="transformer-engine", **arguments)


class Wrapped(LightningModule):
    """A LightningModule around any modules."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


class ScaledMMs:
    """Records the operands of every FP8 matrix product that runs within."""

    def __init__(self) -> None:
        self.operands: list[tuple[torch.dtype, torch.dtype]] = []
        self.inner_sizes: list[int] = []
        self.shapes: list[tuple[torch.Size, torch.Size]] = []

    def __enter__(self) -> "ScaledMMs":
        real = torch._scaled_mm

        def recording(a: torch.Tensor, b: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
            self.operands.append((a.dtype, b.dtype))
            self.inner_sizes.append(a.shape[1])
            self.shapes.append((a.shape, b.shape))
            return real(a, b, *rest, **options)

        self._patch = mock.patch.object(torch, "_scaled_mm", recording)
        self._patch.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._patch.stop()


def converted(module: nn.Module, **arguments: Any) -> nn.Module:
    return torchao_plugin(**arguments).convert_module(module)


def linear_names(module: nn.Module) -> set[str]:
    return {name for name, child in module.named_modules() if isinstance(child, Float8Linear)}
