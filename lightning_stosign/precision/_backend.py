"""What an FP8 library has to offer for Float8Precision to run on it."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_stosign.precision._layers import HollowLayer
from lightning_stosign.precision._padding import PaddedLinear, padded_to
from lightning_stosign.precision._recipes import RecipeChoice


class Float8Backend(ABC):
    """An FP8 library, set to one recipe.

    Attributes:
        name: The value of ``Float8Precision(backend=...)`` that selects it.
        recipes: The names of the recipes it offers.
        device_types: The types of device that its layers run on.
        multiple: Both sizes of a linear layer must be multiples of this many features.
        features: What it offers beyond the conversion, by the name of the argument of Float8Precision.
    """

    name: ClassVar[str]
    recipes: ClassVar[tuple[str, ...]]
    device_types: tuple[str, ...]
    multiple: int = 16
    features: frozenset[str] = frozenset()

    @abstractmethod
    def __init__(self, recipe: RecipeChoice) -> None: ...

    @abstractmethod
    def is_converted(self, module: nn.Module) -> bool:
        """Whether the module is one of the library's layers."""

    def holds_converted(self, module: nn.Module) -> bool:
        """Whether the module is one of the library's layers, or computes through one."""
        return self.is_converted(module.inner if isinstance(module, HollowLayer) else module)

    @abstractmethod
    def convert_linear(self, layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
        """An FP8 layer of the same size; the caller hands it the parameters, hooks and mode of ``layer``."""

    def convert_padded(self, layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
        """An FP8 layer that rounds the sizes of ``layer`` up to multiples; the caller does as above."""
        larger = padded_to(layer, self.multiple)
        return PaddedLinear(layer, self.convert_linear(larger, dtype), (larger.in_features, larger.out_features))

    def convert_norm(self, layer: nn.Module, dtype: torch.dtype) -> nn.Module | None:
        """The library's own norm that computes what ``layer`` computes, or None where there is none."""
        return None

    def convert_quantized(self, layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
        """An FP8 layer that keeps its weight in FP8 only, with the values of ``layer``; a feature."""
        raise NotImplementedError

    def own_parameters(self, replacement: nn.Module) -> set[str]:
        """The names of the parameters that a replacement has made itself."""
        return set()

    def fuse(self, root: nn.Module, kept: dict[nn.Module, list[str]], dtype: torch.dtype) -> list[str]:
        """Fuse norms with the linear layers that follow them, in place; a feature.

        Args:
            root: The model.
            kept: The modules that may be converted, with their names.
            dtype: The type of the parameters.

        Returns:
            The names of the linear layers that are in FP8 now.
        """
        raise NotImplementedError

    def float8_all_gather(self, root: nn.Module) -> None:
        """Let FSDP2 gather the weights of the converted layers in FP8; a feature."""
        raise NotImplementedError

    def check(self, root: nn.Module) -> None:  # noqa: B027  # nothing to refuse
        """Refuse a model that the recipe cannot run.

        Raises:
            ValueError: The model has layers of the library that were made for another recipe.
        """

    def forward_context(self, root: nn.Module | None) -> AbstractContextManager[Any]:
        """The context in which the converted layers compute in FP8.

        Args:
            root: The model; None before one was converted.
        """
        return nullcontext()

    def keeps_tensors(self, root: nn.Module) -> bool:
        """Whether the layers keep tensors of one call for the next, which inference mode must not make then."""
        return False

    def backward_context(self, root: nn.Module | None) -> AbstractContextManager[Any]:
        """The context of backward, where activation checkpointing computes layers again.

        Args:
            root: The model; None before one was converted.
        """
        return nullcontext()

    def objection(self, dtype: torch.dtype, flags: Collection[str]) -> str | None:
        """Return what speaks against weights of a type, or against a feature with this recipe; None if nothing does."""
        return None

    def warn_about_shared(self, names: list[str]) -> None:  # noqa: B027  # nothing to warn about
        """Warn of what goes wrong with a layer that has several names, if anything does."""

    def after_step(self, root: nn.Module) -> None:  # noqa: B027  # nothing to do
        """Follow a step of the optimizer; called if ``float8_all_gather`` is on."""

    def state_dict(self, root: nn.Module) -> dict[str, Tensor]:
        """What the layers must remember between steps, by module name; empty for a recipe without memory."""
        return {}

    def load_state_dict(self, root: nn.Module, state: dict[str, Tensor]) -> None:  # noqa: B027  # nothing to restore
        """Restore what :meth:`state_dict` returned."""
