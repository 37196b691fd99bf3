"""Block-scaled recipes on any device: products in float32 whose operands are exactly those of the hardware."""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_stosign._plain import plain
from lightning_stosign.precision._backend import Float8Backend
from lightning_stosign.precision._recipes import RECIPES, RecipeChoice
from lightning_stosign.precision.block_formats import (
    FP8_BLOCK,
    MXFP4,
    MXFP8,
    NVFP4,
    BlockFormat,
    rotate_blocks,
    round_blocks,
)


class EmulatedRecipe(NamedTuple):
    """How the operands of a layer's three products are rounded.

    Attributes:
        format: Of all operands.
        square_weight: The weight's blocks are square, so that both products that read it see the same values.
        stochastic_gradient: Gradients of outputs are rounded stochastically.
        rotate: The two operands of the weight gradient are rotated first, block by block.
    """

    format: BlockFormat
    square_weight: bool = False
    stochastic_gradient: bool = False
    rotate: bool = False

    def of_output(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two rounded factors of ``x @ w.T``; all are float32 matrices."""
        return round_blocks(x, self.format), round_blocks(w, self.format, square=self.square_weight).t()

    def of_input_gradient(self, g: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two rounded factors of ``g @ w``."""
        # Blocks of w along its rows' dimension: for square ones the same values as in the forward product.
        columns = round_blocks(w.t(), self.format, square=self.square_weight).t()
        return round_blocks(g, self.format, stochastic=self.stochastic_gradient), columns

    def of_weight_gradient(self, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two rounded factors of ``g.T @ x``, or of the same product after a rotation."""
        g, x = g.t(), x.t()
        if self.rotate:
            g, x = rotate_blocks(g, self.format.block_size), rotate_blocks(x, self.format.block_size)
        return round_blocks(g, self.format, stochastic=self.stochastic_gradient), round_blocks(x, self.format).t()


EMULATED_RECIPES = {
    "block": EmulatedRecipe(FP8_BLOCK, square_weight=True),
    "mxfp8": EmulatedRecipe(MXFP8),
    "nvfp4": EmulatedRecipe(NVFP4, square_weight=True, stochastic_gradient=True, rotate=True),
    "mxfp4": EmulatedRecipe(MXFP4, stochastic_gradient=True, rotate=True),
}

# Transformer Engine's names for them.
_OPTIONS = {
    "disable_2d_quantization": "square_weight",
    "disable_stochastic_rounding": "stochastic_gradient",
    "disable_rht": "rotate",
}


def changed_rounding(name: str, options: Mapping[str, Any]) -> EmulatedRecipe:
    """Return a recipe's rounding under those of its options that change it.

    Args:
        name: One of EMULATED_RECIPES.
        options: Values by Transformer Engine's names; others than the three above are left alone.
    """
    changes: dict[str, Any] = {_OPTIONS[option]: not value for option, value in options.items() if option in _OPTIONS}
    return EMULATED_RECIPES[name]._replace(**changes)


class EmulationBackend(Float8Backend):
    """Block-scaled recipes without their hardware: the roundings are real, the products run in float32.

    For a layer ``y = x @ w.T`` with gradient ``g`` of ``y``, the three products are

        ``y = q(x) @ q(w).T``, ``dx = s(g) @ q(w)``, ``dw = s(r(g.T)) @ q(r(x.T)).T``

    where ``q`` rounds blocks along the dimension that is summed over. ``"block"``: E4M3, blocks of 128, those of ``w``
    128x128. ``"mxfp8"``: E4M3, blocks of 32. ``"nvfp4"``: E2M1, blocks of 16, those of ``w`` 16x16, ``s`` rounds
    stochastically and ``r`` is a random Hadamard rotation; ``"mxfp4"``: the same with blocks of 32, none square.

    Args:
        recipe: One of these; for the last two the options ``disable_rht`` and ``disable_stochastic_rounding``, and for
            ``"nvfp4"`` also ``disable_2d_quantization``.

    Raises:
        ValueError: The recipe has no such option.
        TypeError: An option is not a bool.

    Source:
        arXiv 2509.25149 (NVFP4), arXiv 2506.08027 (MXFP8), arXiv 2502.20586 (MXFP4).
    """

    name = "emulation"
    recipes = tuple(EMULATED_RECIPES)
    device_types = ("cpu", "cuda", "mps", "xpu")

    def __init__(self, recipe: RecipeChoice) -> None:
        assert recipe.name is not None
        self.multiple = RECIPES[recipe.name].multiple
        default = EMULATED_RECIPES[recipe.name]
        known = tuple(
            option for option, what in _OPTIONS.items() if default.format.bits == 4 and getattr(default, what)
        )
        options = {option: plain(disabled) for option, disabled in recipe.options_among(known).items()}
        for option, disabled in options.items():
            if not isinstance(disabled, bool):
                raise TypeError(f"recipe={recipe.given!r}: {option} must be a bool, got {disabled!r}")
        self.rounding = changed_rounding(recipe.name, options)

    def is_converted(self, module: nn.Module) -> bool:
        """See :meth:`Float8Backend.is_converted`."""
        return isinstance(module, EmulatedLinear)

    def convert_linear(self, layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
        """See :meth:`Float8Backend.convert_linear`."""
        return EmulatedLinear(layer, self.rounding)


class EmulatedLinear(nn.Linear):
    """A linear layer whose products have rounded operands.

    Args:
        layer: Gives the sizes; its parameters stay its own.
        rounding: How the operands are rounded.
    """

    def __init__(self, layer: nn.Linear, rounding: EmulatedRecipe) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.rounding = rounding

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        with torch.autocast(input.device.type, enabled=False):
            output = cast(Tensor, _RoundedProduct.apply(input, self.weight, self.rounding))
            if self.bias is not None:
                output = output + self.bias.float()  # before the sum is rounded, as the hardware does
            return output.to(input.dtype)

    def extra_repr(self) -> str:
        """See torch."""
        return f"{super().extra_repr()}, {self.rounding}"


class _RoundedProduct(torch.autograd.Function):
    """``q(x) @ q(w).T`` in float32, and its gradients from rounded operands."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, rounding: EmulatedRecipe) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.rounding = rounding
        x, w = rounding.of_output(_matrix(input), weight.float())
        return (x @ w).view(*input.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable  # twice would differentiate the rounding
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        input, weight = ctx.saved_tensors
        rounding: EmulatedRecipe = ctx.rounding
        g = _matrix(grad_output)
        grad_input = grad_weight = None
        with torch.autocast(input.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                left, right = rounding.of_input_gradient(g, weight.float())
                grad_input = (left @ right).to(input.dtype).view(input.shape)
            if ctx.needs_input_grad[1]:
                left, right = rounding.of_weight_gradient(g, _matrix(input))
                grad_weight = (left @ right).to(weight.dtype)
        return grad_input, grad_weight, None


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1]).float()
