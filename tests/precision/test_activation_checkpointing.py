"""Activation checkpointing changes nothing: layers that are computed again in backward compute the same."""

from typing import Any

import pytest
import torch
from float8_models import Blocks, batches, net, trainer
from lightning.pytorch import LightningModule

from lightning_stosign.precision import Float8Precision

RECIPES = [("torchao", "current"), ("torchao", "rowwise"), ("emulation", "mxfp8"), ("emulation", "nvfp4")]


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("weights_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("backend", "recipe"), RECIPES)
def test_a_checkpointed_run_is_the_plain_run_bit_for_bit(
    backend: Any, recipe: str, weights_dtype: str, mode: str
) -> None:
    runs = []
    for kind in ("plain", mode):
        model = net(model=Blocks)
        model.mode = kind
        torch.manual_seed(1)  # stochastic rounding draws in backward
        trainer(Float8Precision(recipe, backend=backend, weights_dtype=weights_dtype), steps=3).fit(model, batches(2))
        runs.append(model)
    assert runs[1].losses == runs[0].losses
    assert all(torch.equal(one, other) for one, other in zip(runs[1].parameters(), runs[0].parameters(), strict=True))


class LanguageModel(LightningModule):
    """A small GPT of transformers, with its own gradient checkpointing or without."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        self.gpt = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=32, **sizes))
        self.losses: list[float] = []
        if mode != "plain":
            self.gpt.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})
            if mode == "reentrant":
                self.gpt.enable_input_require_grads()

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        tokens = (batch[0][:, :16].abs() * 20).long().clamp(max=63)
        loss = self.gpt(input_ids=tokens, labels=tokens).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize(("backend", "recipe"), [("torchao", "current"), ("emulation", "mxfp8")])
def test_transformers_own_checkpointing_changes_nothing_either(backend: Any, recipe: str, mode: str) -> None:
    runs = [LanguageModel("plain"), LanguageModel(mode)]
    for model in runs:
        plugin = Float8Precision(recipe, backend=backend, weights_dtype="bfloat16")
        trainer(plugin, steps=2).fit(model.train(), batches(2))
    assert runs[1].losses == runs[0].losses
    assert all(torch.equal(one, other) for one, other in zip(runs[1].parameters(), runs[0].parameters(), strict=True))
