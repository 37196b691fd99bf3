"""FP8 layers from NVIDIA Transformer Engine (TE): CUDA devices of compute capability 8.9 and up."""

import importlib
import importlib.util
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import fields
from functools import cache, partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_stosign.precision._backend import Float8Backend
from lightning_stosign.precision._layers import HollowLayer
from lightning_stosign.precision._recipes import MINIMAL_CAPABILITY, RECIPES, Capability, RecipeChoice, check_hardware
from lightning_stosign.precision.te_histories import (
    no_inference_tensors,
    recomputation,
    remembers,
    scales_of,
    unchanged_histories,
)

if TYPE_CHECKING:
    from transformer_engine.common.recipe import Recipe

_TE_CLASSES = {name: facts.te_class for name, facts in RECIPES.items() if facts.te_class is not None}

_INSTALL = "pip install lightning-stosign[te]"


class TransformerEngineBackend(Float8Backend):
    """FP8 linear layers, and the norms that go with them, by Transformer Engine.

    Args:
        recipe: ``"delayed"``, ``"current"``, ``"block"``, ``"mxfp8"``, ``"nvfp4"``, with the options of TE's class, or
            one of TE's recipe objects. A name stands for TE's defaults: E4M3 forward with E5M2 gradients (TE's HYBRID
            format) where a tensor has one scale (``"delayed"``, ``"current"``), E4M3 for both where a block has its own
            (``"block"``, ``"mxfp8"``), and E2M1 (``"nvfp4"``).

    Raises:
        ValueError: This machine's GPU does not have the recipe, or TE's class does not have an option.
        TypeError: ``recipe`` is neither a name nor a TE recipe.
    """

    name = "transformer-engine"
    recipes = tuple(_TE_CLASSES)
    device_types: tuple[str, ...] = ("cuda",)
    features = frozenset({"fuse", "quantized_weights"})

    def __init__(self, recipe: RecipeChoice) -> None:
        import_transformer_engine()
        self.recipe = _make_recipe(recipe)
        quantizers = _quantizers_of(self.recipe) if _is(self.recipe, "custom") else []
        self.multiple = max(map(_multiple_of_quantizer, quantizers)) if quantizers else _multiple_of(self.recipe)
        requests = (type(quantizer).__name__ for quantizer in quantizers)
        self._scales_before_forward: dict[int, Tensor] = {}
        self._has_histories = self.recipe.delayed() or "DelayedScalingRequest" in requests

    # Properties, because a module in an attribute could not be pickled.

    @property
    def _te(self) -> Any:
        return import_transformer_engine()

    @property
    def _layers(self) -> Any:
        return importlib.import_module("lightning_stosign.precision.te_layers")  # imports TE at its head

    def is_converted(self, module: nn.Module) -> bool:
        """See :meth:`Float8Backend.is_converted`; layers of TE that the user built count."""
        kind: Any = type(module)
        return _is_te_class(kind)

    def convert_linear(self, layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
        """See :meth:`Float8Backend.convert_linear`."""
        return self._layers.without_extra_state(self.make_linear(layer, dtype))

    def make_linear(self, layer: nn.Linear, dtype: torch.dtype, **arguments: Any) -> nn.Module:
        """TE's layer of the same size, which pads its tokens; on the meta device unless told otherwise."""
        # Made on "meta", because its parameters are thrown away: no memory, no draw from the global RNG. It must be the
        # string: te.Linear compares it with "meta", and torch.device("meta") is not equal to it.
        return self._layers.Linear(
            layer.in_features,
            layer.out_features,
            multiple=self.multiple,
            bias=layer.bias is not None,
            params_dtype=dtype,
            **{"device": "meta", **arguments},
        )

    def convert_quantized(self, layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
        """A layer that keeps its weight in the recipe's format only, and gives it back in ``dtype`` in a state dict.

        TE remembers the exact values on the CPU until an optimizer asks for them (``get_high_precision_init_val``).
        """
        with self._te.quantized_model_init(enabled=True, recipe=self.recipe, preserve_high_precision_init_val=True):
            make = partial(self.make_linear, layer, dtype)
            linear = self._layers.quantized_linear(make, layer.weight.detach(), self.device_types[0])
        linear.weight.requires_grad_(layer.weight.requires_grad)
        return self._layers.without_extra_state(linear)

    def own_parameters(self, replacement: nn.Module) -> set[str]:
        """See :meth:`Float8Backend.own_parameters`."""
        return {"weight"} if getattr(replacement, "primary_weights_in_fp8", False) else set()

    def _is_quantized(self, layer: nn.Module) -> bool:
        return any(isinstance(value, self._te.QuantizedTensor) for value in layer.parameters(recurse=False))

    def convert_norm(self, layer: nn.Module, dtype: torch.dtype) -> nn.Module | None:
        """See :meth:`Float8Backend.convert_norm`.

        TE always scales, and in LayerNorm always shifts: a norm without is left as it is, for its parameters would be
        new to the optimizer and to checkpoints.
        """
        if type(layer) is nn.LayerNorm and layer.bias is not None:
            norm = self._layers.LayerNorm(layer.normalized_shape, eps=float(layer.eps), device="meta", dtype=dtype)
        elif type(layer) is nn.RMSNorm and layer.weight is not None:
            eps = self._layers.rms_norm_eps(layer)
            norm = self._layers.RMSNorm(layer.normalized_shape, eps=eps, device="meta", dtype=dtype)
        else:
            return None
        return self._layers.without_extra_state(norm)

    def fuse(self, root: nn.Module, kept: dict[nn.Module, list[str]], dtype: torch.dtype) -> list[str]:
        """See :meth:`Float8Backend.fuse`."""
        from lightning_stosign.precision.te_fusion import fuse_chains

        return fuse_chains(root, kept, self._te, self.multiple, dtype)

    def check(self, root: nn.Module) -> None:
        """See :meth:`Float8Backend.check`."""
        from lightning_stosign.precision.te_fusion import FusedLayer

        layers = self._layers_of(root)
        own: dict[str, Any] = {name: layer for name, layer in layers.items() if isinstance(layer, self._layers.Linear)}
        own |= {name: module for name, module in root.named_modules() if isinstance(module, FusedLayer)}
        for name, layer in own.items():
            if layer.in_features % self.multiple != 0 or layer.out_features % self.multiple != 0:
                raise ValueError(
                    f"{name} was converted for another recipe, and its {layer.in_features} inputs and "
                    f"{layer.out_features} outputs are not multiples of {self.multiple}, as "
                    f"{type(self.recipe).__name__} wants: build the model again"
                )
            layer.multiple = self.multiple
        for name, layer in layers.items():
            for parameter_name, parameter in layer.named_parameters(recurse=False):
                quantizer = getattr(parameter, "_quantizer", None)
                kept_for = None if quantizer is None else quantizer._get_compatible_recipe()
                if kept_for is not None and not isinstance(self.recipe, kept_for):
                    raise ValueError(
                        f"{name}.{parameter_name} is stored in the format of {kept_for.__name__}, with which "
                        f"{type(self.recipe).__name__} cannot compute: use the recipe that the weights were quantised "
                        "for, or build the model again"
                    )

    @contextmanager
    def forward_context(self, root: nn.Module | None) -> Iterator[None]:
        """See :meth:`Float8Backend.forward_context`."""
        with ExitStack() as stack:
            if root is not None and torch.is_grad_enabled():
                if self._has_histories:
                    self._scales_before_forward = scales_of(self._layers_of(root).values())
            elif root is not None:
                if torch.is_inference_mode_enabled() and self.keeps_tensors(root):
                    stack.enter_context(no_inference_tensors())
                if self._has_histories:
                    stack.enter_context(unchanged_histories(self._layers_of(root).values()))
            stack.enter_context(self._autocast())
            yield

    def keeps_tensors(self, root: nn.Module) -> bool:
        """See :meth:`Float8Backend.keeps_tensors`."""
        return self._has_histories or any(map(self._is_quantized, self._layers_of(root).values()))

    @contextmanager
    def backward_context(self, root: nn.Module | None) -> Iterator[None]:
        """See :meth:`Float8Backend.backward_context`."""
        manager = self._state_manager()
        with ExitStack() as stack:
            if self._has_histories and root is not None:
                stack.enter_context(recomputation(self._layers_of(root).values(), self._scales_before_forward))
            stack.enter_context(self._autocast())
            yield
            if self._has_histories and not manager.is_first_fp8_module():
                # A layer was computed again. TE took it for the first one, whose gradient comes last, and those that
                # came after it are left over.
                manager.reduce_and_update_fp8_tensors(forward=False)

    @staticmethod
    def _state_manager() -> Any:
        name = "transformer_engine.pytorch.quantization"  # "fp8" in old versions
        found = importlib.util.find_spec(name) is not None
        return importlib.import_module(name if found else "transformer_engine.pytorch.fp8").FP8GlobalStateManager

    def _autocast(self) -> AbstractContextManager[Any]:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        group = torch.distributed.group.WORLD if distributed else None
        if hasattr(self._te, "autocast"):
            return cast(
                AbstractContextManager[Any],
                self._te.autocast(enabled=True, recipe=self.recipe, amax_reduction_group=group),
            )
        return cast(
            AbstractContextManager[Any],
            self._te.fp8_autocast(enabled=True, fp8_recipe=self.recipe, fp8_group=group),
        )

    def objection(self, dtype: torch.dtype, flags: Collection[str]) -> str | None:
        """See :meth:`Float8Backend.objection`."""
        if "quantized_weights" in flags and self._has_histories:
            return (
                "delayed scaling has no history yet when weights are quantised, so that small ones become 0, and a "
                "checkpoint cannot restore the scale that a weight was quantised with: use recipe='current' with "
                "quantized_weights=True"
            )
        if _is(self.recipe, "nvfp4"):
            if dtype is torch.float16:
                return "Transformer Engine's nvfp4 has no float16: use weights_dtype='bfloat16'"
            if dtype is torch.float32 and not self.recipe.disable_rht:
                return (
                    "Transformer Engine rotates bfloat16 values only: use weights_dtype='bfloat16', or "
                    "recipe={'name': 'nvfp4', 'disable_rht': True}"
                )
        return None

    def warn_about_shared(self, names: list[str]) -> None:
        """See :meth:`Float8Backend.warn_about_shared`."""
        if self.recipe.delayed() and self.recipe.reduce_amax:
            rank_zero_warn(
                f"The layer {' = '.join(names)} has several names. Transformer Engine's delayed scaling loses its "
                "history if it is called more than once a step: use recipe='current', or "
                "recipe={'name': 'delayed', 'reduce_amax': False}."
            )

    def state_dict(self, root: nn.Module) -> dict[str, Tensor]:
        """The amax histories of delayed scaling, in TE's own bytes, and the bits of quantised weights."""
        state = {}
        for name, layer in self._layers_of(root).items():
            if self._has_histories and remembers(layer) and (history := layer.get_extra_state()).numel() > 0:
                state[name] = history
            state |= {f"{name}.{piece}": tensor for piece, tensor in self._layers.stored_pieces(layer).items()}
        return state

    def load_state_dict(self, root: nn.Module, state: dict[str, Tensor]) -> None:
        """Restore the amax histories and the quantised weights.

        Raises:
            RuntimeError: TE refuses to unpickle the histories; the message names the environment variable to set.
        """
        known: set[str] = set()
        histories: dict[str, Any] = {}
        for name, layer in self._layers_of(root).items():
            pieces = self._layers.stored_pieces(layer)
            known |= {f"{name}.{piece}" for piece in pieces}
            saved = {piece: state[f"{name}.{piece}"] for piece in pieces if f"{name}.{piece}" in state}
            self._layers.restore_pieces(layer, saved)
            if remembers(layer):
                histories[name] = layer
        if not self._has_histories:
            return
        homeless = sorted(state.keys() - known - histories.keys())
        if homeless:
            rank_zero_warn(f"The checkpoint holds FP8 scaling histories of layers that are not in FP8 now: {homeless}.")
        for name in state.keys() & histories.keys():
            histories[name].set_extra_state(state[name])

    def _layers_of(self, root: nn.Module) -> dict[str, Any]:
        """TE's layers by the names of the modules that are, or compute through, them."""
        layers = {}
        for name, module in root.named_modules():
            layer = module.inner if isinstance(module, HollowLayer) else module
            if self.is_converted(layer):
                layers[name] = layer
        return layers


@cache
def _is_te_class(kind: type) -> bool:
    return any(base.__module__.startswith("transformer_engine.pytorch") for base in kind.__mro__)


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


def cuda_version() -> Capability | None:
    """The version of CUDA that torch was built with, or None without one."""
    if torch.version.cuda is None:
        return None
    major, minor, *_ = torch.version.cuda.split(".")
    return int(major), int(minor)


def _make_recipe(choice: RecipeChoice) -> "Recipe":
    library = importlib.import_module("transformer_engine.common.recipe")
    if choice.name is None:
        if not isinstance(choice.given, library.Recipe):
            raise TypeError(
                f"recipe must be one of {list(_TE_CLASSES)}, a mapping with such a 'name', or a "
                f"transformer_engine.common.recipe.Recipe, got {choice.given!r} of type {type(choice.given).__name__}"
            )
        return choice.given
    check_hardware(choice.name, cuda_capability(), cuda_version())
    recipe_class = getattr(library, _TE_CLASSES[choice.name])
    options = choice.options_among(tuple(field.name for field in fields(recipe_class)))
    for option, value in options.items():
        if option.endswith("_format") and isinstance(value, str):
            if value not in library.Format.__members__:
                known = list(library.Format.__members__)
                raise ValueError(f"recipe={choice.given!r}: {option} must be one of {known}, got {value!r}")
            options[option] = library.Format[value]
    return recipe_class(**options)


def _multiple_of(recipe: "Recipe") -> int:
    """Of how many features and tokens TE's layers want a multiple."""
    for kind, name in (("mxfp8", "mxfp8"), ("float8_block_scaling", "block"), ("nvfp4", "nvfp4")):
        if _is(recipe, kind):
            return RECIPES[name].multiple
    return RECIPES["current"].multiple


def _quantizers_of(recipe: Any) -> list[Any]:
    """What a CustomRecipe's factory makes for the three operands of a linear layer.

    Its ``quantization_alignment`` says nothing of them: the default stands for the widest format that TE has.
    """
    roles: list[Any] = ["linear_input", "linear_weight", "linear_grad_output"]  # as TE wrote them once
    role_class = getattr(importlib.import_module("transformer_engine.pytorch.quantization"), "QuantizerRole", None)
    if role_class is not None:
        roles = [role_class(module_type="linear", tensor_type=role.removeprefix("linear_")) for role in roles]
    return [recipe.qfactory(role) for role in roles]


def _multiple_of_quantizer(quantizer: Any) -> int:
    """Of how many features and tokens a layer wants a multiple, if one of its operands has this quantizer."""
    parts = [getattr(quantizer, f"{direction}_quantizer", None) for direction in ("rowwise", "columnwise")]
    if all(part is not None for part in parts):  # one format per direction
        return max(map(_multiple_of_quantizer, parts))
    kinds = {"Float8BlockQuantizer": "block", "MXFP8Quantizer": "mxfp8", "NVFP4Quantizer": "nvfp4"}
    return RECIPES[kinds.get(type(quantizer).__name__, "current")].multiple


def _is(recipe: "Recipe", kind: str) -> bool:
    """Whether a recipe is of a kind; an older TE does not know every kind."""
    return hasattr(recipe, kind) and bool(getattr(recipe, kind)())
