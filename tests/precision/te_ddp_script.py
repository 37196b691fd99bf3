"""A run on two processes with Transformer Engine's delayed scaling, which a test starts; Lightning launches the other.

python te_ddp_script.py FOLDER
"""

import sys
from pathlib import Path
from typing import Any

import te_cpu
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stosign.precision import Float8Precision
from lightning_stosign.precision.te_backend import TransformerEngineBackend


class Net(LightningModule):
    """Sees values on rank 1 that are a hundred times larger."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
        self.seen: list[float] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        inputs = batch[0] * 100.0**self.global_rank
        self.seen.append(inputs.abs().max().item())
        return self.body(inputs).square().mean()

    def validation_step(self, batch: Any, index: int) -> None:
        self.body(1e4 * batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-7)


def main(folder: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    data = DataLoader(TensorDataset(torch.randn(96, 32, generator=generator)), batch_size=12)
    model = Net()
    trainer = Trainer(
        plugins=[Float8Precision("delayed", backend="transformer-engine")],
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data, data)
    state: dict[str, Any] = {"seen": torch.tensor(model.seen)}
    for name, layer in model.named_modules():
        for direction in ("scaling_fwd", "scaling_bwd"):
            if direction in getattr(layer, "fp8_meta", {}):
                state[f"{name}.{direction}.history"] = layer.fp8_meta[direction].amax_history
                state[f"{name}.{direction}.scale"] = layer.fp8_meta[direction].scale
    torch.save(state, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    te_cpu.start()  # changes torch: not where pytest looks for doctests
    TransformerEngineBackend.device_types = ("cpu",)
    main(Path(sys.argv[1]))
