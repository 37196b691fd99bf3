"""What an FP8 library has to offer for Float8Precision to run on it."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Float8Backend(ABC):
    """An FP8 library, set to one recipe.

    Attributes:
        name: The value of ``Float8Precision(backend=...)`` that selects it.
        recipes: The names of the recipes it offers.
        device_types: The types of device that its layers run on.
        multiple: Both sizes of a linear layer must be multiples of this many features.
    """

    name: ClassVar[str]
    recipes: ClassVar[tuple[str, ...]]
    device_types: tuple[str, ...]
    multiple: int = 16

    @abstractmethod
    def __init__(self, recipe: Any) -> None: ...

    @abstractmethod
    def is_converted(self, module: nn.Module) -> bool:
        """Whether the module is one of the library's layers."""

    @abstractmethod
    def convert_linear(self, layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
        """An FP8 layer of the same size; the caller hands it the parameters, hooks and mode of ``layer``."""

    def convert_norm(self, layer: nn.Module, dtype: torch.dtype) -> nn.Module | None:
        """The library's own norm that computes what ``layer`` computes, or None where there is none."""
        return None

    def forward_context(self) -> AbstractContextManager[Any]:
        """The context in which the converted layers compute in FP8."""
        return nullcontext()

    def state_dict(self, root: nn.Module) -> dict[str, Tensor]:
        """What the layers must remember between steps, by module name; empty for a recipe without memory."""
        return {}

    def load_state_dict(self, root: nn.Module, state: dict[str, Tensor]) -> None:  # noqa: B027  # nothing to restore
        """Restore what :meth:`state_dict` returned."""
