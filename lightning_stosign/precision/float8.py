"""Float8Precision: the matrix products of a model's linear layers in FP8, under the Lightning Trainer."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision.precision import Precision
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_stosign.precision._layers import is_excluded, is_plain_linear, names_of_modules, swap, unmatched_globs
from lightning_stosign.precision._select import select_backend

_WEIGHTS_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Float8Precision(Precision):
    """Train with the matrix products of the linear layers in FP8.

    The FP8 layers of Transformer Engine or torchao take the place of each ``nn.Linear`` whose sizes are multiples of 16
    (32 with recipe ``"mxfp8"``, 128 with ``"block"``); nothing else in the training script changes. The rule is a GPU's
    and holds on the CPU too, so that a laptop runs what the GPU will run. The weights, and all else in the model, keep
    ``weights_dtype``; FP8 operands exist only for the product they enter:

        ``y = cast(x * s_x) @ cast(w * s_w).T / (s_x * s_w) + b``

    The new layers hold the very parameters of the old ones, under the same names: tied weights stay tied, frozen ones
    frozen, hooks stay, and checkpoints pass freely between FP8 and other runs. Subclasses of ``nn.Linear`` stay as they
    are, because they may compute something else.

    Args:
        recipe: How values are scaled into the range of FP8. ``"current"``: one scale a tensor, E4M3 forward and E5M2
            for gradients (both backends). ``"rowwise"``: one scale a row (torchao). ``"delayed"``, ``"block"``,
            ``"mxfp8"``, or a ``transformer_engine.common.recipe.Recipe`` (Transformer Engine).
        backend: ``"transformer-engine"`` (a CUDA device of compute capability 8.9 or higher), ``"torchao"`` (such a
            device, or the CPU), or ``"auto"``: the first of the two that this machine can run and that has the recipe.
        weights_dtype: Type of parameters, buffers and inputs: ``torch.float32`` or ``torch.bfloat16``, or its name.
            With bfloat16 the steps run under ``torch.autocast``, which computes losses and softmax in float32.
        exclude: Globs on module names, e.g. ``["*head*", "encoder.layers.0"]``; what they match, with all inside it,
            stays in ``weights_dtype``.

    Raises:
        ValueError: An argument has a value out of range, or one that this machine cannot run; a model has no layer to
            convert.
        TypeError: An argument has the wrong type.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(plugins=[Float8Precision(exclude=["*head*"])], accelerator="cpu", logger=False)
        >>> trainer.precision_plugin.exclude
        ('*head*',)

    Source:
        Micikevicius et al., "FP8 Formats for Deep Learning", https://arxiv.org/abs/2209.05433.
    """

    # How the weights are stored, in Lightning's vocabulary: the model summary computes their size from it.
    precision: Literal["32-true", "bf16-true"]

    def __init__(
        self,
        recipe: Any = "current",
        *,
        backend: Literal["auto", "transformer-engine", "torchao"] = "auto",
        weights_dtype: torch.dtype | str = torch.float32,
        exclude: Sequence[str] = (),
    ) -> None:
        self.weights_dtype = _checked_dtype(weights_dtype)
        self.precision = "32-true" if self.weights_dtype is torch.float32 else "bf16-true"
        self.exclude = _checked_globs(exclude)
        self.recipe = recipe
        self._backend = select_backend(backend, recipe)
        self._device_type = self._backend.device_types[0]
        self._module: nn.Module | None = None

    @property
    def backend(self) -> str:
        """The FP8 library in use: ``"transformer-engine"`` or ``"torchao"``, never ``"auto"``."""
        return self._backend.name

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Put FP8 layers into the module, in place, and cast it to ``weights_dtype``; a second call changes nothing.

        Raises:
            ValueError: No layer is left to convert, and none is in FP8 already.
            RuntimeError: The model is sharded by FSDP2 already.
        """
        self._module = module
        names = names_of_modules(module)
        linears = {layer: aliases for layer, aliases in names.items() if is_plain_linear(layer)}
        kept = {layer: aliases for layer, aliases in names.items() if not self._is_excluded(aliases)}
        wanted = {layer: aliases for layer, aliases in linears.items() if layer in kept}
        unfit = {layer: aliases for layer, aliases in wanted.items() if not self._fits(layer)}
        fit = {layer: aliases for layer, aliases in wanted.items() if layer not in unfit}

        if fit:
            self._refuse_sharded(module)
            self._warn_about(module, unfit)
            swapped = swap(module, fit, lambda layer: self._backend.convert_linear(layer, self.weights_dtype))
            swap(module, kept, lambda layer: self._backend.convert_norm(layer, self.weights_dtype))
            rank_zero_info(
                f"Float8Precision: {len(swapped)} of {len(linears)} linear layers compute in FP8 "
                f"(backend {self.backend!r}, recipe {self.recipe!r})"
            )
        elif not any(self._backend.is_converted(layer) for layer in names):
            raise ValueError(
                f"Float8Precision found no layer to convert in {type(module).__name__}: of its {len(linears)} "
                f"nn.Linear layers, {len(linears) - len(wanted)} are left out by exclude={list(self.exclude)}, and "
                f"{len(unfit)} have sizes that are not multiples of {self._backend.multiple}{_sizes(unfit)}"
            )
        _cast(module, self.weights_dtype)
        return module

    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        """Take note of the device that the model was moved to.

        Raises:
            RuntimeError: The backend's layers do not run on that device.
        """
        self._device_type = next(model.parameters()).device.type
        if self._device_type not in self._backend.device_types:
            raise RuntimeError(
                f"Float8Precision(backend={self.backend!r}) runs on {' and '.join(self._backend.device_types)}, and "
                f"the model is on {self._device_type!r}: pass Trainer(accelerator='gpu') or "
                "Float8Precision(backend='torchao')"
            )
        return super().connect(model, optimizers, lr_schedulers)

    def convert_input(self, data: Any) -> Any:
        """Cast the floating-point tensors of a batch to ``weights_dtype``."""
        return apply_to_collection(data, Tensor, partial(_cast_floating, dtype=self.weights_dtype))

    def convert_output(self, data: Any) -> Any:
        """Cast the floating-point tensors of an output to torch's default type."""
        return apply_to_collection(data, Tensor, partial(_cast_floating, dtype=torch.get_default_dtype()))

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """Make ``weights_dtype`` the type of new tensors."""
        return _default_dtype(self.weights_dtype)

    def module_init_context(self) -> AbstractContextManager[Any]:
        """Make ``weights_dtype`` the type of new parameters; :meth:`convert_module` swaps the layers later."""
        return self.tensor_init_context()

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Compute converted layers in FP8 and the others in ``weights_dtype``."""
        with _default_dtype(self.weights_dtype), self._autocast(), self._backend.forward_context():
            yield

    def state_dict(self) -> dict[str, Any]:
        """What the FP8 layers remember between steps; empty unless the recipe is delayed scaling."""
        states = {} if self._module is None else self._backend.state_dict(self._module)
        return {"layers": states} if states else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; Lightning calls this once the model is converted."""
        if self._module is not None:
            self._backend.load_state_dict(self._module, state_dict["layers"])

    def _is_excluded(self, aliases: list[str]) -> bool:
        return any(is_excluded(name, self.exclude) for name in aliases)

    def _fits(self, layer: nn.Linear) -> bool:
        return layer.in_features % self._backend.multiple == 0 and layer.out_features % self._backend.multiple == 0

    def _warn_about(self, module: nn.Module, unfit: dict[nn.Linear, list[str]]) -> None:
        if unfit:
            rank_zero_warn(
                f"Float8Precision leaves these layers in {self.weights_dtype}, because FP8 needs sizes that are "
                f"multiples of {self._backend.multiple}{_sizes(unfit)}. Change the sizes, or name the layers in "
                "`exclude` to keep them so without this warning."
            )
        if idle := unmatched_globs(module, self.exclude):
            rank_zero_warn(f"Float8Precision: no module of {type(module).__name__} matches exclude={idle}.")

    def _refuse_sharded(self, module: nn.Module) -> None:
        # FSDP2 remembers which module each shard belongs to, and would gather the weights into the replaced layers.
        if not torch.distributed.is_available():
            return
        from torch.distributed.fsdp import FSDPModule

        if any(isinstance(child, FSDPModule) for child in module.modules()):
            raise RuntimeError(
                "Float8Precision cannot convert layers that FSDP2 has sharded. In `configure_model`, call "
                "`self.trainer.precision_plugin.convert_module(self)` before `fully_shard`."
            )

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.weights_dtype is torch.float32:
            return nullcontext()
        return torch.autocast(self._device_type, dtype=self.weights_dtype)


def _checked_dtype(weights_dtype: torch.dtype | str) -> torch.dtype:
    if not isinstance(weights_dtype, str | torch.dtype):
        raise TypeError(
            "weights_dtype must be a torch.dtype or its name, "
            f"got {weights_dtype!r} of type {type(weights_dtype).__name__}"
        )
    name = str(weights_dtype).removeprefix("torch.")
    if name not in _WEIGHTS_DTYPES:
        hint = (
            "; float16 needs a gradient scaler, which this plugin does not have: use bfloat16"
            if name == "float16"
            else ""
        )
        raise ValueError(f"weights_dtype must be one of {list(_WEIGHTS_DTYPES)}, got {weights_dtype!r}{hint}")
    return _WEIGHTS_DTYPES[name]


def _checked_globs(exclude: Sequence[str]) -> tuple[str, ...]:
    if isinstance(exclude, str):
        raise TypeError(f"exclude must be a sequence of globs, got the string {exclude!r}: write [{exclude!r}]")
    if not isinstance(exclude, Sequence) or not all(isinstance(glob, str) for glob in exclude):
        raise TypeError(f"exclude must be a sequence of globs, got {exclude!r}")
    return tuple(exclude)


def _sizes(layers: dict[nn.Linear, list[str]]) -> str:
    sizes = (f"{aliases[0]} ({layer.in_features} -> {layer.out_features})" for layer, aliases in layers.items())
    return f": {', '.join(sizes)}" if layers else ""


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    # Not `module.to(dtype)`: it would drop the imaginary part of complex buffers (rotary tables), and round the states
    # of torchmetrics, which exempt themselves from these two calls.
    if dtype is torch.float32:
        module.float()
        return
    module.bfloat16()
    for child in module.modules():
        if isinstance(child, LightningModule):
            child._dtype = dtype  # Lightning keeps `LightningModule.dtype` up to date in `float()`, not in `bfloat16()`


def _cast_floating(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)
