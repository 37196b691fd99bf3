"""GPT-2 on one page, and the LightningModule that trains it with a sign-based optimizer.

The architecture is GPT-2's (Radford et al., 2019): pre-LayerNorm blocks, learned positions, tanh-approximated GELU,
output weights tied to the token embedding.
"""

import math
import time
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard

from lightning_stosign import StoSignConfig, StoSignMixin


class Shape(NamedTuple):
    """Depth, attention heads and width of a GPT."""

    layers: int
    heads: int
    width: int


SIZES = {"1m": Shape(4, 4, 128), "10m": Shape(6, 6, 384), "124m": Shape(12, 12, 768)}


class Block(nn.Module):
    """One transformer layer: causal self-attention, then a four times wider MLP."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.ln1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ln2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.out(self.attend(self.ln1(x))))
        return x + self.drop(self.down(F.gelu(self.up(self.ln2(x)), approximate="tanh")))

    def attend(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        return y.transpose(1, 2).reshape(batch, length, width)


class GPT(nn.Module):
    """A GPT-2-style language model: token indices in, next-token logits out.

    Args:
        vocab_size: Number of tokens.
        context: Longest sequence, in tokens.
        layers: Number of blocks.
        heads: Attention heads of a block; must divide `width`.
        width: Size of the residual stream.
        dropout: Probability of dropping embeddings, attention weights and residual branches, in [0, 1).
        tied: Let the output layer share the token embedding's weight.

    Raises:
        ValueError: If an argument is out of range, or in `forward` if a sequence is longer than `context`.
    """

    def __init__(
        self,
        vocab_size: int,
        context: int,
        layers: int,
        heads: int,
        width: int,
        dropout: float = 0.0,
        tied: bool = True,
    ) -> None:
        super().__init__()
        sizes = {"vocab_size": vocab_size, "context": context, "layers": layers, "heads": heads, "width": width}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if width % heads != 0:
            raise ValueError(f"heads must divide width, got heads={heads} and width={width}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.context = context
        self.tokens, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(context, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.ln = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        self.initialize(residual_std=0.02 / math.sqrt(2 * layers))

    def initialize(self, residual_std: float) -> None:
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                # 2 * layers residual branches add their variances up: GPT-2 shrinks each to keep the sum.
                adds_to_residual = name.endswith((".out", ".down"))
                nn.init.normal_(module.weight, std=residual_std if adds_to_residual else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens of shape (batch, length) to logits of shape (batch, length, vocab_size)."""
        length = tokens.shape[1]
        if length > self.context:
            raise ValueError(f"a sequence has {length} tokens, the model's context is {self.context}")
        x = self.drop(self.tokens(tokens) + self.positions(torch.arange(length, device=tokens.device)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln(x))


class GPTModule(StoSignMixin, LightningModule):
    """Trains a `GPT`; the optimizer and the schedule come from `StoSignMixin`.

    Args:
        size: "1m" (0.8 M parameters at the default vocabulary), "10m" or "124m" (GPT-2).
        vocab_size: Number of tokens the model knows; at least the data's.
        context: Longest sequence, in tokens.
        dropout: Dropout probability, in [0, 1).
        stosign: Optimizer and learning-rate schedule. Its seed also seeds the dropout masks.

    Raises:
        ValueError: If an argument is out of range, or when `fit` starts if the data does not fit the model.
    """

    def __init__(
        self,
        size: Literal["1m", "10m", "124m"] = "1m",
        vocab_size: int = 256,
        context: int = 128,
        dropout: float = 0.0,
        stosign: StoSignConfig = StoSignConfig(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
        self.save_hyperparameters()
        self.stosign = stosign
        self.dropout = dropout
        self.vocab_size, self.context = vocab_size, context
        self.model = GPT(vocab_size, context, *SIZES[size], dropout=dropout)
        self.clock, self.tokens_since_report = 0.0, 0

    def setup(self, stage: str) -> None:
        # Otherwise the embedding fails with an index error, on a GPU far from its cause.
        for name in ("vocab_size", "context"):
            ours, theirs = getattr(self, name), getattr(self.trainer.datamodule, name, None)  # type: ignore[attr-defined]
            if theirs is not None and theirs > ours:
                raise ValueError(f"the data's {name}={theirs} does not fit the model's {name}={ours}")

    def configure_model(self) -> None:
        # FSDP2, block by block: each process holds its part of every parameter, and of the optimizer's states.
        if self._trainer is None or isinstance(self.model, FSDPModule):
            return
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            assert self.device_mesh is not None
            self.trainer.precision_plugin.convert_module(self)
            for part in (*self.model.blocks, self.model):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, targets = batch
        return F.cross_entropy(self(tokens).flatten(0, 1).float(), targets.flatten())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True, sync_dist=True, batch_size=len(batch[0]))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Lightning does not checkpoint the global RNG. Masks that depend on nothing but the place in the run make a
        # resumed run equal the uninterrupted one.
        if self.dropout > 0:
            place = [self.stosign.seed, self.current_epoch, batch_idx, self.global_rank]
            torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]))

    # The throughput in the progress bar: tokens of all ranks over the time since the last report, validation excluded.

    def on_train_start(self) -> None:
        self.clock, self.tokens_since_report = time.perf_counter(), 0

    def on_train_batch_end(self, outputs: Any, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.tokens_since_report += batch[0].numel() * self.trainer.world_size
        if (batch_idx + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            now = time.perf_counter()
            self.log("tokens/s", self.tokens_since_report / (now - self.clock), prog_bar=True, logger=False)
            self.clock, self.tokens_since_report = now, 0

    def on_validation_start(self) -> None:
        self.validation_start = time.perf_counter()

    def on_validation_end(self) -> None:
        self.clock += time.perf_counter() - self.validation_start
