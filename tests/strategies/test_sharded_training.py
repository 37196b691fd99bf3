"""The example's GPT under FSDP2: sharded over processes, the same batches give the same training."""

import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor
from workers import run_workers

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from gpt import GPT, GPTModule, Shape
from text_data import TextDataModule

from lightning_stosign import OptimizerStateMonitor, StateCollapseGuard, StoSignConfig

GLOBAL_BATCH, STEPS = 8, 6


class Records(GPTModule):
    """A tiny GPT that records its losses."""

    def __init__(self, stosign):
        super().__init__(context=16, stosign=stosign)
        torch.manual_seed(0)
        self.model = GPT(256, 16, *Shape(layers=2, heads=2, width=32))
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss


def fit(rank, workers, folder, optimizer):
    net = Records(StoSignConfig(optimizer, lr=1e-3, **OPTIMIZERS[optimizer]))
    trainer = Trainer(
        accelerator="cpu",
        devices=workers,
        strategy=ModelParallelStrategy(data_parallel_size=workers, tensor_parallel_size=1),
        callbacks=[OptimizerStateMonitor(every_n_steps=2), StateCollapseGuard(action="raise")],
        max_steps=STEPS,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=CSVLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(net, TextDataModule(context=16, batch_size=GLOBAL_BATCH // workers))
    sharded = all(isinstance(param, DTensor) for param in net.model.parameters())
    weights = {name: param.full_tensor().detach() for name, param in net.model.named_parameters()}
    return {"weights": weights, "losses": net.losses, "sharded": sharded}


OPTIMIZERS = {"adamw": {}, "stosign": {}, "alias": {"schedule": "constant"}}  # ALIAS finds its own rate


@pytest.fixture(
    scope="module", params=["stosign", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adamw", "alias"))]
)
def on_one_process(request, tmp_path_factory):
    return request.param, run_workers(fit, 1, str(tmp_path_factory.mktemp("alone")), request.param)[0]


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_same_global_batch_gives_the_same_training_on_any_number_of_processes(on_one_process, tmp_path, workers):
    optimizer, alone = on_one_process
    results = run_workers(fit, workers, str(tmp_path), optimizer)
    assert all(result["sharded"] for result in results)
    mean_losses = torch.tensor([result["losses"] for result in results]).mean(0)
    assert torch.allclose(mean_losses, torch.tensor(alone["losses"]), atol=2e-3)
    for name, weight in alone["weights"].items():
        assert torch.equal(results[0]["weights"][name], results[-1]["weights"][name])
        # Sums over processes round differently, which only values without any real gradient turn into another step.
        moved_alike = torch.isclose(results[0]["weights"][name], weight, atol=1e-5)
        if name.endswith("qkv.bias"):  # The keys' has no gradient at all: it shifts all scores of a query alike.
            moved_alike = moved_alike.view(3, -1)[[0, 2]]
        assert moved_alike.float().mean() > 0.99, name
