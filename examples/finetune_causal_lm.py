"""Fine-tune a causal language model
=================================

Fine-tune a Hugging Face causal language model on instructions, with StoSignSGD and with AdamW.

.. code-block:: bash

    python examples/finetune_causal_lm.py                                  # a tiny random model on bytes: a minute
    python examples/finetune_causal_lm.py --model PATH                     # a model and its tokenizer from a folder
    python examples/finetune_causal_lm.py --config examples/finetune_7b.yaml --model PATH

The data are JSON lines with the keys `instruction` and `response`; `instructions.jsonl` has small sums and word games.
The loss counts the response only. `finetune_7b.yaml` is for a model of 7 billion parameters on one GPU of 80 GB:
bfloat16 weights, rounded stochastically by StoSignSGD, gradients and FP8 states take 6 bytes a parameter, where AdamW
in float32 takes 16. (That configuration has been checked for validity, not run.) Nothing is downloaded.
"""

import json
import logging
import warnings
from pathlib import Path
from typing import Any, Literal

import matplotlib
import torch
from jsonargparse import auto_cli
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lightning_stosign import StoSignConfig, StoSignMixin

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DATA = str(Path(__file__).with_name("instructions.jsonl"))
CONFIGS = {
    "StoSignSGD": StoSignConfig(optimizer="stosign", lr=2e-3, warmup_steps=10),
    "AdamW": StoSignConfig(optimizer="adamw", lr=4e-3, warmup_steps=10),
}
IGNORED = -100  # transformers' label for "no loss here"


class Bytes:
    """The tokenizer of the tiny model: bytes, and a token that ends a text."""

    eos_token_id = 256

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return list(text.encode())


def load(model: str | None, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return (model, tokenizer) from a folder, or a tiny random Llama on bytes."""
    if model is not None:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        return AutoModelForCausalLM.from_pretrained(model, local_files_only=True, dtype=dtype), tokenizer
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=Bytes.eos_token_id,
    )
    return LlamaForCausalLM(config).to(dtype), Bytes()


def read_examples(path: str, tokenizer: Any, max_length: int) -> list[tuple[list[int], list[int]]]:
    """Return (tokens, labels) of each line, cut to max_length tokens.

    Raises:
        ValueError: a line is not a JSON object with the two keys.
    """
    examples = []
    for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
        record = json.loads(line)
        if not isinstance(record, dict) or not {"instruction", "response"} <= record.keys():
            raise ValueError(f"data={path!r}, line {number}: must have the keys 'instruction' and 'response'")
        prompt = tokenizer.encode(f"### Instruction:\n{record['instruction']}\n### Response:\n")
        response = [*tokenizer.encode(record["response"], add_special_tokens=False), tokenizer.eos_token_id]
        labels = [IGNORED] * len(prompt) + response
        examples.append(((prompt + response)[:max_length], labels[:max_length]))
    return examples


def collate(examples: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """Pad a batch to its longest example."""
    tokens, labels = ([torch.tensor(example[i]) for example in examples] for i in range(2))
    mask = pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True)
    return {
        "input_ids": pad_sequence(tokens, batch_first=True),
        "attention_mask": mask,
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


class Finetune(StoSignMixin, LightningModule):
    """Trains a causal language model on the responses."""

    def __init__(self, model: Any, stosign: StoSignConfig) -> None:
        super().__init__()
        self.model, self.stosign = model, stosign
        self.losses: list[float] = []
        self.val_losses: list[tuple[int, float]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        output = self.model(**batch)
        labels = batch["labels"][:, 1:]
        hit = (output.logits[:, :-1].argmax(dim=-1) == labels) | (labels == IGNORED)
        self.log_dict({"val_loss": output.loss, "val_accuracy": hit.all(dim=1).float().mean()}, batch_size=len(labels))

    def on_validation_epoch_end(self) -> None:
        self.val_losses.append((self.global_step, float(self.trainer.callback_metrics["val_loss"])))


def main(
    model: str | None = None,
    data: str = DATA,
    configs: dict[str, StoSignConfig] = CONFIGS,
    epochs: int = 6,
    batch_size: int = 8,
    accumulate: int = 1,
    max_length: int = 256,
    precision: Literal["32-true", "bf16-true"] = "32-true",
    gradient_checkpointing: bool = False,
    out: str = "runs/finetune",
) -> dict[str, float]:
    """Fine-tune with each optimizer, print the validation losses, draw the figure.

    Args:
        model: folder with a Hugging Face causal language model and its tokenizer; without it, a tiny random one.
        data: JSON lines with `instruction` and `response`; every tenth is kept for validation.
        configs: optimizer and schedule of each run, by its title.
        epochs: passes over the data.
        batch_size: examples in a batch.
        accumulate: batches in an optimizer step.
        max_length: tokens that an example is cut to.
        precision: of the weights, and of all computation.
        gradient_checkpointing: compute activations anew in the backward pass instead of storing them.
        out: folder for the figure.

    Returns:
        The last validation loss of each run.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    trained = {}
    print(f"{'optimizer':14}{'peak lr':>10}{'val loss':>10}{'responses right':>17}")
    for title, config in configs.items():
        seed_everything(0, verbose=False)
        network, tokenizer = load(model, torch.bfloat16 if precision == "bf16-true" else torch.float32)
        if gradient_checkpointing:
            network.gradient_checkpointing_enable()
        network.train()
        examples = read_examples(data, tokenizer, max_length)
        train, val = [e for i, e in enumerate(examples) if i % 10], examples[::10]
        trainer = Trainer(
            max_epochs=epochs,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=1.0,
            precision=precision,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = Finetune(network, config)
        shuffle = torch.Generator().manual_seed(0)
        trainer.fit(
            module,
            DataLoader(train, batch_size, shuffle=True, generator=shuffle, collate_fn=collate),  # type: ignore[arg-type]
            DataLoader(val, batch_size, collate_fn=collate),  # type: ignore[arg-type]
        )
        trained[title] = module
        accuracy = float(trainer.callback_metrics["val_accuracy"])
        print(f"{title:14}{config.lr:10g}{module.val_losses[-1][1]:10.4f}{accuracy:17.0%}", flush=True)

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for title, module in trained.items():
        (line,) = axis.plot(*zip(*module.val_losses, strict=True), marker="o", label=f"{title}: validation")
        steps = [(i + 1) / accumulate for i in range(len(module.losses))]
        axis.plot(steps, module.losses, color=line.get_color(), lw=0.5, alpha=0.5)
    axis.set(xlabel="step", ylabel="loss of the responses", yscale="log")
    axis.legend()
    figure.savefig(folder / "finetune_causal_lm.png", dpi=120)
    plt.close(figure)
    print(f"Figure: {folder / 'finetune_causal_lm.png'}")
    return {title: module.val_losses[-1][1] for title, module in trained.items()}


if __name__ == "__main__":
    auto_cli(main)
