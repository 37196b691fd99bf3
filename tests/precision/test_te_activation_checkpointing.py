"""Activation checkpointing computes layers again in backward: in FP8, with the scales of forward, and unnoticed."""

from typing import Any

import pytest
import te_cpu
import torch
from float8_models import batches, net, te_plugin, trainer
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:Float8Precision leaves these layers")


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


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize(
    ("recipe", "capability"),
    [
        ("current", te_cpu.H100),
        ("delayed", te_cpu.H100),
        ({"name": "delayed", "amax_compute_algo": "most_recent"}, te_cpu.H100),
        ("block", te_cpu.H100),
        ("mxfp8", te_cpu.B200),
    ],
)
def test_a_checkpointed_run_is_the_plain_run_bit_for_bit(
    te: Any, on_gpu: Any, recipe: Any, capability: tuple[int, int], mode: str
) -> None:
    on_gpu(capability)
    runs = []
    for kind in ("plain", mode):
        model = net(model=Blocks)
        model.mode = kind
        plugin = te_plugin(recipe=recipe, weights_dtype="bfloat16", exclude=["into"])
        trainer(plugin, steps=6, accumulate_grad_batches=2).fit(model, batches(2))
        runs.append(model)
    plain, checkpointed = runs
    assert checkpointed.losses == plain.losses
    assert len(plain.losses) == 12
    for (name, one), other in zip(checkpointed.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other), name
    for one, other in zip(checkpointed.modules(), plain.modules(), strict=True):
        for direction in ("scaling_fwd", "scaling_bwd"):
            if (meta := getattr(one, "fp8_meta", {}).get(direction)) is not None and hasattr(meta, "amax_history"):
                assert torch.equal(meta.scale, other.fp8_meta[direction].scale)
                assert torch.equal(meta.amax_history, other.fp8_meta[direction].amax_history)
