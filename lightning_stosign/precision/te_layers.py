"""Transformer Engine's layers (TE) with torch's manners: any number of tokens, initial values, state-dict keys."""

import math
from collections.abc import Callable, Mapping, MutableMapping
from functools import partial
from typing import Any, cast

import torch
import transformer_engine.pytorch as te
from torch import Tensor, nn
from torch.nn import init

from lightning_stosign.precision._padding import pad_tokens, unpad_tokens


class Linear(te.Linear):
    """``te.Linear`` that behaves like ``nn.Linear`` towards its users.

    TE refuses a number of tokens that is no multiple of 8, and some of its products one that is no multiple of 16; the
    last batch of an epoch often has such a number. This class adds zeros, which change no other token, no scale and no
    gradient.

    Args:
        in_features: Features of the input.
        out_features: Features of the output.
        multiple: The number of tokens becomes a multiple of this.
        **options: Those of ``te.Linear``.
    """

    weight: nn.Parameter

    def __init__(self, in_features: int, out_features: int, *, multiple: int, **options: Any) -> None:
        super().__init__(in_features, out_features, **options)
        self.multiple = multiple
        # What is drawn from now on is drawn as torch draws it. TE's own functions could not be pickled.
        bound = 1 / math.sqrt(in_features)
        draws = {
            "weight": partial(init.kaiming_uniform_, a=math.sqrt(5)),
            "bias": partial(init.uniform_, a=-bound, b=bound),
        }
        for name, meta in self.param_init_meta.items():
            meta.init_fn = draws[name]

    def forward(self, inp: Tensor, *args: Any, **options: Any) -> Any:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        leading = inp.shape[:-1]
        if leading.numel() % self.multiple == 0:
            return super().forward(inp, *args, **options)
        return unpad_tokens(super().forward(pad_tokens(inp, self.multiple), *args, **options), leading)

    def reset_parameters(self, defer_init: bool = False) -> None:
        """Initialise the parameters in place, as ``nn.Linear`` does.

        TE's method makes new parameters, which are in no optimizer, are not tied and require a gradient.
        """
        if defer_init or self.primary_weights_in_fp8:
            self._reset_quantized(defer_init)
        elif "bias" in self._parameters:
            nn.Linear.reset_parameters(self)  # reads weight and bias, and nothing else
        else:
            init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def _reset_quantized(self, defer_init: bool) -> None:
        """Let TE quantise its initial values; it takes plain parameters, and forgets which are frozen."""
        frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        if not defer_init and isinstance(self.weight, te.QuantizedTensor):
            plain = torch.empty(self.weight.shape, dtype=self.weight.dtype, device=self.weight.device)
            self.weight = nn.Parameter(plain)
        super().reset_parameters(defer_init=defer_init)
        for name in frozen:
            self.get_parameter(name).requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        trains = getattr(self._parameters.get("weight"), "requires_grad", True)
        super()._apply(fn, recurse)
        weight = self._parameters.get("weight")
        if isinstance(weight, te.QuantizedTensor):
            weight.requires_grad_(trains)  # TE's tensors forget it before 2.16
        elif self._became_plain():  # a parameter without values, from the meta device
            self._quantize(torch.zeros_like(self.weight))
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        loaded = state_dict.get(f"{prefix}weight")
        if self._became_plain():  # with assign=True
            self._quantize(self.weight.detach())
        if loaded is not None and getattr(self.weight, "_high_precision_init_val", None) is not None:
            # Master weights start from these values: from the loaded ones, not from those before.
            cast(Any, self.weight)._high_precision_init_val = loaded.detach().to("cpu", self.weight.dtype, copy=True)

    def _became_plain(self) -> bool:
        """Whether the weight, which is to be in FP8 only, has plain values."""
        weight = self._parameters.get("weight")
        return bool(self.primary_weights_in_fp8) and type(weight) is nn.Parameter and not weight.is_meta

    def _quantize(self, values: Tensor) -> None:
        """Let TE make the weight from these values, which it takes from a function that initialises; draw nothing."""
        sources = {"weight": values, "bias": self._parameters.get("bias")}
        draws = {name: meta.init_fn for name, meta in self.param_init_meta.items()}
        try:
            for name, meta in self.param_init_meta.items():
                meta.init_fn = partial(_copy, source=sources[name])
            self._reset_quantized(defer_init=False)
        finally:
            for name, meta in self.param_init_meta.items():
                meta.init_fn = draws[name]


class LayerNorm(te.LayerNorm):
    """``te.LayerNorm`` that initialises its parameters in place."""

    def reset_parameters(self, defer_init: bool | None = None) -> None:
        """Set the weight to 1 and the bias to 0."""
        init.ones_(self.weight)
        init.zeros_(self.bias)


class RMSNorm(te.RMSNorm):
    """``te.RMSNorm`` that initialises its parameters in place."""

    def reset_parameters(self, defer_init: bool | None = None) -> None:
        """Set the weight to 1."""
        init.ones_(self.weight)


def quantized_linear(make: Callable[..., Linear], initial: Tensor, device: str) -> Linear:
    """Return a layer that keeps its weight in the recipe's format only.

    Args:
        make: Makes the layer under ``te.quantized_model_init``, given the arguments ``device`` and ``init_method``.
        initial: The values of the weight; on the meta device there are none.
        device: Where TE can quantise.
    """
    layer = make(device="meta" if initial.is_meta else device, init_method=partial(_copy, source=initial))
    layer.register_state_dict_post_hook(_dequantize_weight)
    return layer


def _copy(parameter: Tensor, source: Tensor) -> None:
    with torch.no_grad():  # TE hands over the parameter itself
        parameter.copy_(source)


def stored_pieces(layer: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that a quantised weight consists of: its bytes by rows and by columns, and their scales.

    A state dict has the dequantised weight. Quantised again, it need not give the same bits: the copy by columns comes
    from values that are gone, and a scale can differ in its last bit.
    """
    if not isinstance(layer, Linear) or not isinstance(layer.weight, te.QuantizedTensor):
        return {}
    pieces = layer.weight.get_metadata().items()
    return {f"weight.{name}": piece for name, piece in pieces if isinstance(piece, Tensor)}


def restore_pieces(layer: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Give a quantised weight the bits that :func:`stored_pieces` returned; those of another recipe are left out."""
    pieces = {name: piece for name, piece in stored_pieces(layer).items() if name in saved}
    if all((saved[name].shape, saved[name].dtype) == (piece.shape, piece.dtype) for name, piece in pieces.items()):
        with torch.no_grad():
            for name, piece in pieces.items():
                piece.copy_(saved[name])


def rms_norm_eps(norm: nn.RMSNorm) -> float:
    """The epsilon that torch uses: it normalises in float32 at least, and None means that type's own."""
    return torch.finfo(torch.float32).eps if norm.eps is None else float(norm.eps)


def without_extra_state(layer: nn.Module) -> nn.Module:
    """Keep the state-dict keys of the torch layer: TE adds ``_extra_state``, which an unconverted model cannot load.

    Lightning loads the weights before the plugin converts the model. With delayed scaling the extra state has content:
    the plugin saves it on its own, see :meth:`TransformerEngineBackend.state_dict`.
    """
    layer.register_state_dict_post_hook(_drop_extra_state)
    layer.register_load_state_dict_pre_hook(_add_empty_extra_state)
    return layer


def _dequantize_weight(layer: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, metadata: Any) -> None:
    weight = state_dict.get(f"{prefix}weight")
    if isinstance(weight, te.QuantizedTensor):
        state_dict[f"{prefix}weight"] = weight.dequantize()


def _drop_extra_state(layer: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, metadata: Any) -> None:
    state_dict.pop(f"{prefix}_extra_state", None)


def _add_empty_extra_state(layer: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, *report: Any) -> None:
    # An empty state is TE's own way to say that there is nothing to restore.
    state_dict.setdefault(f"{prefix}_extra_state", torch.empty(0, dtype=torch.uint8, device="cpu"))
