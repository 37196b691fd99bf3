"""What optimizers have stored, as the values it stands for: this package's, torchao's, Transformer Engine's ..."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.optim import Optimizer

from lightning_stosign.optim.emulation import is_moment
from lightning_stosign.optim.states.state_precision import FLOAT32, precision_of
from lightning_stosign.optim.states.storage import SCALE_SUFFIX, is_packed, read_state

Group = Mapping[str, Any]
State = Mapping[str, Any]

_BITSANDBYTES_BLOCK = 256
_BITSANDBYTES_NAMES = {
    "adam": ("exp_avg", "exp_avg_sq"),
    "lamb": ("exp_avg", "exp_avg_sq"),
    "ademamix": ("exp_avg", "exp_avg_sq"),
    "lion": ("exp_avg",),
    "momentum": ("momentum_buffer",),
    "lars": ("momentum_buffer",),
    "rmsprop": ("square_avg",),
    "adagrad": ("sum",),
}


def read_stored(optimizer: Optimizer, param: Tensor, group: Group, state: State) -> dict[str, Tensor]:
    """Read floating-point states: this package's, a tensor subclass such as torchao's, or plain tensors.

    Args:
        optimizer: any torch optimizer.
        param: the parameter.
        group: its param group.
        state: its state, with the values that this rank holds.

    Returns:
        Values by state, float32 or float64; do not change them.
    """
    names = [
        name
        for name, value in state.items()
        if (is_moment(name, value, param) or is_packed(state, name)) and not _is_scale(name, state)
    ]
    precision = precision_of(state, group) or FLOAT32
    return {
        name: in_float32(
            state[name].dequantize() if _knows_how_to_dequantize(state[name]) else read_state(state, name, precision)
        )
        for name in names
    }


def read_transformer_engine(optimizer: Optimizer, param: Tensor, group: Group, state: State) -> dict[str, Tensor]:
    """Read the moments of Transformer Engine's FusedAdam.

    FP8 moments are E4M3 bytes, in a Float8Tensor (``_data``, ``_scale_inv``) or in a plain uint8 tensor with its scale
    in ``optimizer._scales[param][name]``, where float16 moments have theirs too. A moment that is all zero has a scale
    that is 0 or infinite: it is read as zeros. Arguments and result as of :func:`read_stored`.
    """
    scales = getattr(optimizer, "_scales", {}).get(param, {})
    values = {}
    for name in ("exp_avg", "exp_avg_sq"):
        stored = state.get(name)
        if stored is None:
            continue
        if hasattr(stored, "_scale_inv"):
            values[name] = _scaled(stored._data.view(torch.float8_e4m3fn), stored._scale_inv)
        elif stored.dtype == torch.uint8:
            values[name] = _scaled(stored.view(torch.float8_e4m3fn), scales[name])
        elif stored.dtype == torch.float16:
            values[name] = _scaled(stored, scales[name])
        else:
            values[name] = in_float32(stored)
    return values


def read_bitsandbytes(optimizer: Optimizer, param: Tensor, group: Group, state: State) -> dict[str, Tensor]:
    """Read the states of bitsandbytes' optimizers, under the names that torch has for them.

    An 8-bit state ``state1`` holds indices into the code book ``qmap1`` (256 float32 values in [-1, 1]) times the
    largest magnitude of each block of 256 values, ``absmax1``, or in older versions of the whole tensor, ``max1``; so
    do ``state2`` and its companions. Small parameters have float32 states. AdEMAMix has its two momenta stacked in
    ``state1``: the slow one is ``exp_avg_slow``. Arguments and result as of :func:`read_stored`.
    """
    algorithm = getattr(optimizer, "optimizer_name", "")
    names = _BITSANDBYTES_NAMES.get(algorithm, ("state1", "state2"))
    values = {}
    for number, name in enumerate(names, start=1):
        codes = state.get(f"state{number}")
        if codes is None:
            continue
        value = codes.float()
        if codes.dtype == torch.uint8:
            value = state[f"qmap{number}"][codes.long()]
            scale = state.get(f"absmax{number}")
            value = value * state[f"max{number}"] if scale is None else _times_block_scale(value, scale)
        values[name] = value
    if algorithm == "ademamix" and "exp_avg" in values:
        values["exp_avg"], values["exp_avg_slow"] = values["exp_avg"]
    return values


def in_float32(value: Tensor) -> Tensor:
    """Return the values in float32, or as they are where they are float64."""
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


def _times_block_scale(value: Tensor, scale: Tensor) -> Tensor:
    """Multiply each block by its scale; of a stack ([2, blocks] scales) each part by itself."""
    if scale.dim() == 2:
        return torch.stack([_times_block_scale(v, s) for v, s in zip(value, scale, strict=True)])
    flat = value.reshape(-1)
    blocks = pad(flat, (0, -flat.numel() % _BITSANDBYTES_BLOCK)).view(-1, _BITSANDBYTES_BLOCK)
    return (blocks * scale.unsqueeze(1)).view(-1)[: flat.numel()].view(value.shape)


def _scaled(stored: Tensor, scale: Tensor) -> Tensor:
    usable = scale.isfinite() & (scale != 0)
    return torch.where(usable, stored.float() * scale, 0.0)


def _knows_how_to_dequantize(value: Tensor) -> bool:
    return type(value).dequantize is not Tensor.dequantize


def _is_scale(name: str, state: Mapping[str, Any]) -> bool:
    return name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in state
