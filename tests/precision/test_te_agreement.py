"""Transformer Engine, the emulation and torchao compute the same numbers, where they have the same recipe."""

import copy
from typing import Any

import pytest
import te_cpu
import torch
from float8_models import Wrapped
from torch import nn

from lightning_stosign.precision import Float8Precision


def results(
    backend: Any, recipe: str, layer: nn.Linear, inputs: torch.Tensor, grad: torch.Tensor
) -> list[torch.Tensor]:
    """The output and the gradients of input, weight and bias."""
    plugin = Float8Precision(recipe, backend=backend, weights_dtype="bfloat16")
    model = Wrapped(layer=copy.deepcopy(layer))
    plugin.convert_module(model)
    leaf = inputs.clone().requires_grad_()
    with plugin.forward_context():
        output = model.layer(leaf)
    output.backward(grad)
    gradients = [parameter.grad for parameter in model.layer.parameters()]
    return [output.detach(), leaf.grad, *gradients]


def random_example(tokens: int, seed: int) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """A layer, inputs and a gradient, the rows and columns of which differ in size."""
    torch.manual_seed(seed)
    layer = nn.Linear(128, 256)
    inputs = torch.randn(tokens, 128) * 10 ** torch.randn(tokens, 1) * 10 ** torch.randn(128)
    return layer.bfloat16(), inputs.bfloat16(), (1e-3 * torch.randn(tokens, 256)).bfloat16()


def example(tokens: int, seed: int) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """A layer, inputs and a gradient, whose products are sums that float32 holds exactly: their order does not matter.

    All magnitudes lie between 1/2 and 7/8, times a power of two that differs between rows and between columns. E4M3 and
    E5M2 end at 7/8 of a power of two, so that the scales of whole tensors are powers of two as well.
    """
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        size = (0.5 + 0.5 * torch.rand(shape, generator=generator)).clamp(max=7 / 8)
        return size * torch.randint(0, 2, shape, generator=generator).mul(2).sub(1)

    def powers(*shape: int) -> torch.Tensor:
        return 2.0 ** torch.randint(0, 3, shape, generator=generator)

    layer = nn.Linear(128, 256)
    with torch.no_grad():
        layer.weight.copy_(values(256, 128) / 16)
        layer.bias.copy_(values(256))
    inputs = values(tokens, 128) * powers(tokens, 1) * powers(128)
    grad = 2**-10 * values(tokens, 256) * powers(tokens, 1)
    return layer.bfloat16(), inputs.bfloat16(), grad.bfloat16()


@pytest.mark.parametrize("tokens", [128, 37])
@pytest.mark.parametrize(("recipe", "capability"), [("block", te_cpu.H100), ("mxfp8", te_cpu.B200)])
def test_the_emulation_has_te_s_bits(
    te: Any, on_gpu: Any, recipe: str, capability: tuple[int, int], tokens: int
) -> None:
    on_gpu(capability)
    for seed in range(5):
        case = example(tokens, seed)
        ours, truth = results("emulation", recipe, *case), results("transformer-engine", recipe, *case)
        for name, one, other in zip(("output", "dx", "dw", "db"), ours, truth, strict=True):
            assert torch.equal(one, other), f"{name}: {(one != other).float().mean():.1%} of the values differ"


@pytest.mark.parametrize("tokens", [128, 37])
@pytest.mark.parametrize("capability", [te_cpu.H100, te_cpu.B200])
def test_torchao_has_te_s_bits_in_backward(te: Any, on_gpu: Any, capability: tuple[int, int], tokens: int) -> None:
    """In forward, torchao rounds once more, before it adds the bias."""
    on_gpu(capability)
    for seed in range(5):
        layer, inputs, grad = example(tokens, seed)
        ours, truth = (results(name, "current", layer, inputs, grad) for name in ("torchao", "transformer-engine"))
        for name, one, other in list(zip(("output", "dx", "dw", "db"), ours, truth, strict=True))[1:]:
            assert torch.equal(one, other), f"{name}: {(one != other).float().mean():.1%} of the values differ"
        layer.bias = None
        ours, truth = (results(name, "current", layer, inputs, grad) for name in ("torchao", "transformer-engine"))
        assert torch.equal(ours[0], truth[0])


@pytest.mark.parametrize(
    ("other", "recipe", "capability"),
    [("emulation", "block", te_cpu.H100), ("emulation", "mxfp8", te_cpu.B200), ("torchao", "current", te_cpu.H100)],
)
def test_on_other_values_only_the_order_of_sums_differs(
    te: Any, on_gpu: Any, other: str, recipe: str, capability: tuple[int, int]
) -> None:
    on_gpu(capability)
    for seed in range(5):
        case = random_example(128, seed)
        ours, truth = results(other, recipe, *case), results("transformer-engine", recipe, *case)
        for one, exact in list(zip(ours, truth, strict=True))[1 if other == "torchao" else 0 :]:
            torch.testing.assert_close(one, exact, rtol=2**-7, atol=1e-5 * exact.abs().max().item())
            assert (one == exact).float().mean() > 0.99
