"""Float8Precision: the matrix products of a model's linear layers in FP8 or FP4, under the Lightning Trainer."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision.transformer_engine import TransformerEnginePrecision
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_stosign._lightning_names import is_a, under_both_names
from lightning_stosign._lightning_private import set_module_dtype
from lightning_stosign._plain import plain
from lightning_stosign.precision._layers import (
    is_excluded,
    is_plain_linear,
    keep_to_the_layers,
    names_of_modules,
    shared_parameters,
    swap,
    unmatched_globs,
)
from lightning_stosign.precision._select import select_backend
from lightning_stosign.precision._stepping import Stepping

_WEIGHTS_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PRECISIONS: dict[torch.dtype, Any] = {torch.float32: "32-true", torch.bfloat16: "bf16-true", torch.float16: "16-true"}

# Who has what not every backend has.
_FEATURES = {
    "fuse": "backend='transformer-engine'",
    "quantized_weights": "backend='transformer-engine'",
    "float8_all_gather": "backend='torchao' with recipe='current'",
}


@under_both_names
class Float8Precision(TransformerEnginePrecision):
    """Train with the matrix products of the linear layers in FP8 or FP4.

    The layers of Transformer Engine or torchao take the place of each ``nn.Linear`` whose sizes are multiples of 16
    (32 with recipes ``"mxfp8"`` and ``"mxfp4"``, 128 with ``"block"``); nothing else in the training script changes.
    The rule is a GPU's and holds on the CPU too, so that a laptop runs what the GPU will run. The weights, and all else
    in the model, keep ``weights_dtype``; FP8 operands exist only for the product they enter:

        ``y = cast(x * s_x) @ cast(w * s_w).T / (s_x * s_w) + b``

    The new layers hold the very parameters of the old ones, under the same names: tied weights stay tied, frozen ones
    frozen, hooks stay, and checkpoints pass freely between FP8 and other runs. Subclasses of ``nn.Linear`` stay as they
    are, because they may compute something else.

    Args:
        recipe: How values are scaled into the few bits. ``"current"``: one scale a tensor, E4M3 forward and E5M2
            for gradients. ``"delayed"``: the same with scales from earlier steps. ``"rowwise"``: one scale a row.
            ``"block"``, ``"mxfp8"``: one scale for 128 or 32 values, E4M3. ``"nvfp4"``, ``"mxfp4"``: one scale for 16
            or 32 values, E2M1. Or a mapping with such a ``"name"`` and the recipe's options, e.g. ``{"name": "delayed",
            "amax_history_len": 16}``, or a ``transformer_engine.common.recipe.Recipe``.
        backend: ``"transformer-engine"`` (a CUDA device of compute capability 8.9 or higher; all recipes but
            ``"rowwise"`` and ``"mxfp4"``, each on its hardware), ``"torchao"`` (any device; ``"current"`` and
            ``"rowwise"``), ``"emulation"`` (any device, slowly; ``"block"``, ``"mxfp8"``, ``"nvfp4"``, ``"mxfp4"``: the
            operands are rounded, the products run in float32), or ``"auto"``: the first of these that this machine
            can run and that has the recipe; on a GPU it emulates only what no other backend has.
        weights_dtype: Type of parameters, buffers and inputs: ``torch.float32``, ``torch.bfloat16`` or
            ``torch.float16``, or its name. With the latter two the steps run under ``torch.autocast``, which computes
            losses and softmax in float32; with float16 the loss is scaled by a ``torch.amp.GradScaler``.
        exclude: Globs on module names, e.g. ``["*head*", "encoder.layers.0"]``; what they match, with all inside it,
            stays in ``weights_dtype``. Nothing is left out by default: which layers are first and last cannot be told
            from a model, and leaving out the output layer of the example's GPT changed its loss by less than another
            seed does.
        pad: Convert layers of other sizes too: zeros fill up what is missing to a multiple, for each call.
        fuse: Fuse norms in an ``nn.Sequential`` with the linear layers that follow them (Transformer Engine's
            LayerNormLinear and LayerNormMLP). Names, parameters and state dict stay those of the separate layers.
        quantized_weights: Keep the weights of the converted layers in FP8 only (Transformer Engine). This is for an
            optimizer with master weights of its own: an update is lost where it is below a weight's rounding. Weights
            that several modules share, and those of fused or padded layers, stay as they are. Not with ``"delayed"``.
        float8_all_gather: Under FSDP2, gather the weights in FP8: a quarter of float32's bytes (torchao, recipe
            ``"current"``). A weight that several modules share is gathered as it is.

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

    # A subclass of Lightning's own plugin, because ThroughputMonitor counts in FP8 for that one only; nothing of it is
    # inherited: every method that it has is another one here.

    # How the weights are stored, in Lightning's vocabulary: the model summary computes their size from it.
    precision: Literal["32-true", "bf16-true", "16-true"]  # type: ignore[assignment]

    def __init__(
        self,
        recipe: Any = "current",
        *,
        backend: Literal["auto", "transformer-engine", "torchao", "emulation"] = "auto",
        weights_dtype: torch.dtype | str = torch.float32,
        exclude: Sequence[str] = (),
        pad: bool = False,
        fuse: bool = False,
        quantized_weights: bool = False,
        float8_all_gather: bool = False,
    ) -> None:
        self.weights_dtype = _checked_dtype(weights_dtype)
        self.precision = _PRECISIONS[self.weights_dtype]
        self.exclude = _checked_globs(exclude)
        self.recipe = recipe
        flags = {
            "pad": pad,
            "fuse": fuse,
            "quantized_weights": quantized_weights,
            "float8_all_gather": float8_all_gather,
        }
        self._flags = {name for name, value in flags.items() if _checked_bool(name, value)}
        self._backend, self._why = select_backend(backend, recipe)
        if missing := sorted(self._flags - self._backend.features - {"pad"}):
            raise ValueError(
                f"{missing[0]}=True is not offered by backend={self._backend.name!r} with recipe={recipe!r}; "
                f"{_FEATURES[missing[0]]} has it"
            )
        if objection := self._backend.objection(self.weights_dtype, self._flags):
            raise ValueError(f"recipe={recipe!r} with weights_dtype={weights_dtype!r}: {objection}")
        self._module: nn.Module | None = None
        self._stepping = Stepping()

    @property
    def backend(self) -> str:
        """The library in use: ``"transformer-engine"``, ``"torchao"`` or ``"emulation"``, never ``"auto"``."""
        return self._backend.name

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Put FP8 layers into the module, in place, and cast it to ``weights_dtype``; a second call changes nothing.

        Raises:
            ValueError: No layer is left to convert, and none is in FP8 already.
            RuntimeError: The model is sharded by FSDP2 already.
        """
        self._backend.check(module)
        self._module = module
        names = names_of_modules(module)
        linears = {layer: aliases for layer, aliases in names.items() if is_plain_linear(layer)}
        kept = {layer: aliases for layer, aliases in names.items() if not self._is_excluded(aliases)}
        wanted = {layer: aliases for layer, aliases in linears.items() if layer in kept}
        unfit = {layer: aliases for layer, aliases in wanted.items() if not self._fits(layer)}
        fit = {layer: aliases for layer, aliases in wanted.items() if layer not in unfit}

        if fit or (unfit and "pad" in self._flags):
            self._refuse_sharded(module)
            self._warn_about(module, unfit)
            converted = self._convert(module, wanted if "pad" in self._flags else fit, kept)
            backend = f"{self.backend!r}: {self._why}" if self._why else repr(self.backend)
            rank_zero_info(
                f"Float8Precision: {len(converted)} of {len(linears)} linear layers compute in low precision "
                f"(backend {backend}; recipe {self.recipe!r})"
            )
        elif not any(self._backend.holds_converted(layer) for layer in names):
            raise ValueError(
                f"Float8Precision found no layer to convert in {type(module).__name__}: of its {len(linears)} "
                f"nn.Linear layers, {len(linears) - len(wanted)} are left out by exclude={list(self.exclude)}, and "
                f"{len(unfit)} have sizes that are not multiples of {self._backend.multiple}{_sizes(unfit)}"
            )
        keep_to_the_layers(module, self._backend.holds_converted)
        _cast(module, self.weights_dtype)
        return module

    def _convert(
        self, module: nn.Module, layers: dict[nn.Linear, list[str]], kept: dict[nn.Module, list[str]]
    ) -> list[str]:
        """Convert these layers and the norms among ``kept``; return the names of the former."""
        fused = self._backend.fuse(module, kept, self.weights_dtype) if "fuse" in self._flags else []
        tied = shared_parameters(module)
        for aliases in layers.values():
            if len(aliases) > 1:
                self._backend.warn_about_shared(aliases)

        def converted(layer: nn.Linear) -> nn.Module:
            if not self._fits(layer):
                return self._backend.convert_padded(layer, self.weights_dtype)
            if "quantized_weights" in self._flags and layer.weight not in tied:
                return self._backend.convert_quantized(layer, self.weights_dtype)
            return self._backend.convert_linear(layer, self.weights_dtype)

        rest = {layer: aliases for layer, aliases in layers.items() if aliases[0] not in fused}
        swapped = swap(module, rest, converted, self._backend.own_parameters)
        still_there = set(module.modules())
        norms = {layer: aliases for layer, aliases in kept.items() if layer in still_there}
        swap(module, norms, lambda layer: self._backend.convert_norm(layer, self.weights_dtype))
        if "float8_all_gather" in self._flags:
            self._backend.float8_all_gather(module)
        return fused + swapped

    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        """Take note of the device that the model was moved to; the Trainer calls this.

        Raises:
            RuntimeError: The backend's layers do not run on that device; float16 weights are sharded.
        """
        self._device_type()
        self._around_steps(model)
        return model, optimizers, lr_schedulers

    def pre_backward(self, tensor: Tensor, module: nn.Module | None) -> Any:
        """Under the Trainer, scale the loss of float16 weights and call the hooks."""
        return self._around_steps(module).pre_backward(tensor, module)

    def backward(self, tensor: Tensor, model: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Run backward; under Fabric with the scaled loss of float16 weights.

        Activation checkpointing computes layers again meanwhile, and finds FP8 as it was in forward.
        """
        with _default_dtype(self.weights_dtype), self._backend.backward_context(self._module):
            self._around_steps(model).backward(tensor, model, *args, **kwargs)

    def post_backward(self, tensor: Tensor, module: nn.Module | None) -> Any:
        """Under the Trainer, call the hooks."""
        return self._around_steps(module).post_backward(tensor, module)

    def optimizer_step(self, optimizer: Any, model: nn.Module | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Step; with float16 weights only if the unscaled gradients are finite.

        Args:
            optimizer: The optimizer.
            model: The module that the Trainer trains; None under Fabric.
            **kwargs: The closure, and other arguments of the optimizer's ``step``.
        """
        options = kwargs if model is None else {**kwargs, "model": model}
        result = self._around_steps(model).optimizer_step(optimizer, **options)
        if "float8_all_gather" in self._flags and self._module is not None:
            self._backend.after_step(self._module)
        return result

    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        """Clip; with float16 weights the gradients are unscaled by then."""
        self._around_steps(self._module).clip_gradients(optimizer, clip_val, gradient_clip_algorithm)

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Undo the loss scale of float16 weights, so that Fabric can clip the gradients."""
        self._around_steps(None).unscale_gradients(optimizer)

    def convert_input(self, data: Any) -> Any:
        """Cast the floating-point tensors of a batch to ``weights_dtype``."""
        data = apply_to_collection(data, Tensor, partial(_cast_floating, dtype=self.weights_dtype))
        if torch.is_inference_mode_enabled() and self._module is not None and self._backend.keeps_tensors(self._module):
            # The step will not run in inference mode, and could not write into tensors that it made.
            with torch.inference_mode(False):
                data = apply_to_collection(data, Tensor, torch.clone)
        return data

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
        """Compute converted layers in low precision and the others in ``weights_dtype``."""
        with _default_dtype(self.weights_dtype), self._autocast(), self._backend.forward_context(self._module):
            yield

    def state_dict(self) -> dict[str, Any]:
        """What the run must remember: a delayed recipe's histories, and float16's loss scale."""
        state: dict[str, Any] = {}
        if self._module is not None and (layers := self._backend.state_dict(self._module)):
            state["layers"] = layers
        if self._stepping.scaler is not None:
            state["loss_scale"] = self._stepping.scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; Lightning calls this once the model is converted."""
        if self._module is not None and "layers" in state_dict:
            self._backend.load_state_dict(self._module, state_dict["layers"])
        self._around_steps(self._module)
        if "loss_scale" in state_dict and self._stepping.scaler is not None:
            self._stepping.scaler.load_state_dict(state_dict["loss_scale"])

    def _is_excluded(self, aliases: list[str]) -> bool:
        return any(is_excluded(name, self.exclude) for name in aliases)

    def _fits(self, layer: nn.Linear) -> bool:
        return layer.in_features % self._backend.multiple == 0 and layer.out_features % self._backend.multiple == 0

    def _warn_about(self, module: nn.Module, unfit: dict[nn.Linear, list[str]]) -> None:
        if unfit and "pad" not in self._flags:
            rank_zero_warn(
                f"Float8Precision leaves these layers in {self.weights_dtype}, because recipe {self.recipe!r} needs "
                f"sizes that are multiples of {self._backend.multiple}{_sizes(unfit)}. Change the sizes, fill them up "
                "with pad=True, or name the layers in `exclude` to keep them so without this warning."
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

    def _around_steps(self, model: nn.Module | None) -> Any:
        """Lightning's own plugin for what happens around a step of the model."""
        if self.weights_dtype is torch.float16 and self._module is not None:
            self._stepping.scale_loss(self._module, self._device_type())
        return self._stepping.under(model)

    def _device_type(self) -> str:
        """Return the type of the device that the model is on: it may be moved after its conversion.

        Raises:
            RuntimeError: The backend's layers do not run on that device.
        """
        parameter = None if self._module is None else next(self._module.parameters(), None)
        device = self._backend.device_types[0] if parameter is None else parameter.device.type
        if device not in self._backend.device_types:
            raise RuntimeError(
                f"Float8Precision(backend={self.backend!r}) runs on {' and '.join(self._backend.device_types)}, and "
                f"the model is on {device!r}: pass accelerator='gpu' to the Trainer or to Fabric, or "
                "Float8Precision(backend='torchao')"
            )
        return device

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.weights_dtype is torch.float32:
            return nullcontext()
        return torch.autocast(self._device_type(), dtype=self.weights_dtype)


def _checked_dtype(weights_dtype: torch.dtype | str) -> torch.dtype:
    if not isinstance(weights_dtype, str | torch.dtype):
        raise TypeError(
            "weights_dtype must be a torch.dtype or its name, "
            f"got {weights_dtype!r} of type {type(weights_dtype).__name__}"
        )
    name = str(weights_dtype).removeprefix("torch.")
    if name not in _WEIGHTS_DTYPES:
        raise ValueError(f"weights_dtype must be one of {list(_WEIGHTS_DTYPES)}, got {weights_dtype!r}")
    return _WEIGHTS_DTYPES[name]


def _checked_globs(exclude: Sequence[str]) -> tuple[str, ...]:
    if isinstance(exclude, str):
        raise TypeError(f"exclude must be a sequence of globs, got the string {exclude!r}: write [{exclude!r}]")
    if not isinstance(exclude, Sequence) or not all(isinstance(glob, str) for glob in exclude):
        raise TypeError(f"exclude must be a sequence of globs, got {exclude!r}")
    return tuple(exclude)


def _checked_bool(name: str, value: bool) -> bool:
    value = plain(value)
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r} of type {type(value).__name__}")
    return value


def _sizes(layers: dict[nn.Linear, list[str]]) -> str:
    sizes = (f"{aliases[0]} ({layer.in_features} -> {layer.out_features})" for layer, aliases in layers.items())
    return f": {', '.join(sizes)}" if layers else ""


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    # Not `module.to(dtype)`: it would drop the imaginary part of complex buffers (rotary tables), and round the states
    # of torchmetrics, which exempt themselves from these two calls.
    if dtype is torch.float32:
        module.float()
        return
    if dtype is torch.float16:
        module.half()
        return
    module.bfloat16()
    for child in module.modules():
        if is_a(child, LightningModule):
            set_module_dtype(child, dtype)


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
