"""FP8 layers from NVIDIA Transformer Engine (TE): CUDA devices of compute capability 8.9 and up."""

import importlib
from collections.abc import MutableMapping
from contextlib import AbstractContextManager
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_stosign.precision._backend import Float8Backend

if TYPE_CHECKING:
    from transformer_engine.common.recipe import Recipe

MINIMAL_CAPABILITY = (8, 9)

# Recipe name -> (TE's class, first compute capability with it, first one without it again).
_TE_RECIPES = {
    "delayed": ("DelayedScaling", MINIMAL_CAPABILITY, None),
    "current": ("Float8CurrentScaling", MINIMAL_CAPABILITY, None),
    "block": ("Float8BlockScaling", (9, 0), None),
    "mxfp8": ("MXFP8BlockScaling", (10, 0), (12, 0)),
}

_INSTALL = "pip install lightning-stosign[te]"


class TransformerEngineBackend(Float8Backend):
    """FP8 linear layers, and the norms that go with them, by Transformer Engine.

    Args:
        recipe: ``"delayed"``, ``"current"``, ``"block"``, ``"mxfp8"``, or one of TE's recipe objects. A name stands for
            TE's defaults: E4M3 forward with E5M2 gradients (TE's HYBRID format) where a tensor has one scale
            (``"delayed"``, ``"current"``), E4M3 for both where a block has its own (``"block"``, ``"mxfp8"``).

    Raises:
        ValueError: This machine's GPU does not have the recipe.
        TypeError: ``recipe`` is neither a name nor a TE recipe.
    """

    name = "transformer-engine"
    recipes = tuple(_TE_RECIPES)
    device_types: tuple[str, ...] = ("cuda",)

    def __init__(self, recipe: "str | Recipe") -> None:
        self._te = import_transformer_engine()
        self.recipe = _make_recipe(recipe)
        if self.recipe.mxfp8():
            self.multiple = 32
        elif self.recipe.float8_block_scaling():
            self.multiple = 128

    def is_converted(self, module: nn.Module) -> bool:
        """See :meth:`Float8Backend.is_converted`; layers of TE that the user built count."""
        return type(module).__module__.startswith(self._te.__name__)

    def convert_linear(self, layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
        """See :meth:`Float8Backend.convert_linear`."""
        # Made on "meta", because its parameters are thrown away: no memory, no draw from the global RNG. It must be the
        # string: te.Linear compares it with "meta", and torch.device("meta") is not equal to it.
        linear = self._te.Linear(
            layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta", params_dtype=dtype
        )
        return _without_extra_state(linear)

    def convert_norm(self, layer: nn.Module, dtype: torch.dtype) -> nn.Module | None:
        """See :meth:`Float8Backend.convert_norm`.

        TE normalises over one dimension, always scales, and in LayerNorm always shifts; other norms stay torch's.
        """
        if type(layer) is nn.LayerNorm and len(layer.normalized_shape) == 1 and layer.bias is not None:
            norm = self._te.LayerNorm(layer.normalized_shape[0], eps=layer.eps, device="meta", dtype=dtype)
        elif type(layer) is nn.RMSNorm and len(layer.normalized_shape) == 1 and layer.weight is not None:
            # torch normalises in float32 at least, and None means the epsilon of the type it normalises in.
            eps = torch.finfo(torch.float32).eps if layer.eps is None else layer.eps
            norm = self._te.RMSNorm(layer.normalized_shape[0], eps=eps, device="meta", dtype=dtype)
        else:
            return None
        return _without_extra_state(norm)

    def forward_context(self) -> AbstractContextManager[Any]:
        """See :meth:`Float8Backend.forward_context`."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        group = torch.distributed.group.WORLD if distributed else None
        if hasattr(self._te, "autocast"):
            context = self._te.autocast(enabled=True, recipe=self.recipe, amax_reduction_group=group)
        else:
            context = self._te.fp8_autocast(enabled=True, fp8_recipe=self.recipe, fp8_group=group)
        return cast(AbstractContextManager[Any], context)

    def state_dict(self, root: nn.Module) -> dict[str, Tensor]:
        """The layers' amax histories, in TE's own bytes; empty for all recipes but delayed scaling."""
        if not self.recipe.delayed():
            return {}
        states = {name: layer.get_extra_state() for name, layer in root.named_modules() if self.is_converted(layer)}
        return {name: state for name, state in states.items() if state is not None and state.numel() > 0}

    def load_state_dict(self, root: nn.Module, state: dict[str, Tensor]) -> None:
        """Restore the amax histories.

        Raises:
            RuntimeError: TE refuses to unpickle the histories; the message names the environment variable to set.
        """
        if not self.recipe.delayed():
            return
        layers = {name: layer for name, layer in root.named_modules() if self.is_converted(layer)}
        homeless = sorted(state.keys() - layers.keys())
        if homeless:
            rank_zero_warn(f"The checkpoint holds FP8 scaling histories of layers that are not in FP8 now: {homeless}.")
        for name in state.keys() & layers.keys():
            layers[name].set_extra_state(state[name])


def cuda_capability() -> tuple[int, int] | None:
    """The compute capability of the current CUDA device, or None without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def import_transformer_engine() -> ModuleType:
    """Import ``transformer_engine.pytorch``.

    Raises:
        ImportError: The package is missing, or lacks its compiled part: the wheel on PyPI installs without it, is
            found, and raises one of several exceptions when it is imported.
    """
    try:
        return importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        raise ImportError(f"transformer_engine.pytorch cannot be imported ({type(error).__name__}: {error})") from error


def missing_for_transformer_engine() -> str | None:
    """What keeps this machine from running Transformer Engine in FP8, in words; None if nothing does."""
    capability = cuda_capability()
    if capability is None:
        return "torch sees no CUDA device"
    if capability < MINIMAL_CAPABILITY:
        return "the CUDA device has compute capability {}.{}, and FP8 needs 8.9 or higher".format(*capability)
    try:
        import_transformer_engine()
    except ImportError as error:
        return f"{error}; install it with `{_INSTALL}`"
    return None


def _make_recipe(recipe: "str | Recipe") -> "Recipe":
    library = importlib.import_module("transformer_engine.common.recipe")
    if not isinstance(recipe, str):
        if not isinstance(recipe, library.Recipe):
            raise TypeError(
                f"recipe must be one of {list(_TE_RECIPES)} or a transformer_engine.common.recipe.Recipe, "
                f"got {recipe!r} of type {type(recipe).__name__}"
            )
        return recipe
    class_name, first, beyond = _TE_RECIPES[recipe]
    capability = cuda_capability()
    if capability is not None and (capability < first or (beyond is not None and capability >= beyond)):
        limit = "" if beyond is None else " and below {}.{}".format(*beyond)
        raise ValueError(
            "recipe={!r} needs a CUDA device of compute capability {}.{} or higher{}, and this one has {}.{}; "
            "recipe='current' runs on it".format(recipe, *first, limit, *capability)
        )
    return getattr(library, class_name)()


def _without_extra_state(layer: nn.Module) -> nn.Module:
    """Keep the state-dict keys of the torch layer: TE adds ``_extra_state``, which an unconverted model cannot load.

    Lightning loads the weights before the plugin converts the model. With delayed scaling the extra state has content:
    the plugin saves it on its own, see :meth:`TransformerEngineBackend.state_dict`.
    """
    layer.register_state_dict_post_hook(_drop_extra_state)
    layer.register_load_state_dict_pre_hook(_add_empty_extra_state)
    return layer


def _drop_extra_state(layer: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, metadata: Any) -> None:
    state_dict.pop(f"{prefix}_extra_state", None)


def _add_empty_extra_state(layer: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, *report: Any) -> None:
    # An empty state is TE's own way to say that there is nothing to restore.
    state_dict.setdefault(f"{prefix}_extra_state", torch.empty(0, dtype=torch.uint8))
