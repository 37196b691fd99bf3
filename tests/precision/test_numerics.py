"""A converted layer against float64 products of exactly rounded operands, for each recipe that the CPU runs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from block_reference import E2M1, E4M3, E5M2, in_blocks, scaled
from float8_models import Wrapped
from torch import nn

from lightning_stosign.precision import Float8Precision
from lightning_stosign.precision.block_formats import MXFP4, NVFP4, BlockFormat, rotate_blocks, round_blocks

TOKENS, IN, OUT = 64, 128, 256

Operands = tuple[np.ndarray, np.ndarray]


def tensorwise(x: np.ndarray, w: np.ndarray, g: np.ndarray) -> tuple[Operands, Operands, Operands]:
    x, w, g = scaled(E4M3, x), scaled(E4M3, w), scaled(E5M2, g)
    return (x, w.T), (g, w), (g.T, x)


def rowwise(x: np.ndarray, w: np.ndarray, g: np.ndarray) -> tuple[Operands, Operands, Operands]:
    def along(values: np.ndarray, axis: int) -> np.ndarray:
        return scaled(E4M3, values, axis, power_of_two=True)

    return (along(x, 1), along(w, 1).T), (along(g, 1), along(w, 0)), (along(g, 0).T, along(x, 0))


def blockwise(numbers: np.ndarray, size: int, square: bool, nv: bool = False) -> Callable[..., Any]:
    def rows(values: np.ndarray) -> np.ndarray:
        return in_blocks(numbers, values, size, nv=nv)

    def operands(x: np.ndarray, w: np.ndarray, g: np.ndarray) -> tuple[Operands, Operands, Operands]:
        in_order = in_blocks(numbers, w, size, square=square, nv=nv)
        transposed = in_blocks(numbers, w.T, size, square=square, nv=nv).T
        return (rows(x), in_order.T), (rows(g), transposed), (rows(g.T), rows(x.T).T)

    return operands


def training_in_four_bits(form: BlockFormat, square: bool) -> Callable[..., Any]:
    """With rotation and stochastic rounding, whose noise only the package knows."""

    def rounded(values: np.ndarray, rotate: bool = False, **options: bool) -> np.ndarray:
        tensor = torch.from_numpy(np.ascontiguousarray(values)).float()
        tensor = rotate_blocks(tensor, form.block_size) if rotate else tensor
        return round_blocks(tensor, form, **options).double().numpy()

    def operands(x: np.ndarray, w: np.ndarray, g: np.ndarray) -> tuple[Operands, Operands, Operands]:
        forward = rounded(x), rounded(w, square=square).T
        grad_input = rounded(g, stochastic=True), rounded(w.T, square=square).T
        return forward, grad_input, (rounded(g.T, rotate=True, stochastic=True), rounded(x.T, rotate=True).T)

    return operands


PLAIN = {"disable_rht": True, "disable_stochastic_rounding": True}


@pytest.mark.parametrize(
    ("recipe", "operands"),
    [
        ("current", tensorwise),
        ("rowwise", rowwise),
        ("block", blockwise(E4M3, 128, square=True)),
        ("mxfp8", blockwise(E4M3, 32, square=False)),
        ({"name": "mxfp4", **PLAIN}, blockwise(E2M1, 32, square=False)),
        ({"name": "nvfp4", **PLAIN}, blockwise(E2M1, 16, square=True, nv=True)),
        ({"name": "nvfp4", **PLAIN, "disable_2d_quantization": True}, blockwise(E2M1, 16, square=False, nv=True)),
        ("mxfp4", training_in_four_bits(MXFP4, square=False)),
        ("nvfp4", training_in_four_bits(NVFP4, square=True)),
    ],
    ids=lambda value: "" if callable(value) else str(value),
)
def test_a_layer_equals_float64_products_of_its_rounded_operands(recipe: Any, operands: Callable) -> None:
    generator = torch.Generator().manual_seed(0)
    model = Wrapped(layer=nn.Linear(IN, OUT))
    # Rows of very different size: what a scale a tensor loses, a scale a block keeps.
    spread = torch.logspace(-3, 0, TOKENS)[:, None]
    inputs = (torch.randn(TOKENS, IN, generator=generator) * spread).requires_grad_()
    upstream = torch.randn(TOKENS, OUT, generator=generator) * spread.flip(0)
    with torch.no_grad():
        model.layer.weight.normal_(generator=generator)
    Float8Precision(recipe).convert_module(model)
    output = model.layer(inputs.view(4, TOKENS // 4, IN))
    output.backward(upstream.view_as(output))

    arrays = [tensor.detach().double().numpy() for tensor in (inputs, model.layer.weight, upstream)]
    bias = model.layer.bias.detach().double().numpy()
    (x, w), (g, v), (h, z) = operands(*arrays)
    results = (output.detach().flatten(0, 1), x @ w + bias), (inputs.grad, g @ v), (model.layer.weight.grad, h @ z)
    for value, truth in results:
        assert np.linalg.norm(value.double().numpy() - truth) <= 1e-3 * np.linalg.norm(truth)
    torch.testing.assert_close(model.layer.bias.grad, upstream.sum(0))
