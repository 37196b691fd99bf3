"""A sharded FP8 run that tests start as a process of its own; Lightning launches the other ranks.

python fsdp2_script.py FOLDER --devices N --steps N [--resume PATH] [--float8_all_gather] [--distributed_checkpoint]
    [--stosign]
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_stosign import StoSignSGD
from lightning_stosign.precision import Float8Precision


class Net(LightningModule):
    """Tied weights and a layer that is padded, too."""

    def __init__(self, stosign: bool) -> None:
        super().__init__()
        self.stosign = stosign
        self.losses: list[float] = []
        self.embed: nn.Module | None = None

    def configure_model(self) -> None:
        if self.embed is not None:
            return
        torch.manual_seed(0)
        self.embed = nn.Embedding(48, 32)
        self.up, self.odd, self.down = nn.Linear(32, 64), nn.Linear(64, 50), nn.Linear(50, 32)
        self.head = nn.Linear(32, 48, bias=False)
        self.head.weight = self.embed.weight
        self.trainer.precision_plugin.convert_module(self)
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.up, mesh=mesh)
            fully_shard(self, mesh=mesh)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.odd(torch.relu(self.up(self.embed(tokens)))))
        return self.head(self.down(hidden))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        tokens, targets = batch
        loss = nn.functional.cross_entropy(self(tokens), targets)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.stosign:
            return StoSignSGD(self.parameters(), lr=1e-2, state_precision="fp8:min_numel=0")
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--devices", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--resume")
    parser.add_argument("--float8_all_gather", action="store_true")
    parser.add_argument("--distributed_checkpoint", action="store_true")
    parser.add_argument("--stosign", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)

    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(*torch.randint(0, 48, (2, 16), generator=generator))
    strategy: Any = "auto"
    if args.devices > 1 or args.distributed_checkpoint:
        strategy = ModelParallelStrategy(
            data_parallel_size=args.devices,
            tensor_parallel_size=1,
            save_distributed_checkpoint=args.distributed_checkpoint,
        )
    trainer = Trainer(
        accelerator="cpu",
        devices=args.devices,
        strategy=strategy,
        plugins=[Float8Precision(backend="torchao", pad=True, float8_all_gather=args.float8_all_gather)],
        max_steps=args.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=args.folder,
    )
    net = Net(args.stosign)
    trainer.fit(net, DataLoader(data, batch_size=16 // args.devices), ckpt_path=args.resume)
    trainer.save_checkpoint(args.folder / "end.ckpt")
    kinds = {
        name: type(parameter.to_local() if isinstance(parameter, DTensor) else parameter).__name__
        for name, parameter in net.named_parameters()
        if isinstance(parameter, DTensor)
    }
    weights = {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach()
        for name, value in net.named_parameters()
    }
    states = trainer.optimizers[0].state.values()
    dtypes = {name: state[name].dtype for state in states for name in ("exp_avg", "exp_inf") if name in state}
    torch.save(
        {"losses": net.losses, "shards": kinds, "weights": weights, "state_dtypes": dtypes},
        args.folder / f"rank{trainer.global_rank}.pt",
    )
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
