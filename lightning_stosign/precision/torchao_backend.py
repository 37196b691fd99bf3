"""FP8 layers from torchao: they run on CUDA devices and, for real, on the CPU."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from lightning_stosign.precision._backend import Float8Backend
from lightning_stosign.precision._layers import shared_parameters
from lightning_stosign.precision._recipes import RECIPES, RecipeChoice

_TORCHAO_RECIPES = {"current": "tensorwise", "rowwise": "rowwise"}

# What torchao and torch log while torchao is imported: missing binary kernels (none of which FP8 training uses), and a
# deprecation in torchao's own code.
_IMPORT_NOISE = {
    "torchao": ("Failed to load ", "Skipping import of cpp extensions"),
    "torch.utils._pytree": ("<enum 'KernelPreference'> is an Enum subclass",),
}


class TorchAOBackend(Float8Backend):
    """FP8 linear layers by ``torchao.float8``.

    Recipe ``"current"`` scales each tensor by its own largest magnitude, amax, found at the moment of the cast:
    ``x_fp8 = cast(x * f / amax)`` with ``f = 448`` for E4M3 (activations and weights) and ``f = 57344`` for E5M2
    (gradients of the outputs). Recipe ``"rowwise"`` has one scale a row, rounded down to a power of two, and E4M3
    throughout. All three matrix products of a layer, one forward and two backward, have FP8 operands. Where the
    hardware does not multiply FP8 matrices, the operands are rounded all the same and multiplied in float32.

    Args:
        recipe: ``"current"`` or ``"rowwise"``, without options.

    Raises:
        ValueError: The recipe has an option.
    """

    name = "torchao"
    recipes = tuple(_TORCHAO_RECIPES)
    device_types = ("cpu", "cuda", "mps", "xpu")

    def __init__(self, recipe: RecipeChoice) -> None:
        with _without_import_noise():
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training

            from lightning_stosign.precision.torchao_layers import TorchAOLinear
        recipe.options_among(())
        assert recipe.name is not None
        self._convert = convert_to_float8_training
        self._layer_type = TorchAOLinear
        self.multiple = RECIPES[recipe.name].multiple
        # FSDP2 gathers a weight's shards, each cast by the scale of the whole: only one scale a tensor can do that.
        self.features = frozenset({"float8_all_gather"} if recipe.name == "current" else ())
        self.config = replace(
            Float8LinearConfig.from_recipe_name(_TORCHAO_RECIPES[recipe.name]),
            # Where rows have scales of their own, torchao rounds the product to bfloat16. A GPU gains speed by it; the
            # CPU gains nothing, so there the rounded operands are multiplied in float32.
            emulate=not has_float8_gemm() or (recipe.name == "rowwise" and not torch.cuda.is_available()),
            # The weight gradient sums over the tokens, and a GPU sums only multiples of 16: zeros fill up the rest.
            pad_inner_dim=True,
        )

    def is_converted(self, module: nn.Module) -> bool:
        """See :meth:`Float8Backend.is_converted`."""
        return isinstance(module, self._layer_type)

    def convert_linear(self, layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
        """See :meth:`Float8Backend.convert_linear`."""
        # Given a root layer, torchao returns a new one; given a model, it misses the second name of a shared layer.
        converted = cast(nn.Module, self._convert(layer, config=self.config))
        converted.__class__ = self._layer_type
        return converted

    def float8_all_gather(self, root: nn.Module) -> None:
        """See :meth:`Float8Backend.float8_all_gather`; a weight that several modules hold stays as it is."""
        from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

        tied = shared_parameters(root)
        for module in root.modules():
            if not self.is_converted(module):
                continue
            layer = cast(Any, module)
            if layer.weight not in tied and not isinstance(layer.weight, WeightWithDynamicFloat8CastTensor):
                weight = WeightWithDynamicFloat8CastTensor(
                    layer.weight.detach(), layer.linear_mm_config, self.config.cast_config_weight.target_dtype
                )
                layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)

    def after_step(self, root: nn.Module) -> None:
        """Find the scales of all sharded weights by one reduction, where each layer would need its own."""
        from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

        precompute_float8_dynamic_scale_for_fsdp(root)


def has_float8_gemm() -> bool:
    """Whether the device that a run most likely uses multiplies FP8 matrices; if not, torchao emulates the products."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= (8, 9)
    return not torch.backends.mps.is_available()


@contextmanager
def _without_import_noise() -> Iterator[None]:
    """Drop the known harmless records of an import of torchao, and no others."""

    def is_news(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_IMPORT_NOISE[record.name])

    loggers = [logging.getLogger(name) for name in _IMPORT_NOISE]
    for logger in loggers:
        logger.addFilter(is_news)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_news)
