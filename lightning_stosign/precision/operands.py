"""What a recipe leaves of the operands of a linear layer's three products."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_stosign.precision._recipes import RECIPES, RecipeChoice
from lightning_stosign.precision.block_formats import count_saturated, round_blocks
from lightning_stosign.precision.emulated_backend import EMULATED_RECIPES, EmulatedRecipe, changed_rounding

OPERANDS = ("input", "weight", "output_gradient")
PRODUCTS = ("output", "input_gradient", "weight_gradient")

_SMALLEST_AMAX = 1e-12  # torchao's
_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float8_e5m2)  # of the operands with a scale per tensor

Factors = tuple[Tensor, Tensor]


class Operands(NamedTuple):
    """The operands of a layer ``y = x @ w.T``, all float32.

    Attributes:
        x: Inputs, ``[tokens, in_features]``.
        w: The weight, ``[out_features, in_features]``.
        g: Gradients of the outputs, ``[tokens, out_features]``.
    """

    x: Tensor
    w: Tensor
    g: Tensor

    def factors(self) -> tuple[Factors, Factors, Factors]:
        """Return the factors of the three products, in the order of PRODUCTS."""
        return (self.x, self.w.t()), (self.g, self.w), (self.g.t(), self.x)


class OperandRounding:
    """A recipe's rounding, as the layers of the recipe do it.

    Args:
        name: The recipe.
        emulated: Its rounding, for a block-scaled recipe.
    """

    def __init__(self, name: str, emulated: EmulatedRecipe | None = None) -> None:
        self.name = name
        self.emulated = EMULATED_RECIPES.get(name) if emulated is None else emulated

    def operands(self, operands: Operands, amax: Tensor) -> tuple[Operands, list[Tensor]]:
        """Round each operand once, as the first product that reads it does.

        Args:
            operands: The operands.
            amax: What a delayed recipe takes for their largest magnitudes, float32, ``[3]``.

        Returns:
            The rounded operands, and how many values of each are beyond the largest number of the format.
        """
        x, w, g = operands
        if self.emulated is not None:
            rule = self.emulated
            rounded = Operands(
                round_blocks(x, rule.format),
                round_blocks(w, rule.format, square=rule.square_weight),
                round_blocks(g, rule.format, stochastic=rule.stochastic_gradient),
            )
            squares = (False, rule.square_weight, False)
            return rounded, [
                count_saturated(values, rule.format, square=square)
                for values, square in zip(operands, squares, strict=True)
            ]
        if self.name == "rowwise":
            nothing = torch.zeros((), dtype=torch.int64, device=x.device)
            return Operands(*(_round_along(values, 1) for values in operands)), [nothing] * 3
        limits = amax if self.name == "delayed" else torch.stack([values.abs().amax() for values in operands])
        triples = list(zip(operands, _DTYPES, limits.unbind(), strict=True))
        saturated = [(values.abs() > limit.clamp(min=_SMALLEST_AMAX)).sum() for values, _, limit in triples]
        return Operands(*(_round_to(*triple) for triple in triples)), saturated

    def factors(self, operands: Operands, rounded: Operands) -> tuple[Factors, Factors, Factors]:
        """Return the rounded factors of the three products, in the order of PRODUCTS.

        Args:
            operands: The operands.
            rounded: What :meth:`operands` made of them.
        """
        x, w, g = operands
        if self.emulated is not None:
            rule = self.emulated
            return rule.of_output(x, w), rule.of_input_gradient(g, w), rule.of_weight_gradient(g, x)
        if self.name == "rowwise":
            return (
                (rounded.x, rounded.w.t()),
                (rounded.g, _round_along(w, 0)),
                (_round_along(g, 0).t(), _round_along(x, 0)),
            )
        return rounded.factors()


def rounding_in_use(choice: RecipeChoice) -> OperandRounding:
    """Return the rounding of a recipe with its options.

    Args:
        choice: The recipe of Float8Precision. Of an object of Transformer Engine's only the class is looked at.

    Raises:
        ValueError: The object's class is not one that this package has a name for.
    """
    name = choice.name
    if name is None:
        classes = {facts.te_class: recipe for recipe, facts in RECIPES.items() if facts.te_class is not None}
        te_class = type(choice.given).__name__
        if te_class not in classes:
            raise ValueError(f"recipe={choice.given!r} is none of {sorted(classes)}, whose rounding is known")
        name = classes[te_class]
    return OperandRounding(name, changed_rounding(name, choice.options) if name in EMULATED_RECIPES else None)


def _round_to(values: Tensor, dtype: torch.dtype, amax: Tensor) -> Tensor:
    """Round with one scale: a float32 that takes ``amax`` to the largest number of the format."""
    largest = torch.finfo(dtype).max
    scale = largest / amax.clamp(min=_SMALLEST_AMAX)
    return (values * scale).clamp(-largest, largest).to(dtype).float() / scale


def _round_along(values: Tensor, dim: int) -> Tensor:
    """Round to E4M3 with a power of two as the scale of each row (1) or column (0)."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = largest / values.abs().amax(dim, keepdim=True).clamp(min=_SMALLEST_AMAX)
    scale = torch.ldexp(torch.ones_like(scale), torch.frexp(scale)[1] - 1)
    return (values * scale).to(torch.float8_e4m3fn).float() / scale
