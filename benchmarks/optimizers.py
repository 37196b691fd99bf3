"""What the optimizer benchmarks compare, and on which parameters."""

import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from importlib.util import find_spec

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_stosign import SignSGD, StoSignSGD

Make = Callable[[list[nn.Parameter]], Optimizer]

BASELINE = "AdamW, fused"


def _torchao(name: str) -> Make:
    def make(params: list[nn.Parameter]) -> Optimizer:
        import torchao.optim

        return getattr(torchao.optim, name)(params)

    return make


def _pytorch_optimizer(name: str) -> Make:
    def make(params: list[nn.Parameter]) -> Optimizer:
        import pytorch_optimizer

        return getattr(pytorch_optimizer, name)(params)

    return make


def _bitsandbytes(name: str) -> Make:
    def make(params: list[nn.Parameter]) -> Optimizer:
        import bitsandbytes

        return getattr(bitsandbytes.optim, name)(params)

    return make


def _checked(params: list[nn.Parameter]) -> Optimizer:
    optimizer = AdamW(params, fused=True)

    def check(*_: object) -> None:
        if not all(total.isfinite() for total in [param.grad.sum() for param in params if param.grad is not None]):
            raise RuntimeError("a gradient is not finite")

    optimizer.register_step_pre_hook(check)
    return optimizer


OPTIMIZERS: dict[str, Make] = {
    BASELINE: lambda params: AdamW(params, fused=True),
    "AdamW, fused, checked": _checked,
    "AdamW, foreach": lambda params: AdamW(params, foreach=True),
    "SGD momentum, fused": lambda params: SGD(params, 1e-3, momentum=0.9, fused=True),
    "torchao AdamWFp8": _torchao("AdamWFp8"),
    "torchao AdamW8bit": _torchao("AdamW8bit"),
    "pytorch_optimizer Lion": _pytorch_optimizer("Lion"),
    "pytorch_optimizer SignSGD": _pytorch_optimizer("SignSGD"),
    "StoSignSGD, fused": lambda params: StoSignSGD(params, fused=True),
    "StoSignSGD, fused, bfloat16": lambda params: StoSignSGD(params, fused=True, state_precision="bfloat16"),
    "StoSignSGD, fused, fp8-raw": lambda params: StoSignSGD(params, fused=True, state_precision="fp8-raw"),
    "StoSignSGD, fused, fp8": lambda params: StoSignSGD(params, fused=True, state_precision="fp8"),
    "StoSignSGD, fused, fp8-block": lambda params: StoSignSGD(params, fused=True, state_precision="fp8-block"),
    "StoSignSGD, eager": lambda params: StoSignSGD(params, fused=False),
    "StoSignSGD, eager, bfloat16": lambda params: StoSignSGD(params, fused=False, state_precision="bfloat16"),
    "StoSignSGD, eager, fp8": lambda params: StoSignSGD(params, fused=False, state_precision="fp8"),
    "StoSignSGD, eager, fp8-block": lambda params: StoSignSGD(params, fused=False, state_precision="fp8-block"),
    "SignSGD, fused": lambda params: SignSGD(params, fused=True),
    "SignSGD, fused, fp8": lambda params: SignSGD(params, fused=True, state_precision="fp8"),
    "SignSGD, eager": lambda params: SignSGD(params, fused=False),
}
if find_spec("bitsandbytes") is not None:  # large, and no dependency: pip install bitsandbytes
    OPTIMIZERS |= {f"bitsandbytes {name}": _bitsandbytes(name) for name in ("AdamW8bit", "Lion8bit")}


def choose(patterns: Sequence[str]) -> dict[str, Make]:
    """Return the optimizers whose name matches one of the shell-style patterns.

    Raises:
        ValueError: none does.
    """
    chosen = {name: make for name, make in OPTIMIZERS.items() if any(fnmatch(name, pattern) for pattern in patterns)}
    if not chosen:
        raise ValueError(f"optimizers={list(patterns)} match none; accepted: {', '.join(OPTIMIZERS)}, or patterns")
    return chosen


def gpt2_shapes(layers: int = 12, width: int = 768, vocabulary: int = 50257) -> list[tuple[int, ...]]:
    """Return the shapes of GPT-2's parameters: for 12 layers of width 768, 148 tensors with 124 M values."""
    norm = [(width,), (width,)]
    block = [*norm, (3 * width, width), (3 * width,), (width, width), (width,)]
    block += [*norm, (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(vocabulary, width), (1024, width), *block * layers, *norm]


def parameters(shapes: Sequence[tuple[int, ...]], device: str = "cpu") -> list[nn.Parameter]:
    """Return parameters of these shapes, with gradients."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    return params


def numel(params: Sequence[nn.Parameter]) -> int:
    return sum(param.numel() for param in params)


def seconds(action: Callable[[], object], device: str = "cpu") -> float:
    """Return how long an action takes, until the device has done it."""
    started = time.perf_counter()
    action()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started
