"""What workers should vote on, each method at its own best learning rate: a small model, many runs at once.

python benchmarks/vote_rates.py

Predicts the next byte of Python's standard library from the six before it: an embedding and two layers, 22,000 values,
small enough to try four learning rates with three seeds per method in a minute. The workers are rows of one tensor and
the methods are their formulas, not the package's code; GPTs are trained by benchmarks/communication.py. Results go to
vote_rates.txt; what it has is not measured again.
"""

import glob
import math
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import Tensor
from torch.func import grad, vmap

RESULTS = Path(__file__).parent / "results" / "vote_rates.txt"
SHAPES = [(256, 8), (6 * 8, 64), (64,), (64, 256), (256,)]
SIZES = [math.prod(shape) for shape in SHAPES]
IS_VECTOR = torch.cat([torch.full((size,), len(shape) < 2) for size, shape in zip(SIZES, SHAPES, strict=True)])
WORKERS, BATCH, SEEDS = 4, 64, 3


@dataclass(frozen=True)
class Method:
    """A way to step together.

    Args:
        aggregation: "none" averages gradients, as DDP does; "mean" and "majority" vote on updates.
        start: the second lowest of the learning rates tried.
        local_steps: how many steps each worker takes alone before the vote on their sum.
        noise: range of the noise in a sign, relative to the envelope.
    """

    aggregation: str
    start: float
    local_steps: int = 1
    noise: float = 1.0


METHODS = {
    "DDP float32": Method("none", 0.022),
    "votes mean": Method("mean", 0.032),
    "votes majority": Method("majority", 0.022),
    "votes mean, 4 local steps": Method("mean", 0.016, local_steps=4),
    "votes mean, 16 local steps": Method("mean", 0.011, local_steps=16),
    "votes majority, 4 local steps": Method("majority", 0.011, local_steps=4),
    "votes mean, 0.7 of the noise": Method("mean", 0.023, noise=0.7),
    "votes majority, 0.7 of the noise": Method("majority", 0.016, noise=0.7),
    "votes mean, 0.5 of the noise": Method("mean", 0.032, noise=0.5),
    "votes majority, 0.5 of the noise": Method("majority", 0.022, noise=0.5),
}


def loss(values: Tensor, context: Tensor, following: Tensor) -> Tensor:
    embedding, first, bias, second, last_bias = (
        part.view(shape) for part, shape in zip(values.split(SIZES), SHAPES, strict=True)
    )
    hidden = F.gelu(embedding[context].flatten(1) @ first + bias, approximate="tanh")
    return F.cross_entropy(hidden @ second + last_bias, following)


of_workers = vmap(vmap(grad(loss)))  # [runs, workers, values]


def examples(text: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(text) - 7, (count,), generator=generator)
    windows = text[starts[:, None] + torch.arange(7)].long()
    return windows[:, :6], windows[:, 6]


def weights(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    scales = [1.0, 48**-0.5, 0.0, 64**-0.5, 0.0]
    return torch.cat([torch.randn(n, generator=generator) * s for n, s in zip(SIZES, scales, strict=True)])


def train(method: Method, rates: list[float], steps: int, text: Tensor, held_out: Tensor) -> Tensor:
    """Return the validation losses in nats per byte, of shape [rates, seeds]."""
    votes = method.aggregation != "none"
    data = [torch.Generator().manual_seed(seed) for seed in range(SEEDS)]
    noise = torch.Generator().manual_seed(5)
    x = torch.stack([weights(seed) for seed in range(SEEDS)]).repeat(len(rates), 1)
    lr = torch.tensor(rates).repeat_interleave(SEEDS)[:, None]
    m = torch.zeros(len(x), WORKERS if votes else 1, x.shape[1])
    envelope, moved, distance = torch.zeros_like(m), torch.zeros_like(m), torch.zeros_like(lr)
    width = torch.where(IS_VECTOR, 1.0, method.noise)

    def uniform() -> Tensor:
        n = torch.empty_like(m).uniform_(-1, 1, generator=noise)
        return torch.where(IS_VECTOR, n[:, :1], n)  # biases are averaged: all workers step alike

    for step in range(steps):
        eta = lr * min(10 * (step + 1) / steps, 1 - 0.9 * step / steps)
        batches = [examples(text, WORKERS * BATCH, generator) for generator in data]
        contexts, targets = (
            torch.stack(part).repeat(len(rates), 1, *[1] * (part[0].ndim - 1)) for part in zip(*batches, strict=True)
        )
        at = x[:, None] - moved if votes else x[:, None].expand(-1, WORKERS, -1)
        g = of_workers(at, contexts.view(len(x), WORKERS, BATCH, 6), targets.view(len(x), WORKERS, BATCH))
        if not votes:
            g = g.mean(1, keepdim=True)
        g *= (1 / g.norm(dim=2, keepdim=True)).clamp(max=1)
        g = torch.where(IS_VECTOR, g.mean(1, keepdim=True), g)
        m.lerp_(g, 0.1)
        torch.maximum(envelope, m.abs(), out=envelope)
        signs = (m + envelope * width * uniform()).sign()
        moved, distance = moved + eta[:, None] * signs, distance + eta
        if (step + 1) % method.local_steps == 0:
            if method.local_steps > 1:
                signs = (moved + distance[:, None] * uniform()).sign()
            vote = signs.mean(1)
            if method.aggregation == "majority":
                coins = torch.randint(0, 2, vote.shape, generator=noise) * 2 - 1
                vote = torch.where(vote == 0, coins, vote.sign())
            x = x - torch.where(IS_VECTOR, moved.mean(1), distance * vote)
            moved, distance = torch.zeros_like(m), torch.zeros_like(lr)
    contexts, targets = examples(held_out, 8192, torch.Generator().manual_seed(9))
    return vmap(loss, in_dims=(0, None, None))(x, contexts, targets).view(len(rates), SEEDS)


def main(methods: list[str] = list(METHODS), steps: int = 300, results: Path = RESULTS) -> None:  # noqa: B006
    """Measure the validation loss of each method at four learning rates.

    Args:
        methods: which to compare.
        steps: with linear warm-up over the first tenth, then linear decay to a tenth.
        results: file that gets a line per method.
    """
    torch.set_num_threads(1)
    files = sorted(glob.glob(sysconfig.get_paths()["stdlib"] + "/*.py"))
    text = torch.frombuffer(bytearray(b"\n".join(Path(file).read_bytes() for file in files)), dtype=torch.uint8)
    train_text, held_out = text.split([cut := int(0.95 * len(text)), len(text) - cut])
    if not results.exists():
        results.write_text("$ python benchmarks/vote_rates.py\n")
    measured = results.read_text().splitlines()
    for name in methods:
        label = f"{name}, {steps} steps:"
        if any(line.startswith(label) for line in measured):
            continue
        rates = [METHODS[name].start * 2 ** (k / 2) for k in range(-1, 3)]
        losses = train(METHODS[name], rates, steps, train_text, held_out)
        best = int(losses.mean(1).argmin())
        of_rates = ", ".join(f"{rate:.2g}: {of_rate.mean():.3f}" for rate, of_rate in zip(rates, losses, strict=True))
        error = float(losses[best].std()) / SEEDS**0.5
        line = f"{label} {losses[best].mean():.3f} ± {error:.3f} at {rates[best]:.2g} ({of_rates})"
        print(line, flush=True)
        with results.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    auto_cli(main)
